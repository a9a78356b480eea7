"""Result files of quality runs: JSON lines, a header, one line for each finished question of each cell, and a footer.

A run appends; interrupted, it goes on where it was. What is read for a report has to be whole and of this format.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

import kvsched.errors

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ResultError(kvsched.errors.KVSchedError, ValueError):
    """A result file that is unfinished, damaged, of another format, or from another run."""


@dataclass(frozen=True)
class Cell:
    """What is the same for all questions that are averaged.

    Args:
        suite: name of the suite.
        task: name of the lm-eval task.
        context: tokens that the task's prompts are made to fill; `None` where a prompt is as long as it is.
        cache: `full`, `dynakv`, `sparkv`, `sparkv+dynakv`, or a peer: `hf-quantized`, `kvpress`.
        policy: of `dynakv`; a press of `kvpress`.
        budget: share of the prompt's tokens, beside sinks and recent ones, that take part in a step.
        codec: of `sparkv`; a peer's way to round.
        seed: of the questions and of everything random.
    """

    suite: str
    task: str
    context: int | None
    cache: str
    policy: str | None
    budget: float | None
    codec: str | None
    seed: int


@dataclass(frozen=True)
class Question(Cell):
    """A question answered through one cache.

    The reference tokens are the full cache's answer, or the continuations that a task has scored. Every cache is made
    to read them, token by token where its `score_chunk` is 1.

    Args:
        question: its number in the task; the same in all cells that ask it.
        metric: lm-eval's name of the score; `logprob` where a task scores continuations without right or wrong.
        score: more is better; of `logprob` the mean over the reference tokens.
        prompt_tokens, answer_tokens: of the prompt, and generated or scored after it.
        answer: the text generated, or `None`.
        logprob: natural logarithm of each reference token's probability through this cache.
        full_logprob: the same through the full cache.
        kl: Kullback-Leibler divergence in nats of the full cache's next-token distribution from this cache's, at each
            reference token.
        equal_prefix: tokens until the answer parts from the full cache's; `None` where nothing is generated.
        prefill_seconds: for the prompt, computed once for all caches.
        seconds: for everything else: to take the prompt in or load it, and to answer.
        bytes_read: from flash or from the store.
        dram_bytes: that the cache holds in memory after the answer.
        joules: that the machine's counters measured in `seconds`, or `None` where it has none.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    question: str
    metric: str
    score: Finite
    prompt_tokens: Count
    answer_tokens: Count
    answer: str | None
    logprob: list[Finite]
    full_logprob: list[Finite]
    kl: list[Finite]
    equal_prefix: Count | None
    prefill_seconds: Seconds
    seconds: Seconds
    bytes_read: Count
    dram_bytes: Count
    joules: Finite | None

    @property
    def cell(self) -> Cell:
        """The cell that it belongs to."""
        return Cell(**{field.name: getattr(self, field.name) for field in fields(Cell)})


class Header(BaseModel):
    """The first line: what ran, of which version, on which machine.

    Args:
        format: of this file.
        version: of kvsched.
        suite: name of the suite.
        command: that wrote the file, and that goes on with it.
        limit: of questions of each task, context and seed; `None` where they are as many as the suite says.
        model: name or folder.
        seeds: of the questions.
        cells: all cells of the run.
        machine: as `kvsched_evals.machine.describe` gives it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    version: str
    suite: str
    command: str
    limit: Annotated[int, Field(ge=1)] | None = None
    model: str
    seeds: list[int]
    cells: list[Cell]
    machine: dict[str, Any]


class _End(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lines: Count


class _Footer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    end: _End


_QUESTION = TypeAdapter(Question)


@dataclass(frozen=True)
class Results:
    """A whole result file."""

    header: Header
    questions: list[Question]


def read(path: Path) -> Results:
    """Read a finished result file.

    Raises:
        ResultError: it is missing, unfinished, damaged, or of another format or version.
    """
    header, questions, finished = _parse(path)
    if header.version != version("kvsched"):
        raise ResultError(
            f"{path} was measured with kvsched {header.version}, this is {version('kvsched')}: measure again with its "
            f"command: {header.command}"
        )
    if not finished:
        raise ResultError(f"{path} is unfinished: run its command again to go on with it: {header.command}")
    return Results(header, questions)


class ResultFile:
    """A result file that a run writes, a new one or one that it goes on with.

    Args:
        path: the file; its folder is made.
        header: of this run. A file that another version, suite or command began is refused; one with another
            limit, which it has not gone beyond, is gone on with and is this run's from then on.

    Raises:
        ResultError: the file belongs to another run, or is damaged.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._path = path
        self.questions: list[Question] = []
        self.finished = False
        if path.exists() and b"\n" in path.read_bytes():
            found, self.questions, self.finished = _parse(path)
            _same_run(path, found, header, self.questions)
            if found.limit != header.limit:
                self._take_over(header)
            elif not self.finished:
                _drop_half_line(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(header.model_dump_json() + "\n", encoding="utf-8")

    def _take_over(self, header: Header) -> None:
        lines = self._path.read_bytes().split(b"\n")[1 : 1 + len(self.questions)]
        grown = self._path.with_name(f"{self._path.name}.grown")
        with grown.open("wb") as file:
            file.writelines(line + b"\n" for line in (header.model_dump_json().encode(), *lines))
            file.flush()
            os.fsync(file.fileno())
        grown.replace(self._path)
        self.finished = False

    def append(self, question: Question) -> None:
        """Write a finished question; it is on the disk when this returns."""
        self._write(_QUESTION.dump_json(question))
        self.questions.append(question)

    def finish(self) -> None:
        """Write the footer, without which nobody averages the file."""
        if not self.finished:
            self._write(_Footer(end=_End(lines=len(self.questions))).model_dump_json().encode())
            self.finished = True

    def _write(self, line: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _same_run(path: Path, found: Header, header: Header, questions: Iterable[Question]) -> None:
    names = ["version", "suite", "model", "seeds", "cells"]
    if found.limit == header.limit:
        names.append("command")
    for name in names:
        if getattr(found, name) != getattr(header, name):
            raise ResultError(
                f"{path} was begun with another {name}. Write to another file with --out, or delete this one."
            )
    asked = max(Counter(one.cell for one in questions).values(), default=0)
    if header.limit is not None and asked > header.limit:
        raise ResultError(f"{path} holds {asked} questions of a task already. Write to another file with --out.")


def _drop_half_line(path: Path) -> None:
    data = path.read_bytes()
    os.truncate(path, data.rfind(b"\n") + 1)


def _parse(path: Path) -> tuple[Header, list[Question], bool]:
    """Header, questions, and whether the footer is there; of an unfinished file the half-written last line is left."""
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ResultError(f"cannot read the results in {path}: {error}") from error
    if not lines:
        raise ResultError(f"{path} is no result file: it holds not one whole line. Run `kvsched eval run` to make one.")
    number = 1  # of the line that is being read
    try:
        header = Header.model_validate_json(lines[0])
        finished = len(lines) > 1 and lines[-1].startswith(b'{"end":')
        body = lines[1:-1] if finished else lines[1:]
        questions: list[Question] = []
        for line in body:
            number += 1
            questions.append(_QUESTION.validate_json(line, strict=True))
        if finished:
            number += 1
            _check_end(_Footer.model_validate_json(lines[-1]), questions, header.cells, rest)
    except (ValidationError, ResultError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ResultError(
            f"{path}, line {number}: {problem}. It is damaged or of another version of kvsched: measure again."
        ) from error
    return header, questions, finished


def _check_end(footer: _Footer, questions: Iterable[Question], cells: Iterable[Cell], rest: bytes) -> None:
    named = [(one.cell, one.question) for one in questions]
    if rest or footer.end.lines != len(named) or len(set(named)) != len(named):
        raise ResultError("the file does not hold each of the lines that its end counts once")
    if {cell for cell, _ in named} - set(cells):
        raise ResultError("a line belongs to no cell of the header")
