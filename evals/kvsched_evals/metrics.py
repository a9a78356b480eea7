"""What is said of a cell of results: means with their standard errors, and differences over the same questions.

Two means side by side hide that the same questions were asked: a difference here is the mean over questions of one
cache's number less the full cache's, with an interval by bootstrap over these questions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .results import Cell, Question

RESAMPLES, CONFIDENCE, SEED = 10_000, 0.95, 0
NGRAM = 4  # words; what a text that has begun to repeat itself has few different ones of
POINT = 0.01  # a score this much lower counts as the same, as does one within its standard error

Key = tuple[str, str, int | None, int, str, str]


@dataclass(frozen=True)
class Mean:
    """A mean over questions and its standard error; `error` is 0 for a single question."""

    value: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of at least one number."""
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return cls(float(np.mean(values)), error, len(values))


@dataclass(frozen=True)
class Difference(Mean):
    """A mean of differences over the same questions, and the interval that bootstrap gives it.

    Args:
        low, high: ends of the interval, at `CONFIDENCE`.
    """

    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Difference:
        """Of at least one difference; questions are drawn with replacement, the same draws for every call."""
        drawn = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
        means = np.asarray(values, dtype=float)[drawn].mean(1)
        low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        mean = Mean.of(values)
        return cls(mean.value, mean.error, mean.count, float(low), float(high))

    @property
    def as_good(self) -> bool:
        """Whether a score is within a point or the standard error of the full cache's, whichever is larger."""
        return self.value >= -max(POINT, self.error)


@dataclass(frozen=True)
class Summary:
    """All that is said of one cell. Numbers that a cell does not have are `None`.

    Args:
        cell: with 0 for the seeds that it is the mean over.
        metric: lm-eval's name of the score.
        score: of the task; of `logprob` the mean log-probability of a reference token.
        change: of the score from the full cache's.
        logprob: change of a reference token's mean log-probability from the full cache's, in nats.
        kl: divergence of the next token's distribution from the full cache's, mean over reference tokens, in nats.
        equal_prefix: share of the answer before it parts from the full cache's.
        diversity: share of the answer's runs of four words that are different from each other.
        length: tokens of the answer.
        prompt_tokens: of the prompt.
        seconds: to take the prompt in or load it, and to answer; `prefill_seconds` come before, for all caches.
        bytes_read: from flash or store, for each question.
        dram_bytes: held in memory after the answer.
        joules: measured.
    """

    cell: Cell
    metric: str
    score: Mean
    change: Difference | None
    logprob: Difference | None
    kl: Mean | None
    equal_prefix: Mean | None
    diversity: Mean | None
    length: Mean
    prompt_tokens: Mean
    prefill_seconds: Mean
    seconds: Mean
    bytes_read: Mean
    dram_bytes: Mean
    joules: Mean | None


def summarise(questions: Iterable[Question]) -> list[Summary]:
    """One summary for each cell and metric, in the order in which they first appear; the full cache's come first.

    A question of another seed is another question: cells that differ in their seed alone are one.
    """
    cells: dict[tuple[Cell, str], list[Question]] = defaultdict(list)
    for one in questions:
        cells[replace(one.cell, seed=0), one.metric].append(one)
    full = {_key(one): one for own in cells.values() for one in own if one.cache == "full"}
    ordered = sorted(cells.items(), key=lambda item: item[0][0].cache != "full")
    return [_summary(cell, metric, own, full) for (cell, metric), own in ordered]


def _summary(cell: Cell, metric: str, own: list[Question], full: Mapping[Key, Question]) -> Summary:
    pairs = [(one, full[_key(one)]) for one in own if _key(one) in full] if cell.cache != "full" else []
    read = [one for one in own if one.logprob]
    generated = [one for one in own if one.equal_prefix is not None and one.answer_tokens]
    texts = [diversity(one.answer) for one in own if one.answer is not None]
    joules = [one.joules for one in own if one.joules is not None]
    return Summary(
        cell=cell,
        metric=metric,
        score=Mean.of([one.score for one in own]),
        change=Difference.over([one.score - other.score for one, other in pairs]) if pairs else None,
        logprob=Difference.over([np.mean(one.logprob) - np.mean(one.full_logprob) for one in read]) if read else None,
        kl=_mean([float(np.mean(one.kl)) for one in own if one.kl]),
        equal_prefix=_mean([min(1.0, (one.equal_prefix or 0) / one.answer_tokens) for one in generated]),
        diversity=_mean([one for one in texts if one is not None]),
        length=Mean.of([one.answer_tokens for one in own]),
        prompt_tokens=Mean.of([one.prompt_tokens for one in own]),
        prefill_seconds=Mean.of([one.prefill_seconds for one in own]),
        seconds=Mean.of([one.seconds for one in own]),
        bytes_read=Mean.of([one.bytes_read for one in own]),
        dram_bytes=Mean.of([one.dram_bytes for one in own]),
        joules=_mean(joules),
    )


def diversity(text: str) -> float | None:
    """Share of a text's runs of four words that are different from each other; `None` for fewer than four words."""
    words = text.split()
    runs = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return len(set(runs)) / len(runs) if runs else None


def by_position(questions: Iterable[Sequence[float]], width: int) -> list[tuple[int, Mean]]:
    """Numbers of each token as decoding goes on: positions in steps of `width` tokens, and the mean over questions."""
    bins: dict[int, list[float]] = defaultdict(list)
    for values in questions:
        for start in range(0, len(values), width):
            bins[start].append(float(np.mean(values[start : start + width])))
    return [(start, Mean.of(values)) for start, values in sorted(bins.items())]


def label(cell: Cell) -> str:
    """What a cell is called in a table or a legend, without its task."""
    parts = [cell.policy or cell.cache if cell.cache in ("dynakv", "kvpress") else cell.cache]
    if cell.cache == "sparkv+dynakv" and cell.policy not in (None, "dynakv"):
        parts.append(str(cell.policy))
    if cell.codec is not None:
        parts.append(cell.codec)
    if cell.budget is not None:
        parts.append(f"{100 * cell.budget:g} %")
    return " ".join(parts)


def without_budget(cell: Cell) -> Cell:
    """The cell as a point of a line over budgets."""
    return replace(cell, budget=None)


def _mean(values: Sequence[float]) -> Mean | None:
    return Mean.of(values) if values else None


def _key(one: Question) -> Key:
    return one.suite, one.task, one.context, one.seed, one.question, one.metric
