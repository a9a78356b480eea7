"""Metrics against the same numbers by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsched_evals.metrics import POINT, Difference, Mean, by_position, diversity, label, summarise, without_budget
from kvsched_evals.results import Cell, Question

FULL = Cell("smoke", "task", 4096, "full", None, None, None, 0)
DYNAKV = replace(FULL, cache="dynakv", policy="dynakv", budget=0.1)


def question(cell: Cell, number: int, score: float, **changes: object) -> Question:
    made = Question(
        **vars(cell),
        question=str(number),
        metric="acc",
        score=score,
        prompt_tokens=100,
        answer_tokens=4,
        answer="a b c d",
        logprob=[-1.0, -2.0],
        full_logprob=[-1.0, -1.5],
        kl=[0.0, 0.25],
        equal_prefix=2,
        prefill_seconds=2.0,
        seconds=1.0,
        bytes_read=10,
        dram_bytes=1000,
        joules=None,
    )
    return replace(made, **changes)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=20))
def test_mean_and_standard_error(values: list[float]) -> None:
    mean = Mean.of(values)
    average = sum(values) / len(values)
    variance = sum((value - average) ** 2 for value in values) / (len(values) - 1)
    assert mean.value == pytest.approx(average, abs=1e-12)
    assert mean.error == pytest.approx(math.sqrt(variance / len(values)), abs=1e-9)
    assert mean.count == len(values)


def test_the_bootstrap_interval_is_that_of_a_normal_mean() -> None:
    values = np.random.default_rng(1).normal(0.3, 1, 400).tolist()
    found = Difference.over(values)
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.error, rel=0.05)
    assert Difference.over(values) == found, "a second call draws other questions"
    assert (Difference.over([0.5, 0.5]).low, Difference.over([0.5]).high) == (0.5, 0.5)


def test_differences_are_over_the_same_questions_in_any_order() -> None:
    scores = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    full = [question(FULL, number, score) for number, score in enumerate(scores)]
    less = [question(DYNAKV, number, score - 0.25) for number, score in enumerate(scores)]
    seeds = [replace(FULL, seed=1), replace(DYNAKV, seed=1)]
    other = [question(seeds[0], 0, 5.0), question(seeds[1], 0, 4.75)]
    summary = {one.cell: one for one in summarise([*reversed(less), *full, *other])}
    assert next(iter(summary)).cache == "full", "the full cache comes first"
    assert len(summary) == 2 and summary[FULL].score.count == 7, "seeds are not averaged over"
    assert summary[FULL].change is None
    change = summary[DYNAKV].change
    assert change is not None and summary[DYNAKV].score.error > 0.1
    assert (change.value, change.low, change.high, change.error) == (-0.25, -0.25, -0.25, 0), "not paired"
    assert summarise(less)[0].change is None, "without a full cache there is nothing to compare with"
    another = [replace(one, suite="other") for one in full]
    assert summarise([*less, *another])[1].change is None, "compared with another suite's full cache"


def test_a_cell_says_what_its_questions_said() -> None:
    (found,) = summarise([question(DYNAKV, 0, 1.0), question(DYNAKV, 1, 0.0, equal_prefix=4, kl=[], joules=3.0)])
    assert found.score == Mean(0.5, 0.5, 2)
    assert found.logprob is not None and found.logprob.value == pytest.approx(-0.25)
    assert (found.kl, found.joules) == (Mean(0.125, 0, 1), Mean(3.0, 0, 1))
    assert found.equal_prefix is not None and found.equal_prefix.value == 0.75
    assert (found.length.value, found.seconds.value, found.bytes_read.value) == (4, 1, 10)
    empty = {"answer": None, "equal_prefix": None, "logprob": [], "full_logprob": [], "kl": []}
    (chosen,) = summarise([question(DYNAKV, 0, 1.0, **empty)])
    assert (chosen.logprob, chosen.kl, chosen.equal_prefix, chosen.diversity) == (None,) * 4


@pytest.mark.parametrize(("lower", "error", "expected"), [(0.005, 0, True), (0.02, 0, False), (0.02, 0.03, True)])
def test_as_good_is_a_point_or_the_standard_error(lower: float, error: float, expected: bool) -> None:
    assert POINT == 0.01
    assert Difference(-lower, error, 5, 0, 0).as_good is expected


def test_text_that_repeats_itself_is_less_diverse() -> None:
    assert diversity("one two three four five") == 1.0
    assert diversity("again and " * 20) == 2 / 37
    assert diversity("too short") is None


def test_divergence_by_position_is_a_mean_over_answers_that_are_that_long() -> None:
    assert by_position([[1.0, 1.0, 3.0], [3.0, 3.0]], 2) == [(0, Mean(2.0, 1.0, 2)), (2, Mean(3.0, 0.0, 1))]


def test_labels_tell_cells_of_a_task_apart() -> None:
    cells = {
        "full": FULL,
        "dynakv 10 %": DYNAKV,
        "static 2.5 %": replace(DYNAKV, policy="static", budget=0.025),
        "sparkv small": replace(FULL, cache="sparkv", codec="small"),
        "sparkv+dynakv balanced 10 %": replace(DYNAKV, cache="sparkv+dynakv", codec="balanced"),
        "sparkv+dynakv static balanced 10 %": replace(DYNAKV, cache="sparkv+dynakv", policy="static", codec="balanced"),
        "hf-quantized hqq-int4": replace(FULL, cache="hf-quantized", codec="hqq-int4"),
        "snapkv 10 %": replace(DYNAKV, cache="kvpress", policy="snapkv"),
    }
    for name, cell in cells.items():
        assert label(cell) == name
    assert label(without_budget(DYNAKV)) == "dynakv"
