"""The order of clusters on flash, on retrievals whose best order is known."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kvsched.dynakv.affinity import number, order, telling


def reads(retrieved: np.ndarray, chain: np.ndarray) -> int:
    """Runs of neighbours over all queries."""
    there = retrieved[:, chain]
    return int(there[:, 0].sum() + (there[:, 1:] & ~there[:, :-1]).sum())


@settings(max_examples=100, deadline=None)
@given(arrays.arrays(bool, st.tuples(st.integers(0, 12), st.integers(1, 20))))
def test_it_is_a_permutation_and_what_nobody_asked_for_is_last(retrieved):
    chain = order(retrieved)
    assert sorted(chain.tolist()) == list(range(retrieved.shape[1]))
    never = np.flatnonzero(~retrieved.any(0)).tolist()
    assert chain.tolist()[retrieved.shape[1] - len(never) :] == never


def test_topics_that_were_shuffled_come_together_again():
    draw = np.random.default_rng(0)
    topic = draw.permutation(np.arange(60) % 6)
    retrieved = np.stack([(topic == query % 6) & (draw.random(60) < 0.8) for query in range(90)])
    assert reads(retrieved, order(retrieved)) <= 2.5 * 90
    assert reads(retrieved, np.arange(60)) > 5 * 90


def test_clusters_are_numbered_by_what_the_queries_retrieve():
    # Keys point in one of 8 directions, 4 clusters in each; a query asks for one direction, and so for 4 clusters.
    draw = torch.Generator().manual_seed(0)
    direction = torch.randperm(32, generator=draw) % 8
    centroid = 8 * torch.eye(8)[direction].unsqueeze(0) + 0.01 * torch.randn(1, 32, 8, generator=draw)
    label = torch.cat([torch.arange(32), torch.arange(32), torch.tensor([-1])]).unsqueeze(0)
    query = telling(torch.eye(8).repeat_interleave(2, dim=0).repeat(4, 1).view(1, 1, 64, 8))
    numbered = number(label, centroid, torch.full((1, 32), 2), query, budget=8)
    assert numbered[0, -1] == -1 and torch.equal(numbered[0, :32], numbered[0, 32:64])
    assert sorted(numbered[0, :32].tolist()) == list(range(32))
    in_order = direction[numbered[0, :32].argsort()]
    assert (in_order.diff() != 0).sum() == 7
    # A stream with fewer clusters keeps its numbers below their count.
    size = torch.where(torch.arange(32) < 20, 2, 0).unsqueeze(0)
    fewer = number(label.clamp_max(19), centroid, size, query, budget=8)
    assert sorted(set(fewer[0, :-1].tolist())) == list(range(20))
