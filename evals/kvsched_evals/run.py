"""`kvsched eval run`: asks every question of a suite through all of its caches, and keeps what came out."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kvsched.errors import DataNotFoundError

from . import data, peers
from .machine import describe
from .measure import MeasuredLM, ask
from .results import Cell, Header, Question, ResultFile
from .suite import Suite, TaskEntry

Show = Callable[[str], None]


def run(
    suite: Suite,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    command: str,
    show: Show = print,
    limit: int | None = None,
) -> list[Question]:
    """Ask what a suite asks, or what is left of it, and write each finished question to `path`.

    Each task's first question goes through all caches before any task's second, so that a run which is broken off has
    asked as much of every task.

    Args:
        command: that started the run; it stands in the file.
        show: takes a line for each finished cell.
        limit: of questions of each task, context and seed. Another one goes on with a file that it asks all of.

    Raises:
        DataNotFoundError: a task's data is not on this machine.
        PackageError: a peer has no environment on this machine.
        ResultError: `path` holds the results of another run.
    """
    suite, machine = suite.limited(limit), describe()
    machine["versions"] |= peers.versions(suite.variants)
    header = Header(
        version=version("kvsched"),
        suite=suite.name,
        command=command,
        limit=limit,
        model=Path(model.name_or_path).name,
        seeds=suite.seeds,
        cells=suite.cells,
        machine=machine,
    )
    file = ResultFile(path.resolve(), header)
    if not file.finished:
        with quiet(), mirrors(), peers.opened(model, tokenizer, suite.variants) as models:
            _ask_all(suite, models, file, show)
        file.finish()
    return file.questions


def _ask_all(suite: Suite, models: list[MeasuredLM], file: ResultFile, show: Show) -> None:
    finished = {(one.cell, one.question) for one in file.questions}
    groups = [_Group(suite, models, *group) for group in suite.groups]
    total = sum(group.entry.limit for group in groups) * len(models)
    with tqdm(total=total, desc=suite.name, unit="answer", file=sys.stderr) as bar:
        for turn in range(max(group.entry.limit for group in groups)):
            for group in groups:
                if turn >= group.entry.limit:
                    continue
                if turn >= len(group.questions):  # a task may have fewer
                    bar.total = (bar.total or 0) - len(models)
                    continue
                group.ask(turn, file, finished, bar)
                if turn + 1 == min(group.entry.limit, len(group.questions)):
                    bar.clear()
                    for cell, lm in zip(group.cells, models, strict=True):
                        show(summary(cell, lm.variant, [one for one in file.questions if one.cell == cell]))


class _Group:
    """The questions of one task, context and seed, and the cells in which they are asked."""

    def __init__(
        self, suite: Suite, models: list[MeasuredLM], entry: TaskEntry, context: int | None, seed: int
    ) -> None:
        self.entry, self._models = entry, models
        self.cells = [suite.cell(entry.task, context, seed, lm.variant) for lm in models]

    @functools.cached_property
    def _built(self) -> tuple[Task, dict[str, list[Instance]]]:
        """Made when it is needed, since that takes up to a minute."""
        return build(self.entry, self.cells[0].context, self.cells[0].seed, self._models[0])

    @functools.cached_property
    def questions(self) -> list[str]:
        """Their numbers in the task."""
        return list(self._built[1])

    def ask(self, turn: int, file: ResultFile, finished: set[tuple[Cell, str]], bar: tqdm[Any]) -> None:
        """Ask a question through all caches that have not answered it yet."""
        number, full = self.questions[turn], self._models[0]
        task, questions = self._built
        left = {cell for cell in self.cells if (cell, number) not in finished}
        bar.update(len(self.cells) - len(left))
        for lm, cell in zip(self._models, self.cells, strict=True):
            if cell in left or (left and lm is full):  # whose answer all others are compared with
                answered = ask(lm, task, questions[number], full, cell)
            if cell in left:
                file.append(answered)
                bar.update()


def build(entry: TaskEntry, context: int | None, seed: int, lm: MeasuredLM) -> tuple[Task, dict[str, list[Instance]]]:
    """A task and its questions: for each, by its number in the task, what is asked of the model.

    Raises:
        DataNotFoundError: the task's data is not on this machine.
    """
    random.seed(seed)  # RULER makes its questions up as it is loaded
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        task = _manager(str(data.TASKS), lm.model.name_or_path, context).load([entry.task])["tasks"][entry.task]
    except (OSError, KeyError) as error:
        raise DataNotFoundError(
            f"the task {entry.task} cannot be loaded: {error}. If its data is missing, run `{data.COMMAND}`."
        ) from error
    if entry.num_fewshot is not None or task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", entry.num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)
    if entry.max_gen_toks is not None and task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", {"max_gen_toks": entry.max_gen_toks}, update=True)
    task.build_all_requests(
        limit=entry.limit,
        rank=0,
        world_size=1,
        apply_chat_template=entry.chat,
        chat_template=lm.apply_chat_template if entry.chat else None,
        tokenizer_name=lm.tokenizer_name,
    )
    questions: dict[str, list[Instance]] = {}
    for instance in task.instances:
        if entry.max_gen_toks is not None and task.OUTPUT_TYPE == "loglikelihood":
            before, scored = instance.arguments
            instance.arguments = before, lm.tok_decode(lm.tok_encode(scored)[: entry.max_gen_toks])
        questions.setdefault(str(instance.doc_id), []).append(instance)
    return task, questions


@functools.cache
def _manager(folder: str, model: str, context: int | None) -> TaskManager:
    """lm-eval's tasks and those of a folder; to list them takes seconds."""
    lengths = {} if context is None else {"max_seq_lengths": [context]}
    return TaskManager(include_path=folder, metadata={"pretrained": model, **lengths})


def summary(cell: Cell, name: object, questions: list[Question]) -> str:
    """A finished cell in one line."""
    scores = [one.score for one in questions]
    error = f" ± {statistics.stdev(scores) / math.sqrt(len(scores)):.3f}" if len(scores) > 1 else ""
    divergence = statistics.fmean(value for one in questions for value in one.kl)
    seconds = statistics.fmean(one.seconds for one in questions)
    length = "" if cell.context is None else f" {cell.context}"
    return (
        f"{cell.task}{length}, {name}: {questions[0].metric} {statistics.fmean(scores):.3f}{error} "
        f"of {len(scores)}, KL {divergence:.4f}, {seconds:.1f} s"
    )


@contextlib.contextmanager
def mirrors() -> Iterator[None]:
    """The mirrors where they are; tasks that need no data run without."""
    try:
        data.directory()
    except DataNotFoundError:
        yield
        return
    with data.mirrored():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress and warnings of the libraries underneath, which would drown a run of hours."""
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
