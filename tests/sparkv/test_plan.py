from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsched.sparkv import plan
from kvsched.sparkv.grid import Grid
from kvsched.sparkv.plan import PLANNERS, Objective

ENERGY = Objective(compute=3.0, stream=0.5, makespan=1.0)
OBJECTIVES = [plan.TIME, ENERGY, Objective(1, 0, 0), Objective(0, 1, 0), Objective(0.2, 0.1, 0.7)]

seeds, few, many = st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 40)


def tables(seed: int, chunks: int, layers: int, forbidden: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Irregular costs: chunks that differ several times in both, so that greedy or hull solutions would miss.

    A share of the depths is `forbidden`, never all: the depths of one staircase stay allowed.
    """
    rng = np.random.default_rng(seed)
    steps = rng.random((chunks, layers)) * rng.choice([0.2, 1, 5], (chunks, 1))
    compute = np.concatenate([np.zeros((chunks, 1)), steps.cumsum(1)], axis=1)
    pieces = rng.random((chunks, layers)) * rng.choice([0.2, 1, 5])
    stream = np.concatenate([pieces[:, ::-1].cumsum(1)[:, ::-1], np.zeros((chunks, 1))], axis=1)
    spared = np.sort(rng.integers(0, layers + 1, chunks))[::-1]
    for table in (compute, stream):
        banned = rng.random(table.shape) < forbidden
        banned[np.arange(chunks), spared] = False
        table[banned] = np.inf
    return compute, stream


def staircases(compute: np.ndarray) -> np.ndarray:
    chunks, columns = compute.shape
    return np.array(list(itertools.combinations_with_replacement(range(columns - 1, -1, -1), chunks)))


def costs(compute: np.ndarray, stream: np.ndarray, plans: np.ndarray, objective: Objective = plan.TIME) -> np.ndarray:
    """What plans cost; those with a forbidden depth cost infinity."""
    seconds = plan.totals(compute, stream, plans)
    allowed = np.isfinite(seconds[0]) & np.isfinite(seconds[1])
    return np.where(allowed, objective(*(np.where(allowed, part, 0) for part in seconds)), np.inf)


def pareto(compute: np.ndarray, stream: np.ndarray) -> float:
    """The exact smallest makespan: dynamic programming over whole Pareto fronts, nothing rounded."""
    bound = plan.makespan(compute, stream, plan.optimal(compute, stream))
    fronts = [np.zeros((1, 2))] * compute.shape[1]
    for t in reversed(range(len(compute))):
        shallower = np.zeros((0, 2))
        for d, front in enumerate(fronts):
            ends = np.concatenate([shallower, front + np.array([compute[t, d], stream[t, d]])])
            ends = ends[(ends <= bound * (1 + 1e-9)).all(axis=1)]
            ends = ends[np.lexsort((ends[:, 1], ends[:, 0]))]
            is_best = ends[:, 1] < np.concatenate([[np.inf], np.minimum.accumulate(ends[:, 1])])[: len(ends)]
            fronts[d] = shallower = ends[is_best]
    return float(fronts[-1].max(axis=1).min())


@settings(max_examples=60, deadline=None)
@given(seeds, few, few, st.sampled_from(OBJECTIVES), st.sampled_from([0.0, 0.4]))
def test_optimal_is_within_half_a_percent_of_every_staircase(
    seed: int, chunks: int, layers: int, objective: Objective, forbidden: float
) -> None:
    compute, stream = tables(seed, chunks, layers, forbidden)
    depths = plan.optimal(compute, stream, objective)
    best = costs(compute, stream, staircases(compute), objective).min()
    assert costs(compute, stream, depths, objective) <= 1.005 * best + 1e-12


@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(10, 24), st.integers(10, 24))
def test_optimal_is_within_half_a_percent_on_grids_too_large_to_search(seed: int, chunks: int, layers: int) -> None:
    compute, stream = tables(seed, chunks, layers)
    assert plan.makespan(compute, stream, plan.optimal(compute, stream)) <= 1.005 * pareto(compute, stream)


@settings(max_examples=20, deadline=None)
@given(seeds, few, few)
def test_the_reference_for_large_grids_is_exact(seed: int, chunks: int, layers: int) -> None:
    compute, stream = tables(seed, chunks, layers)
    assert pareto(compute, stream) == pytest.approx(costs(compute, stream, staircases(compute)).min())


@settings(max_examples=40, deadline=None)
@given(seeds, many, many, st.sampled_from(OBJECTIVES))
def test_optimal_is_never_worse_than_any_other_planner(
    seed: int, chunks: int, layers: int, objective: Objective
) -> None:
    compute, stream = tables(seed, chunks, layers)
    best = costs(compute, stream, plan.optimal(compute, stream, objective), objective)
    for name in ("local", "stream", "token_split", "layer_split"):
        assert best <= costs(compute, stream, PLANNERS[name](compute, stream, objective), objective)
    assert best <= 1.005 * costs(compute, stream, plan.greedy(compute, stream, objective), objective) + 1e-12


@pytest.mark.parametrize("name", PLANNERS)
@settings(max_examples=40, deadline=None)
@given(seed=seeds, chunks=many, layers=many, forbidden=st.sampled_from([0.0, 0.3, 0.9]))
def test_every_planner_keeps_to_a_staircase_of_allowed_depths(
    name: str, seed: int, chunks: int, layers: int, forbidden: float
) -> None:
    compute, stream = tables(seed, chunks, layers, forbidden)
    depths = PLANNERS[name](compute, stream, plan.TIME)
    assert Grid(chunks, 1, layers).is_staircase(depths.tolist())
    assert np.isfinite(plan.makespan(compute, stream, depths))


@pytest.mark.parametrize("name", PLANNERS)
def test_no_planner_makes_up_a_plan_where_there_is_none(name: str) -> None:
    compute, stream = tables(0, 2, 3)
    compute[0, 1:] = np.inf
    stream[1, :2] = np.inf
    with pytest.raises(ValueError, match="forbidden"):
        PLANNERS[name](compute, stream, plan.TIME)


@settings(max_examples=40, deadline=None)
@given(seeds, many, many, st.sampled_from(OBJECTIVES))
def test_token_split_meets_at_the_best_chunk_boundary(
    seed: int, chunks: int, layers: int, objective: Objective
) -> None:
    compute, stream = tables(seed, chunks, layers)
    every = [np.where(np.arange(chunks) < split, layers, 0) for split in range(chunks + 1)]
    chosen = plan.token_split(compute, stream, objective)
    assert any((chosen == one).all() for one in every)
    assert costs(compute, stream, chosen, objective) == costs(compute, stream, np.array(every), objective).min()


@settings(max_examples=40, deadline=None)
@given(seeds, many, many, st.sampled_from(OBJECTIVES))
def test_layer_split_has_the_best_common_depth(seed: int, chunks: int, layers: int, objective: Objective) -> None:
    compute, stream = tables(seed, chunks, layers)
    every = np.repeat(np.arange(layers + 1)[:, None], chunks, axis=1)
    chosen = plan.layer_split(compute, stream, objective)
    assert (chosen == chosen[0]).all()
    assert costs(compute, stream, chosen, objective) == costs(compute, stream, every, objective).min()


def test_single_paths() -> None:
    compute, stream = tables(0, 3, 4)
    assert plan.local(compute, stream).tolist() == [4, 4, 4]
    assert plan.stream_all(compute, stream).tolist() == [0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(seeds, few, few)
def test_single_paths_are_the_deepest_and_the_shallowest_allowed_plan(seed: int, chunks: int, layers: int) -> None:
    compute, stream = tables(seed, chunks, layers, forbidden=0.4)
    every = staircases(compute)
    allowed = every[np.isfinite(costs(compute, stream, every))]
    assert plan.local(compute, stream).tolist() == allowed.max(axis=0).tolist()
    assert plan.stream_all(compute, stream).tolist() == allowed.min(axis=0).tolist()


def test_greedy_takes_what_is_cheap_for_each_side() -> None:
    compute = np.array([[0.0, 1.0, 2.0], [0.0, 50.0, 100.0]])
    stream = np.array([[100.0, 50.0, 0.0], [2.0, 1.0, 0.0]])
    assert plan.greedy(compute, stream).tolist() == [2, 0]


def test_greedy_weighs_what_a_piece_unlocks() -> None:
    # After the first piece, layer 1 of the first chunk is cheaper, but layer 0 of the second unlocks a cheap one.
    front = plan._Front(np.array([[1.0, 10.0], [10.5, 9.0], [0.1, 9.0]]), np.zeros(3, dtype=int))
    front.advance(np.array([2, 2, 2]), stage=11.55)
    assert front.depths.tolist() == [1, 1, 0]


@settings(max_examples=60, deadline=None)
@given(seeds, few, few, st.sampled_from([0.0, 0.4]))
def test_no_plan_beats_the_lower_bound(seed: int, chunks: int, layers: int, forbidden: float) -> None:
    compute, stream = tables(seed, chunks, layers, forbidden)
    best = costs(compute, stream, staircases(compute)).min()
    assert 0 <= plan.lower_bound(compute, stream) <= best * (1 + 1e-12)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(10, 30), st.integers(10, 30))
def test_the_lower_bound_is_near_where_pieces_are_small(seed: int, chunks: int, layers: int) -> None:
    compute, stream = tables(seed, chunks, layers)
    best = plan.makespan(compute, stream, plan.optimal(compute, stream))
    largest = max(np.diff(compute, axis=1).max(), -np.diff(stream, axis=1).min())
    # Between two neighbours on the hull a plan changes by no more than a few pieces in each chunk.
    assert plan.lower_bound(compute, stream) >= best - chunks * largest


def test_nothing_to_stream_means_nothing_to_compute() -> None:
    compute, _ = tables(0, 3, 4)
    assert plan.makespan(compute, np.zeros_like(compute), plan.optimal(compute, np.zeros_like(compute))) == 0


def test_makespan_is_the_longer_path() -> None:
    compute, stream = np.array([[0.0, 2.0, 3.0]] * 2), np.array([[8.0, 4.0, 0.0]] * 2)
    assert plan.makespan(compute, stream, np.array([2, 1])) == 5.0
    assert plan.makespan(compute, stream, np.array([1, 1])) == 8.0


def test_a_forbidden_plan_takes_for_ever() -> None:
    compute, stream = np.array([[0.0, np.inf]]), np.array([[1.0, 0.0]])
    assert plan.makespan(compute, stream, np.array([1])) == np.inf
    assert ENERGY(*plan.totals(compute, stream, np.array([1]))) == np.inf


def test_extreme_objectives_are_the_single_paths() -> None:
    compute, stream = tables(1, 6, 5)
    assert plan.optimal(compute, stream, Objective(1, 0, 0)).tolist() == [0] * 6
    assert plan.optimal(compute, stream, Objective(0, 1, 0)).tolist() == [5] * 6
