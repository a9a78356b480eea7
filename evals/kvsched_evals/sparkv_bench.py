"""`make bench-sparkv`: time to the first token over shaped and recorded links, on the real model (targets S3-S5).

Every request goes through real sockets: a published folder, a server, a relay that shapes the link, `generate()`. All
planners of a case run one after the other, so that ratios compare like with like. Results are written after every case
and finished cases are not run again, so a long run can be broken off and taken up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

import kvsched
from kvsched.sparkv import loader
from kvsched.sparkv.cost import DeviceProfile
from kvsched.sparkv.serve import running

from .demo import TokenClock
from .link import shaped_link
from .machine import describe

CHUNK_TOKENS = 256
QUERY_TOKENS = 64
DROP = 0.5  # a recorded link is taken up where its bandwidth falls to this share or less
DROP_WINDOW = 8  # steps of the log before and after a drop that are compared


@dataclasses.dataclass(frozen=True)
class Case:
    """One request: `context` prompt tokens of a published document over one link, divided by one planner.

    `link` is a rate in Mbit/s, or the name of a recorded log with the step at which it is taken up (`name@step`).
    `replan` off keeps the first plan that was made with a known goodput.
    """

    context: int
    link: str
    rtt_ms: float
    planner: str
    replan: bool = True

    @property
    def key(self) -> str:
        return "/".join(map(str, dataclasses.astuple(self)))


class Bench:
    """The published document, the server and the results so far."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, codec: str, logs: Path | None, out: Path) -> None:
        self.model, self.ids, self.codec, self.logs, self.out = model, ids, codec, logs, out
        kept = json.loads(out.read_text()) if out.exists() else {}
        if kept and kept["settings"] != self.settings:
            raise typer.BadParameter(f"{out} was measured with other settings: remove it, or name another file.")
        self.rows: dict[str, list[dict[str, Any]]] = kept.get("rows", {})

    @property
    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()[:16]
        return {"codec": self.codec, "chunk_tokens": CHUNK_TOKENS, "query_tokens": QUERY_TOKENS, "document": digest}

    def run(self, cases: list[Case], repeats: int) -> None:
        """Measure what is missing of `cases`, each `repeats` times, side by side."""
        longest = max(case.context for case in cases)
        with tempfile.TemporaryDirectory() as folder:
            config = {"codec": self.codec, "chunk_tokens": CHUNK_TOKENS}
            kvsched.publish(self.model, self.ids[:, :longest], store=folder, config=config)
            DeviceProfile.of(self.model, CHUNK_TOKENS)
            with running(folder) as server, tqdm(total=len(cases) * repeats, desc="sparkv", unit="request") as bar:
                for repeat in range(repeats):
                    for case in cases:
                        done = self.rows.setdefault(case.key, [])
                        if len(done) <= repeat:
                            done.append(self._request(case, server))
                            self.write()
                        bar.update()

    def _request(self, case: Case, server: str) -> dict[str, Any]:
        document = self.ids[:, : case.context]
        question = self.ids.flip(1)[:, :QUERY_TOKENS]  # nothing published continues like this
        prompt = torch.cat([document, question], dim=1)
        clock = TokenClock()
        generate = {"max_new_tokens": 1, "do_sample": False, "streamer": clock, "return_dict_in_generate": True}
        if case.planner == "local":
            output = self.model.generate(prompt, past_key_values=DynamicCache(config=self.model.config), **generate)
            return {**dataclasses.asdict(case), "ttft": clock.first, "token": int(output.sequences[0, -1])}
        with self._link(case, server) as url, self._frozen_plan(not case.replan):
            options = {
                "store": url,
                "codec": self.codec,
                "chunk_tokens": CHUNK_TOKENS,
                "planner": case.planner,
                "stall_timeout": 60.0,
            }
            clock.begin = time.perf_counter()
            output = self.model.generate(prompt, cache_implementation="sparkv", cache_config=options, **generate)
        report = dataclasses.asdict(output.past_key_values.report())
        token = int(output.sequences[0, -1])
        return {**dataclasses.asdict(case), "ttft": clock.first, "token": token, "report": report}

    @contextlib.contextmanager
    def _frozen_plan(self, frozen: bool) -> Iterator[None]:
        """The first plan stays, and nothing that it leaves to the stream is computed instead."""
        if not frozen:
            yield
            return
        with (
            mock.patch.object(loader, "_MAX_PLANS", 1),
            mock.patch.object(loader.Loader, "_computing_is_quicker", lambda *_: False),
        ):
            yield

    @contextlib.contextmanager
    def _link(self, case: Case, server: str) -> Iterator[str]:
        if "@" not in case.link:
            with shaped_link(server, mbit=float(case.link), rtt_ms=case.rtt_ms) as url:
                yield url
            return
        assert self.logs is not None
        name, start = case.link.split("@")
        steps = read_log(self.logs / f"{name}.json")[int(start) :]
        link = shaped_link(server, mbit=steps[0][1], rtt_ms=case.rtt_ms)
        over = threading.Event()

        def replay() -> None:
            for seconds, mbit in steps:
                link.mbit = mbit
                if over.wait(seconds):
                    return

        with link as url:
            player = threading.Thread(target=replay, name="kvsched-replay")
            player.start()
            try:
                yield url
            finally:
                over.set()
                player.join()

    def write(self) -> None:
        """Keep everything measured so far, and what follows from it."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": shlex.join(["python", "-m", "kvsched_evals.sparkv_bench", *sys.argv[1:]]),
            "machine": describe(),
            "settings": self.settings,
            "summary": summary(self.rows),
            "rows": self.rows,
        }
        draft = self.out.with_suffix(".tmp")
        draft.write_text(json.dumps(result, indent=1) + "\n")
        draft.replace(self.out)


def read_log(path: Path) -> list[tuple[float, float]]:
    """Steps of a recorded link as (seconds, Mbit/s).

    Raises:
        typer.BadParameter: the file is no list of steps with `duration_ms` and `bandwidth_kbps`.
    """
    try:
        return [(step["duration_ms"] / 1e3, step["bandwidth_kbps"] / 1e3) for step in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise typer.BadParameter(f"{path} is no recorded link: {error!r}") from error


def steepest_drop(steps: list[tuple[float, float]]) -> int | None:
    """The step, some way before the log's steepest fall to `DROP` or less, at which to take it up."""
    rates = [mbit for _, mbit in steps]
    falls = {
        at: statistics.fmean(rates[at : at + DROP_WINDOW]) / statistics.fmean(rates[at - DROP_WINDOW : at])
        for at in range(DROP_WINDOW, len(rates) - DROP_WINDOW)
        if statistics.fmean(rates[at - DROP_WINDOW : at]) > 0
    }
    at = min(falls, key=lambda step: falls[step], default=None)
    return None if at is None or falls[at] > DROP else max(0, at - 3)


def summary(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians and spread of every case, and predicted over real times of all loads (target S3)."""
    cases = {
        key: {
            **{name: done[0][name] for name in ("context", "link", "rtt_ms", "planner", "replan")},
            "ttft": statistics.median(row["ttft"] for row in done),
            "spread": [min(row["ttft"] for row in done), max(row["ttft"] for row in done)],
            "runs": len(done),
        }
        for key, done in rows.items()
        if done
    }
    loads = [row["report"] for done in rows.values() for row in done if row.get("report", {}).get("predicted_seconds")]
    errors = sorted(abs(load["predicted_seconds"] / load["seconds"] - 1) for load in loads)
    prediction = None
    if errors:
        prediction = {"loads": len(errors), "median": statistics.median(errors), "p95": errors[int(0.95 * len(errors))]}
    return {"cases": cases, "prediction_error": prediction}


def document(tokenizer: Any, tokens: int) -> torch.Tensor:
    """Real text of `tokens` tokens `[1, tokens]`: chapters of the Python language reference."""
    text = "\n\n".join(topics[name] for name in sorted(topics, key=lambda name: -len(topics[name])))
    return tokenizer(text, return_tensors="pt").input_ids[:, :tokens]


def main(
    json_path: Annotated[Path, typer.Option("--json", help="Where results go, and are taken up.")] = Path(
        "evals/results/sparkv.json"
    ),
    contexts: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "2048,8192",
    mbits: Annotated[str, typer.Option(help="Rates of the link.")] = "1,2,4,8,16,32,64",
    rtts: Annotated[str, typer.Option(help="Round trips in milliseconds.")] = "10,50",
    planners: Annotated[str, typer.Option(help="What divides the work.")] = "local,stream,token_split,optimal",
    codec: Annotated[str, typer.Option(help="How chunks are written.")] = "lossless",
    links: Annotated[Path | None, typer.Option(help="Folder of recorded links, as JSON lists of steps.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of every case.")] = 3,
) -> None:
    """Measure the time to the first token over shaped links, and over recorded ones with and without re-planning."""
    transformers_logging.set_verbosity_error()
    model, tokenizer = kvsched.load_model()
    sizes = [int(size) for size in contexts.split(",")]
    bench = Bench(model, document(tokenizer, max(sizes)), codec, links, json_path)
    cases = [
        Case(context, mbit, float(rtt), planner)
        for context in sizes
        for mbit in mbits.split(",")
        for rtt in rtts.split(",")
        for planner in planners.split(",")
        if planner != "local"
    ]
    cases = [Case(context, "none", 0.0, "local") for context in sizes if "local" in planners.split(",")] + cases
    for log in sorted(links.glob("*.json")) if links else []:
        if (start := steepest_drop(read_log(log))) is not None:
            cases += [Case(min(sizes), f"{log.stem}@{start}", 20.0, "optimal", replan) for replan in (True, False)]
    bench.run(cases, repeats)
    typer.echo(json.dumps(summary(bench.rows)["prediction_error"]))
    from .sparkv_plots import draw

    for picture in draw(json_path):
        typer.echo(f"drawn: {picture}")


if __name__ == "__main__":
    typer.run(main)
