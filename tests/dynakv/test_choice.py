"""Choices of tokens and of reads, against plain greedy ones."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsched.dynakv.choice import LEFT, fewest_to_read, tokens_that_hold, within


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_best_tokens_fit_the_budget_of_each_stream(data):
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    streams, clusters, largest = (data.draw(st.integers(1, most)) for most in (3, 6, 5))
    worth = torch.rand(streams, clusters, largest, generator=draw)
    worth[torch.rand(worth.shape, generator=draw) < 0.3] = -1.0
    budget = torch.tensor([[data.draw(st.integers(0, 30))] for _ in range(streams)])
    kept, least = within(worth, budget)
    for row, mine, room, bar in zip(worth, kept, budget[:, 0].tolist(), least[:, 0].tolist(), strict=True):
        ranked = sorted(row[row >= 0].tolist(), reverse=True)
        assert sorted(row[mine].tolist(), reverse=True) == ranked[:room]
        assert bar == (float("inf") if room == 0 else ranked[room - 1] if len(ranked) >= room else 0.0)


def test_the_fewest_clusters_are_read_that_leave_little_and_none_where_all_gain_little():
    gain = torch.tensor([[0.1, 0.0, 0.6, 0.2, 0.1], [0.1, 0.1, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    read = fewest_to_read(gain, torch.tensor([[0.9], [0.4], [0.0]]))
    assert LEFT == 0.25, "the second best of the first stream may be left only with more"
    assert read.tolist() == [[False, False, True, True, False], [False] * 5, [False] * 5]
    everything = fewest_to_read(gain, torch.zeros(3, 1))
    assert torch.equal(everything, gain > 0)


def test_tokens_that_hold_a_mass():
    worth = torch.tensor([[0.01, 0.1, float("nan"), 0.05], [0.2, 0.0, 0.1, 0.1]])
    tokens = torch.tensor([[5, 4, 0, 2], [2, 1, 3, 1]], dtype=torch.uint8)
    # What lies in DRAM holds .45 and .2 of attention.
    for mass, expected in (
        (0.4, [0, 2]),
        (0.5, [4, 2]),
        (0.91, [6, 6]),
        (0.94, [6, 6]),
        (0.96, [11, 6]),
        (1.0, [11, 6]),
    ):
        assert tokens_that_hold(mass, worth, tokens).flatten().tolist() == expected, mass
