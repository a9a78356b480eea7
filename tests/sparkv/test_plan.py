from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsched.sparkv import plan
from kvsched.sparkv.grid import Grid


def tables(seed: int, chunks: int, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Irregular costs: chunks that differ several times in both, so that greedy or hull solutions would miss."""
    rng = np.random.default_rng(seed)
    steps = rng.random((chunks, layers)) * rng.choice([0.2, 1, 5], (chunks, 1))
    compute = np.concatenate([np.zeros((chunks, 1)), steps.cumsum(1)], axis=1)
    pieces = rng.random((chunks, layers)) * rng.choice([0.2, 1, 5])
    stream = np.concatenate([pieces[:, ::-1].cumsum(1)[:, ::-1], np.zeros((chunks, 1))], axis=1)
    return compute, stream


def best_of_all(compute: np.ndarray, stream: np.ndarray) -> float:
    chunks, columns = compute.shape
    every = itertools.combinations_with_replacement(range(columns - 1, -1, -1), chunks)
    return min(plan.makespan(compute, stream, np.array(depths)) for depths in every)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 6))
def test_optimal_is_within_half_a_percent_of_every_staircase(seed: int, chunks: int, layers: int) -> None:
    compute, stream = tables(seed, chunks, layers)
    depths = plan.optimal(compute, stream)
    assert Grid(chunks, 1, layers).is_staircase(depths.tolist())
    assert plan.makespan(compute, stream, depths) <= 1.005 * best_of_all(compute, stream)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40))
def test_optimal_is_never_worse_than_a_single_path(seed: int, chunks: int, layers: int) -> None:
    compute, stream = tables(seed, chunks, layers)
    best = plan.makespan(compute, stream, plan.optimal(compute, stream))
    for simple in (plan.local, plan.stream_all):
        assert best <= plan.makespan(compute, stream, simple(compute, stream))


@pytest.mark.parametrize("seed", range(5))
def test_forbidden_depths_are_not_chosen(seed: int) -> None:
    compute, stream = tables(seed, 5, 6)
    compute[1:, 4:] = np.inf
    compute[0, :2] = np.inf
    depths = plan.optimal(compute, stream)
    assert depths[0] >= 2 and depths[1:].max() <= 3


def test_single_paths() -> None:
    compute, stream = tables(0, 3, 4)
    assert plan.local(compute, stream).tolist() == [4, 4, 4]
    assert plan.stream_all(compute, stream).tolist() == [0, 0, 0]


def test_nothing_to_stream_means_nothing_to_compute() -> None:
    compute, _ = tables(0, 3, 4)
    assert plan.makespan(compute, np.zeros_like(compute), plan.optimal(compute, np.zeros_like(compute))) == 0


def test_makespan_is_the_longer_path() -> None:
    compute, stream = np.array([[0.0, 2.0, 3.0]] * 2), np.array([[8.0, 4.0, 0.0]] * 2)
    assert plan.makespan(compute, stream, np.array([2, 1])) == 5.0
    assert plan.makespan(compute, stream, np.array([1, 1])) == 8.0
