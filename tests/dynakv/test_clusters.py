"""The index's bookkeeping against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsched.dynakv.clusters import ClusterIndex, ranks

DIM, MAX_SIZE = 8, 12


def new_index(points: torch.Tensor, split_variance: float = 1.0) -> ClusterIndex:
    """One cluster of one token in each stream for each of `points` `[S, C, D]`."""
    streams, clusters, _ = points.shape
    index = ClusterIndex(streams, DIM, MAX_SIZE, split_variance, torch.device("cpu"))
    stream = torch.arange(streams).repeat_interleave(clusters)
    flat = points.reshape(-1, DIM)
    position = torch.zeros(len(flat), MAX_SIZE, dtype=torch.long)
    one = torch.ones(len(flat), dtype=torch.long)
    index.create(stream, flat, one, torch.zeros(len(flat)), position, torch.arange(len(flat)))
    return index


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 9), st.sampled_from([0.0, 200.0]))
def test_moments_stay_exact_over_many_appends(sequence, batch, offset):
    draw = torch.Generator().manual_seed(len(sequence))
    seeds = torch.randn(2, 3, DIM, generator=draw) + offset
    index = new_index(seeds)
    own = {(s, c): [seeds[s, c]] for s in range(2) for c in range(3)}
    for start in range(0, len(sequence), batch):
        flat = torch.tensor(sequence[start : start + batch])
        stream, cluster = flat // 3, flat % 3
        offsets = index.size[stream, cluster] + ranks(flat)
        room = offsets < MAX_SIZE
        stream, cluster, offsets = stream[room], cluster[room], offsets[room]
        if len(stream) == 0:
            continue
        keys = torch.randn(len(stream), DIM, generator=draw) + offset
        index.append(stream, cluster, offsets, keys, torch.arange(len(stream)))
        for s, c, key in zip(stream.tolist(), cluster.tolist(), keys, strict=True):
            own[s, c].append(key)
    for (s, c), keys in own.items():
        exact = torch.stack(keys).double()
        assert index.size[s, c] == len(exact)
        torch.testing.assert_close(index.centroid[s, c].double(), exact.mean(0), atol=1e-4, rtol=1e-6)
        deviation = (exact - exact.mean(0)).square().sum()
        torch.testing.assert_close(index.deviation[s, c].double(), deviation, atol=1e-3, rtol=1e-4)


def test_threshold_is_the_heads_own_mean_variance():
    index = new_index(torch.zeros(2, 2, DIM), split_variance=1.5)
    assert torch.isinf(index.threshold).all()
    stream, cluster = torch.tensor([0, 1]), torch.tensor([0, 1])
    keys = torch.stack([torch.full((DIM,), 2.0), torch.full((DIM,), 6.0)])
    index.append(stream, cluster, torch.tensor([1, 1]), keys, torch.tensor([1, 1]))
    # Variance of {0, x} is (x / 2)^2 per channel; the other cluster of each head has none.
    index.calibrate(torch.tensor([True, True]))
    expected = torch.tensor([1.5 * DIM * 1.0 / 2, 1.5 * DIM * 9.0 / 2])
    torch.testing.assert_close(index.threshold, expected)
    assert index.too_wide(stream, cluster).tolist() == [True, True]
    assert not index.too_wide(stream, 1 - cluster).any()
    index.calibrate(torch.tensor([False, False]))
    torch.testing.assert_close(index.threshold, expected)


def test_growing_keeps_what_is_there_and_selecting_repeats_it():
    points = torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(0))
    index = new_index(points)
    more = torch.randn(40, DIM, generator=torch.Generator().manual_seed(1))
    one = torch.ones(40, dtype=torch.long)
    numbers = index.create(one, more, one, torch.zeros(40), torch.zeros(40, MAX_SIZE), torch.arange(100, 140))
    assert numbers.tolist() == list(range(3, 43))
    assert index.count.tolist() == [3, 43]
    assert torch.equal(index.centroid[:, :3], points)
    assert torch.equal(index.centroid[1, 3:43], more)
    index.select(torch.tensor([1, 0, 1]))
    assert index.count.tolist() == [43, 3, 43]
    assert torch.equal(index.address[0], index.address[2])
    assert torch.equal(index.centroid[1, :3], points[0])
    assert index.nearest(more[None, :5].expand(3, -1, -1)).tolist()[2] == [3, 4, 5, 6, 7]
    index.select(torch.tensor([1]))
    assert index.width == 3


@pytest.mark.parametrize("values", [[], [4], [2, 2, 7, 2, 7, 0]])
def test_ranks(values):
    expected = [values[:i].count(x) for i, x in enumerate(values)]
    assert ranks(torch.tensor(values, dtype=torch.long)).tolist() == expected
