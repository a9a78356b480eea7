"""What a report is made from: results of suites, rows of replays and codec benchmarks; what is not whole is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from kvsched.replay import Row

from . import results
from .results import ResultError


class _Measured(BaseModel):
    mean: results.Finite


class _Codec(BaseModel):
    ratio: _Measured
    kl: _Measured
    top1: _Measured
    decode_mb_s: _Measured


class Machine(BaseModel):
    """What `kvsched_evals.machine.describe` said."""

    processor: str
    cores: int
    memory_gib: float
    accelerator: str | None
    versions: dict[str, str]
    time: str

    def lines(self) -> dict[str, str]:
        """For the head of a page."""
        kind = f"{self.processor}, {self.cores} cores, {self.memory_gib} GiB"
        if self.accelerator is not None:
            kind += f", {self.accelerator}"
        found = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return {"machine": kind, "versions": found, "time": self.time}


class CodecBenchmark(BaseModel):
    """What is read of the JSON that `make bench-codec` writes."""

    command: str
    machine: Machine
    context_tokens: int
    following_tokens: int
    codecs: dict[str, _Codec]
    runs: dict[str, list[Any]]


@dataclass(frozen=True)
class Input:
    """What was read from all files: finished runs, rows of replays, and codec benchmarks."""

    runs: list[results.Results]
    rows: list[Row]
    codecs: list[CodecBenchmark]

    @property
    def questions(self) -> list[results.Question]:
        """Of all runs."""
        return [question for run in self.runs for question in run.questions]

    def sources(self) -> list[dict[str, str]]:
        """Where the numbers are from, for the head of a page."""
        headers = [run.header for run in self.runs]
        sources = [
            {"suite": one.suite, "model": one.model, "seeds": ", ".join(map(str, one.seeds)), "command": one.command}
            | Machine.model_validate(one.machine).lines()
            for one in headers
        ]
        sources += [{"command": one.command} | one.machine.lines() for one in self.codecs]
        if self.rows:
            sources.append({"replayed": f"{len(self.rows)} rows of kvsched trace replay"})
        return sources


def read_files(files: Sequence[Path]) -> Input:
    """Read every file as what it is.

    Raises:
        ResultError: a file is unfinished, damaged, of another version or no result; or two do not go together.
    """
    read = Input([], [], [])
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ResultError(f"cannot read the results in {path}: {error}") from error
        if text.startswith("["):
            read.rows.extend(_replayed(path, text))
        elif (benchmark := _benchmark(path, text)) is not None:
            read.codecs.append(benchmark)
        else:
            read.runs.append(_run(path))
    _check_together(read)
    return read


def _run(path: Path) -> results.Results:
    run = results.read(path)
    try:
        Machine.model_validate(run.header.machine)
    except ValidationError as error:
        raise ResultError(f"{path} does not say what machine it was measured on: it is damaged.") from error
    return run


def _replayed(path: Path, text: str) -> list[Row]:
    try:
        rows = TypeAdapter(list[Row]).validate_json(text, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ResultError(f"{path}: {problem}. Write it again: kvsched trace replay TRACE --json {path}.") from error
    if not rows:
        raise ResultError(f"{path} holds no rows: run `kvsched trace replay TRACE --json {path}` again.")
    return rows


def _benchmark(path: Path, text: str) -> CodecBenchmark | None:
    """The results of `make bench-codec`; `None` for JSON lines."""
    if text[:2] not in ("{\n", "{\r"):  # one object over many lines, as benchmarks write it
        return None
    try:
        found = CodecBenchmark.model_validate_json(text)
    except ValidationError as error:
        raise ResultError(f"{path} is damaged or not from `make bench-codec`: run that again.") from error
    measured = found.machine.versions.get("kvsched")
    if measured != version("kvsched"):
        raise ResultError(
            f"{path} was measured with kvsched {measured}, this is {version('kvsched')}: run `make bench-codec` again."
        )
    return found


def _check_together(read: Input) -> None:
    """Refuse runs whose questions cannot stand side by side."""
    if len(models := {run.header.model for run in read.runs}) > 1:
        raise ResultError(f"these are results of another model each: {', '.join(sorted(models))}. Report them apart.")
    asked = [(one.cell, one.question) for one in read.questions]
    if len(set(asked)) < len(asked):
        raise ResultError("two files answer the same question through the same cache. Leave one of them out.")
