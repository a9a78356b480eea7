"""The choice of clusters against a plain loop."""

from __future__ import annotations

import pytest
import torch
from cases import vectors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvsched_kernels import choose_clusters, cluster_worth


def reference(score: list[float], size: list[int], budget: int, considered: int, mass: float = 1.0) -> list[bool]:
    chosen = [False] * len(score)
    there = [i for i in range(len(score)) if size[i]]
    wanted = mass * sum(score[i] * size[i] for i in there) if mass < 1 else float("inf")
    for i in sorted(there, key=lambda i: (-score[i], i))[:considered]:
        if sum(score[j] * size[j] for j in there if chosen[j]) >= wanted:
            break
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


@settings(max_examples=100, deadline=None)
@given(
    clusters=st.integers(1, 40),
    mass=st.sampled_from([0.0, 0.3, 0.75, 0.999]),
    budget=st.integers(0, 200),
    seed=st.integers(0, 1 << 16),
)
def test_a_share_of_the_attention_ends_the_choice(clusters, mass, budget, seed):
    draw = torch.Generator().manual_seed(seed)
    score = torch.randperm(clusters, generator=draw) / 8.0
    size = torch.randint(0, 12, (clusters,), generator=draw, dtype=torch.uint8)
    got = choose_clusters(score[None], size[None], torch.tensor([[budget]]), mass)
    assert got[0].tolist() == reference(score.tolist(), size.tolist(), budget, budget, mass)


@pytest.mark.usefixtures("path")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    streams=st.integers(1, 3),
    group=st.integers(1, 7),
    clusters=st.integers(1, 40),
    bits=st.sampled_from([2, 4, 8, 16]),
    softcap=st.sampled_from([None, 4.0]),
    alone=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_worth_is_a_tokens_share_of_the_attention(streams, group, clusters, bits, softcap, alone, seed):
    draw = torch.Generator().manual_seed(seed)
    size = torch.randint(0, 5, (streams, clusters), generator=draw, dtype=torch.uint8)
    size[:, -1] = 3
    means = vectors(streams, clusters, 16, bits, torch.float32, size, draw)
    query, elsewhere = torch.randn(streams, group, 16, generator=draw), torch.randn(streams, group, generator=draw)
    if alone:
        elsewhere.fill_(float("-inf"))
    got = cluster_worth(query, means, size, 0.25, elsewhere, softcap)
    for s in range(streams):
        there = size[s] > 0
        score = query[s].double() @ means.read(16)[s].double().T * 0.25
        score = score if softcap is None else torch.tanh(score / softcap) * softcap
        held = score[:, there].exp()
        total = (held * size[s, there]).sum(1) + elsewhere[s].double().exp()
        torch.testing.assert_close(got[s, there].double(), (held / total[:, None]).sum(0), atol=1e-6, rtol=1e-4)
        assert not got[s, ~there].any()
