"""A peer that nobody here wrote: kvpress answers a suite's generated questions, in an environment of its own.

kvpress wants an older transformers than kvsched, so it gets a virtual environment, made once in the user's cache
folder. It prunes a prompt's keys for good, to a share of the tokens; `policy` is the name of its press.

```sh
python -m kvsched_evals.kvpress_peer smoke --out evals/results/smoke-kvpress.jsonl
```
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import torch
import typer
from filelock import FileLock
from tqdm import tqdm

import kvsched
from kvsched.errors import KVSchedError, PackageError

from .machine import describe
from .measure import MeasuredLM, Prompts, equal_prefix, scored
from .results import Cell, Header, Question, ResultFile
from .run import build, mirrors, quiet
from .suite import Suite, Variant

REQUIREMENT = "kvpress==0.5.5"
WORKER = Path(__file__).with_name("kvpress_worker.py")


def environment() -> Path:
    """The interpreter of an environment that holds kvpress, made unless it is there.

    Raises:
        PackageError: it could not be installed.
    """
    folder = platformdirs.user_cache_path("kvsched") / "evals" / REQUIREMENT.replace("==", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    python, done = folder / "bin" / "python", folder / "installed"
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            venv.create(folder, clear=True, with_pip=True)
            torch_here = f"torch=={torch.__version__.partition('+')[0]}"
            command = [str(python), "-m", "pip", "install", "--quiet", torch_here, REQUIREMENT]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                raise PackageError(f"cannot install {REQUIREMENT} in {folder}: {ran.stderr.strip()[-500:]}")
            done.touch()
    return python


def answers(
    model: str, press: str, budget: float, prompts: list[tuple[list[int], int, list[str]]]
) -> Iterator[dict[str, Any]]:
    """What `kvpress_worker` says of each prompt, as it comes."""
    asked = {"model": model, "press": press, "budget": budget, "prompts": prompts}
    with subprocess.Popen(
        [environment(), WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(json.dumps(asked))
        worker.stdin.close()
        yield from map(json.loads, worker.stdout)
    if worker.returncode:
        raise PackageError(f"kvpress ended with {worker.returncode}: run {WORKER} by hand to see why.")


def main(
    suite: Annotated[str, typer.Argument(help="A suite of configs/evals, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="The result file.")],
    press: Annotated[str, typer.Option(help="A class of kvpress.")] = "SnapKVPress",
    budget: Annotated[float, typer.Option(help="Share of the prompt's tokens that it keeps.", min=0.01, max=1)] = 0.1,
    limit: Annotated[int | None, typer.Option(help="Questions of each task at most.", min=1)] = None,
) -> None:
    """Ask a suite's questions, those with generated answers, through kvpress."""
    try:
        ask_all(Suite.load(suite).limited(limit), out, press, budget)
    except KVSchedError as error:
        typer.echo(f"kvsched: {error}", err=True)
        raise typer.Exit(1) from error


def ask_all(suite: Suite, out: Path, press: str, budget: float) -> None:
    """Ask what is not in `out` yet, task by task."""
    model, tokenizer = kvsched.load_model()
    lm = MeasuredLM(model, tokenizer, Variant("full"), Prompts())
    cells = {
        group: Cell(suite.name, group[0].task, group[1], "kvpress", press, budget, None, group[2])
        for group in suite.groups
    }
    header = Header(
        version=version("kvsched"),
        suite=suite.name,
        command=shlex.join(["python", "-m", "kvsched_evals.kvpress_peer", *sys.argv[1:]]),
        model=Path(model.name_or_path).name,
        seeds=suite.seeds,
        cells=list(cells.values()),
        machine=describe() | {"peer": REQUIREMENT},
    )
    file = ResultFile(out.resolve(), header)
    with quiet(), mirrors():
        for (entry, context, seed), cell in cells.items():
            task, questions = build(entry, context, seed, lm)
            known = {one.question for one in file.questions if one.cell == cell}
            left = {number: asked[0] for number, asked in questions.items() if number not in known}
            if task.OUTPUT_TYPE != "generate_until" or not left:
                continue
            prompts = [
                (lm.tok_encode(one.args[0]), one.args[1]["max_gen_toks"], one.args[1]["until"]) for one in left.values()
            ]
            found = answers(model.name_or_path, press, budget, prompts)
            for (number, asked), row in zip(left.items(), tqdm(found, desc=entry.task, total=len(left)), strict=True):
                text = lm.tok_decode(row["tokens"])
                for end in asked.args[1]["until"]:
                    text = text.partition(end)[0]
                metric, score = scored(task, [asked], [text], context)
                file.append(
                    Question(
                        **{name: getattr(cell, name) for name in Cell.__dataclass_fields__},
                        question=number,
                        metric=metric,
                        score=score,
                        prompt_tokens=len(lm.tok_encode(asked.args[0])),
                        answer_tokens=len(row["tokens"]),
                        answer=text,
                        equal_prefix=equal_prefix(row["tokens"], row["reference"]),
                        bytes_read=0,
                        joules=None,
                        **{name: row[name] for name in ("logprob", "full_logprob", "kl")},
                        **{name: row[name] for name in ("prefill_seconds", "seconds", "dram_bytes")},
                    )
                )
    file.finish()


if __name__ == "__main__":
    typer.run(main)
