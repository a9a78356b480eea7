"""The choice of clusters against a plain loop."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsched_kernels import choose_clusters


def reference(score: list[float], size: list[int], budget: int, considered: int) -> list[bool]:
    chosen = [False] * len(score)
    there = [i for i in range(len(score)) if size[i]]
    for i in sorted(there, key=lambda i: (-score[i], i))[:considered]:
        if size[i] <= budget:
            chosen[i] = True
            budget -= size[i]
    return chosen


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_matches_a_plain_loop(data):
    streams, clusters = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))

    def rows(value):
        return st.lists(st.lists(value, min_size=clusters, max_size=clusters), min_size=streams, max_size=streams)

    order = st.permutations(range(clusters))
    score = data.draw(st.lists(order, min_size=streams, max_size=streams))
    size = data.draw(rows(st.integers(0, 12)))
    budget = data.draw(st.lists(st.integers(0, 120), min_size=streams, max_size=streams))
    got = choose_clusters(
        torch.tensor(score, dtype=torch.float32),
        torch.tensor(size, dtype=torch.uint8),
        torch.tensor(budget).unsqueeze(1),
    )
    assert got.tolist() == [reference(*row, max(budget)) for row in zip(score, size, budget, strict=True)]


def test_a_cluster_that_does_not_fit_is_passed_over():
    score, size = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[6, 5, 4, 1]])
    assert choose_clusters(score, size, torch.tensor([[10]])).tolist() == [[True, False, True, False]]
    assert choose_clusters(score, size, torch.tensor([[5]])).tolist() == [[False, True, False, False]]
