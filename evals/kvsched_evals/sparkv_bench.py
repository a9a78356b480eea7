"""`make bench-sparkv`: time to the first token over shaped and recorded links, on the real model (S3-S5, S7, S9).

Every request goes through real sockets: a published folder, a server, a relay that shapes the link, `generate()`. All
planners of a cell (context, rate, round trip) run one after the other, in an order that changes from cell to cell and
from repeat to repeat, so that ratios compare like with like. Results are written after every request and finished ones
are not run again, so a long run can be broken off and taken up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any, Literal
from unittest import mock

import numpy as np
import torch
import typer
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

import kvsched
from kvsched.sparkv import cache as sparkv_cache
from kvsched.sparkv import loader
from kvsched.sparkv.address import fingerprint
from kvsched.sparkv.calibration import Calibration
from kvsched.sparkv.cost import DeviceProfile
from kvsched.sparkv.energy import EnergyMeter
from kvsched.sparkv.grid import Grid
from kvsched.sparkv.serve import running

from .demo import TokenClock
from .link import apart, shaped_link
from .machine import describe, keep
from .namespace import Namespace
from .recorded import Recording
from .rounds import Rounds
from .sparkv_verdicts import OURS, verdicts

CHUNK_TOKENS = 256
QUERY_TOKENS = 64
RECORDED_RTT_MS = 20.0
UNSHAPED_MBIT = 1e5


@dataclasses.dataclass(frozen=True)
class Case:
    """One request: `context` prompt tokens of a published document over one link, divided by one planner.

    `link` is a rate in Mbit/s, or the name of a recorded log with the step at which it is taken up (`name@step`); soon
    after, it falls to the share `falls_to` of its rate. The planner `progressive` is `optimal` over chunks of that
    codec. `replan` off keeps the first plan.
    """

    context: int
    link: str
    rtt_ms: float
    planner: str
    replan: bool = True
    falls_to: float | None = None

    @property
    def key(self) -> str:
        return "/".join(map(str, dataclasses.astuple(self)))

    def planned(self, codec: str) -> tuple[str, str]:
        """The planner and the codec that it stands for, where others use `codec`."""
        return ("optimal", "progressive") if self.planner == "progressive" else (self.planner, codec)


class Bench:
    """The document, the model and the results so far.

    Args:
        model: loads and computes.
        ids: `[1, n]`, the document; a context is its first tokens.
        codec: of all planners but `progressive`.
        logs: folder of recorded links.
        out: the JSON file of results, taken up if it is there.
        namespace: behind which links are shaped by the kernel; `None` shapes them in the relay.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: torch.Tensor,
        codec: str,
        logs: Path | None,
        out: Path,
        namespace: Namespace | None = None,
    ) -> None:
        self.model, self.ids, self.codec, self.logs, self.out = model, ids, codec, logs, out
        self.namespace = namespace
        kept = json.loads(out.read_text()) if out.exists() else {}
        if kept and kept["settings"] != self.settings:
            raise typer.BadParameter(f"{out} was measured with other settings: remove it, or name another file.")
        self.rows: dict[str, list[dict[str, Any]]] = kept.get("rows", {})
        self.timelines: dict[str, dict[str, Any]] = kept.get("timelines", {})
        self.wire: dict[str, dict[str, int]] = kept.get("wire", {})
        self.possible: dict[str, float] = kept.get("possible", {})  # of recorded links: what no plan gains more than

    @property
    def settings(self) -> dict[str, Any]:
        """What results must have in common to stand in one file."""
        calibration = Calibration.find(fingerprint(self.model))
        return {
            "codec": self.codec,
            "calibration": calibration.id if calibration else None,
            "chunk_tokens": CHUNK_TOKENS,
            "query_tokens": QUERY_TOKENS,
            "processor": describe()["processor"],
            "shaper": "relay" if self.namespace is None else "tc",
            "document": hashlib.sha256(self.ids[:, :QUERY_TOKENS].numpy().tobytes()).hexdigest()[:16],
        }

    def run(self, order: list[Case]) -> None:
        """Measure what is missing of `order`; a case stands in it as often as it is to be measured."""
        longest, seen = max(case.context for case in order), Counter[Case]()
        DeviceProfile.renew(self.model, CHUNK_TOKENS)  # a kept one may be of a busier hour
        with tempfile.TemporaryDirectory() as folder:
            for codec in sorted({case.planned(self.codec)[1] for case in order if case.planner != "local"}):
                config = {"codec": codec, "chunk_tokens": CHUNK_TOKENS}
                kvsched.publish(self.model, self.ids[:, :longest], store=folder, config=config)
            with self._server(folder) as server:
                for case in tqdm(order, desc="sparkv", unit="request"):
                    done = self.rows.setdefault(case.key, [])
                    seen[case] += 1
                    if len(done) < seen[case]:
                        done.append(self._request(case, server))
                        self.write()
            if not self.wire:
                self.wire = self._count_round_trips(Path(folder), longest)
                self.write()

    def _server(self, folder: str) -> AbstractContextManager[str]:
        return apart(partial(running, folder)) if self.namespace is None else self.namespace.serving(folder)

    def _request(self, case: Case, server: str) -> dict[str, Any]:
        clock, meter = TokenClock(), EnergyMeter()
        prompt, row = self._prompt(case.context), dataclasses.asdict(case)

        def first_token(**cache: Any) -> Any:
            with meter:
                clock.begin = time.perf_counter()
                return self.model.generate(
                    prompt, max_new_tokens=1, do_sample=False, streamer=clock, return_dict_in_generate=True, **cache
                )

        if case.planner == "local":
            output = first_token(past_key_values=DynamicCache(config=self.model.config))
        else:
            planner, codec = case.planned(self.codec)
            with self._link(case, server) as url, self._known_link(case, url), self._frozen_plan(not case.replan):
                options = {"store": url, "codec": codec, "chunk_tokens": CHUNK_TOKENS, "planner": planner}
                output = first_token(cache_implementation="sparkv", cache_config=options)
                report = dataclasses.asdict(output.past_key_values.report())
                output.past_key_values.reset()  # what would still arrive to refine it has no part in the first token
            self._keep_timeline({**row, "ttft": clock.first}, report.pop("timeline"))
            row["report"] = report
        token = int(output.sequences[0, -1])
        return {**row, "ttft": clock.first, "token": token, "measured_joules": meter.joules}

    def _prompt(self, context: int) -> torch.Tensor:
        """The document's first tokens `[1, context]`, and a question: nothing published continues like it."""
        return torch.cat([self.ids[:, :context], self.ids[:, :QUERY_TOKENS].flip(1)], dim=1)

    def _compute_seconds(self, context: int) -> np.ndarray:
        """Seconds that each chunk of a context takes to compute, by the device's profile: `[chunks]`."""
        grid = Grid(context // CHUNK_TOKENS, CHUNK_TOKENS, self.model.config.num_hidden_layers)
        return DeviceProfile.of(self.model, CHUNK_TOKENS).compute_seconds(grid)[:, -1]

    def _link(self, case: Case, server: str) -> AbstractContextManager[str]:
        if case.falls_to is None and self.namespace is None:
            return apart(partial(shaped_link, server, mbit=float(case.link), rtt_ms=case.rtt_ms))
        if self.namespace is not None:  # which follows a recorded link too late: a relay does that, and all round trips
            self.namespace.shape(float(case.link) if case.falls_to is None else UNSHAPED_MBIT)
        if case.falls_to is None:
            return apart(partial(shaped_link, server, mbit=UNSHAPED_MBIT, rtt_ms=case.rtt_ms))
        recording, step = self._recording(case)
        return apart(partial(recording.replayed, step, server, case.rtt_ms))

    def _recording(self, case: Case) -> tuple[Recording, int]:
        assert self.logs is not None
        name, step = case.link.rsplit("@", 1)
        return Recording.read(self.logs / f"{name}.json"), int(step)

    def _known_link(self, case: Case, url: str) -> AbstractContextManager[Any]:
        """Of a shaped link nothing is known, as at the first contact; of a recorded one, what it gave until now.

        Otherwise the first plan, which some cases keep, would be made without any rate.
        """
        known = {}
        if case.falls_to is not None:
            recording, step = self._recording(case)
            known[url] = recording.known(step) * 1e6 / 8
        return mock.patch.dict(sparkv_cache._last_goodput, known, clear=True)

    @contextlib.contextmanager
    def _frozen_plan(self, frozen: bool) -> Iterator[None]:
        """The first plan stays, and nothing that it leaves to the stream is computed while the link is alive."""
        with contextlib.ExitStack() as patches:
            if frozen:
                patches.enter_context(mock.patch.object(loader, "_MAX_PLANS", 1))
            yield

    def _keep_timeline(self, row: dict[str, Any], arrivals: Iterable[Iterable[Any]]) -> None:
        """Keep, for each of our planners, the arrivals of the load over a shaped link that both paths shared best."""
        lines = [f"{seconds:.3f} {chunk} {layer} {route}" for seconds, chunk, layer, route in arrivals]
        if row["planner"] not in OURS or row["falls_to"] is not None or not lines:
            return
        evenness = min(sum(line.endswith(route) for line in lines) for route in ("computed", "streamed")) / len(lines)
        if evenness > self.timelines.get(row["planner"], {"evenness": -1})["evenness"]:
            self.timelines[row["planner"]] = {**row, "evenness": evenness, "arrivals": lines}

    def recorded(self, context: int) -> list[Case]:
        """Two cases for each log with a drop, with and without re-planning; `Recording.before_drop` says where."""
        assert self.logs is not None
        with tempfile.TemporaryDirectory() as folder:  # a dry run computes one chunk, to know its size
            config = {"codec": self.codec, "chunk_tokens": CHUNK_TOKENS}
            size = kvsched.publish(self.model, self.ids[:, :context], folder, config, dry_run=True).bytes_written
        compute, megabits = self._compute_seconds(context), size * 8e-6
        known: dict[Case, float] = {}
        for log in sorted(self.logs.glob("*.json")):
            recording = Recording.read(log)
            if found := recording.before_drop(float(compute.sum()), megabits):
                link, falls_to = f"{log.stem}@{found[0]}", round(found[1], 3)
                self.possible[link] = recording.possible_gain(found[0], compute, megabits)
                for replan in (True, False):
                    case = Case(context, link, RECORDED_RTT_MS, "optimal", replan, falls_to)
                    known[case] = recording.known(found[0])
        # Slow links last: a plan that is kept takes minutes on them.
        return sorted(known, key=lambda case: -known[case])

    def _count_round_trips(self, folder: Path, context: int) -> dict[str, dict[str, int]]:
        """Round trips and requests before bytes flow, for a prompt that is published and for one that is not."""
        counted = {}
        prompt = self._prompt(context)
        for name, ids in (("hit", prompt), ("miss", (prompt + 1) % self.model.config.vocab_size)):
            rounds = Rounds(folder)
            with rounds.running() as url:
                options = {"store": url, "codec": self.codec, "chunk_tokens": CHUNK_TOKENS, "planner": "stream"}
                kvsched.SparKVCache(self.model.config, options).load(self.model, ids)
            counted[name] = {"chunks": context // CHUNK_TOKENS, **rounds.before_bytes_flow()}
        return counted

    def write(self) -> None:
        """Keep everything measured so far, and what follows from it."""
        result = {
            "settings": self.settings,
            "verdicts": self.verdicts(),
            "cases": summary(self.rows),
            "wire": self.wire,
            "possible": self.possible,
            "timelines": self.timelines,
            "rows": self.rows,
        }
        keep(self.out, "sparkv_bench", result)

    def verdicts(self) -> dict[str, Any]:
        """What the results so far say about the targets."""
        found = verdicts(self.rows)
        if "S5" in found and self.possible:
            found["S5"]["possible_median"] = statistics.median(self.possible.values())
        if self.wire:
            trips = {name: counted["round_trips"] for name, counted in self.wire.items()}
            found["S9"] = {**self.wire, "met": trips["hit"] <= 2 and trips["miss"] <= 1}
        return found


def schedule(
    contexts: list[int], repeats: list[int], mbits: list[str], rtts: list[float], planners: list[str]
) -> list[Case]:
    """Every request over shaped links, in order: a context after the other, each with its own number of repeats.

    Within a repeat the planners of a cell stand side by side. Who is first changes from cell to cell and from repeat to
    repeat, so that a machine that drifts favours nobody. A local prefill knows no round trip: it is measured with the
    first of them.
    """
    order = []
    for context, count in zip(contexts, repeats, strict=True):
        for repeat in range(count):
            cells = [(mbit, rtt) for mbit in mbits for rtt in rtts]
            for index, (mbit, rtt) in enumerate(cells):
                first = (index + repeat) % len(planners)
                turn = planners[first:] + planners[:first]
                order += [Case(context, mbit, rtt, name) for name in turn if name != "local" or rtt == rtts[0]]
    return order


def summary(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Median and spread of every case."""
    return {
        key: {
            **{name: done[0][name] for name in ("context", "link", "rtt_ms", "planner", "replan")},
            "ttft": statistics.median(row["ttft"] for row in done),
            "spread": [min(row["ttft"] for row in done), max(row["ttft"] for row in done)],
            "runs": len(done),
        }
        for key, done in rows.items()
        if done
    }


def document(tokenizer: Any, tokens: int) -> torch.Tensor:
    """Real text of `tokens` tokens `[1, tokens]`: chapters of the Python language reference."""
    text = "\n\n".join(topics[name] for name in sorted(topics, key=lambda name: -len(topics[name])))
    return tokenizer(text, return_tensors="pt").input_ids[:, :tokens]


def per_context(repeats: str, contexts: list[int]) -> list[int]:
    """One number of repeats for each context, from one for all or a list.

    Raises:
        typer.BadParameter: there are neither one nor as many as contexts.
    """
    counts = [int(count) for count in repeats.split(",")]
    if len(counts) not in (1, len(contexts)):
        raise typer.BadParameter(f"--repeats {repeats}: give one number, or one for each of {len(contexts)} contexts.")
    return counts if len(counts) == len(contexts) else counts * len(contexts)


def main(
    json_path: Annotated[Path, typer.Option("--json", help="Where results go, and are taken up.")] = Path(
        "evals/results/sparkv.json"
    ),
    contexts: Annotated[str, typer.Option(help="Prompt lengths in tokens, measured in this order.")] = "2048,8192",
    mbits: Annotated[str, typer.Option(help="Rates of the link.")] = "1,2,4,8,16,32,64",
    rtts: Annotated[str, typer.Option(help="Round trips in milliseconds.")] = "10,50",
    planners: Annotated[
        str, typer.Option(help="What divides the work; progressive is optimal with that codec.")
    ] = "local,stream,token_split,optimal",
    codec: Annotated[str, typer.Option(help="How chunks are written.")] = "balanced",
    links: Annotated[Path | None, typer.Option(help="Folder of recorded links, as JSON lists of steps.")] = None,
    shaper: Annotated[
        Literal["relay", "tc"], typer.Option(help="What slows shaped links: a relay, or the kernel, which needs root.")
    ] = "relay",
    repeats: Annotated[str, typer.Option(help="Runs of every case: one number, or one for each context.")] = "3",
) -> None:
    """Measure the time to the first token over shaped links, and over recorded ones with and without re-planning."""
    transformers_logging.set_verbosity_error()
    sizes = [int(size) for size in contexts.split(",")]
    counts = per_context(repeats, sizes)
    model, tokenizer = kvsched.load_model()
    order = schedule(sizes, counts, mbits.split(","), [float(rtt) for rtt in rtts.split(",")], planners.split(","))
    with Namespace() if shaper == "tc" else contextlib.nullcontext() as namespace:
        bench = Bench(model, document(tokenizer, max(sizes)), codec, links, json_path, namespace)
        if links is not None:
            # The longest context: its loads last long enough for a link to fall under way.
            order += bench.recorded(max(sizes)) * counts[sizes.index(max(sizes))]
        bench.run(order)
    for target, verdict in bench.verdicts().items():
        typer.echo(f"{target}: {json.dumps(verdict['met'] if target == 'S7' else verdict)}")  # the rest is long
    from .sparkv_plots import draw

    for picture in draw(json_path):
        typer.echo(f"drawn: {picture}")


if __name__ == "__main__":
    typer.run(main)
