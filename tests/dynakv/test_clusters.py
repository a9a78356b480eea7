"""The index's bookkeeping against plain records."""

from __future__ import annotations

import pytest
import torch

from kvsched.dynakv.clusters import ClusterIndex, Clusters
from kvsched.dynakv.ranks import ranks

DIM, MAX_SIZE = 8, 12


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(stream: torch.Tensor, keys: torch.Tensor, size: int = 1) -> Clusters:
    sizes = torch.full((len(stream),), size)
    return Clusters(stream, sizes, keys.square().sum(1), {"key": keys})


def new_index(points: torch.Tensor, chained: bool = False) -> ClusterIndex:
    """One cluster of one token in each stream for each of `points` `[S, C, D]`."""
    streams, count, _ = points.shape
    index = ClusterIndex(streams, {"key": (DIM, 32)}, MAX_SIZE, torch.device("cpu"), chained)
    stream = torch.arange(streams).repeat_interleave(count)
    index.create(clusters(stream, points.reshape(-1, DIM)), torch.arange(len(stream)))
    return index


def test_growing_keeps_what_is_there_and_selecting_repeats_it():
    points, more = draw(2, 3, DIM), draw(100, DIM, seed=1)
    index = new_index(points)
    numbers = index.create(clusters(torch.ones(100, dtype=torch.long), more), torch.arange(100, 200))
    assert numbers.tolist() == list(range(3, 103))
    assert index.count.tolist() == index.tokens.tolist() == [3, 103]
    keys = index.tables["key"].read(index.width)
    assert torch.equal(keys[:, :3], points)
    assert torch.equal(keys[1, 3:], more)
    assert index.address[1, 3:103].tolist() == list(range(100, 200))
    index.select(torch.tensor([1, 0, 1]))
    assert index.count.tolist() == [103, 3, 103]
    assert torch.equal(index.address[0], index.address[2])
    assert torch.equal(index.tables["key"].read(index.width)[1, :3], points[0])
    index.select(torch.tensor([1]))
    assert index.width == 3


def test_truncating_forgets_the_newest():
    index = new_index(draw(2, 5, DIM))
    index.truncate(torch.tensor([2, 4]))
    assert index.count.tolist() == index.tokens.tolist() == [2, 4]
    assert [x.tolist() for x in index.clusters()] == [[0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 2, 3]]
    assert index.create(clusters(torch.tensor([0]), draw(1, DIM)), torch.tensor([9])).tolist() == [2]


def test_replacing_leaves_the_address():
    index = new_index(draw(1, 4, DIM))
    key = draw(1, DIM, seed=3)
    index.replace(torch.tensor([2]), clusters(torch.tensor([0]), key, size=7))
    assert index.size[0, :4].tolist() == [1, 1, 7, 1]
    assert index.address[0, :4].tolist() == [0, 1, 2, 3]
    assert torch.equal(index.tables["key"].read(4)[0, 2], key[0])


@pytest.mark.parametrize("offset", [0.0, 200.0])
def test_chains_share_a_running_mean(offset):
    seeds = draw(2, 3, DIM) + offset
    index = new_index(seeds, chained=True)
    own = {(s, c): [seeds[s, c]] for s in range(2) for c in range(3)}
    for step in range(20):
        keys, label = draw(2, 4, DIM, seed=step) + offset, (torch.arange(8) + step).view(2, 4) % 4 - 1
        for s, c, key in zip([0] * 4 + [1] * 4, label.flatten().tolist(), keys.reshape(-1, DIM), strict=True):
            if c >= 0:
                own[s, c].append(key)
        stream, column = (label >= 0).nonzero(as_tuple=True)
        parent = label[stream, column]
        index.create(clusters(stream, keys[stream, column]), torch.arange(len(stream)), parent=parent)
        index.follow(keys, label)
        assert torch.equal(index.tail(stream, parent), index.tail(stream, index.tail(stream, parent)))
    keys = index.tables["key"].read(index.width)
    for (s, c), members in own.items():
        assert int((index.parent[s, : index.count[s]] == c).sum()) == len(members)
        mean = torch.stack(members).double().mean(0)
        for block in (index.parent[s, : index.count[s]] == c).nonzero().flatten().tolist():
            torch.testing.assert_close(keys[s, block].double(), mean, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("values", [[], [4], [2, 2, 7, 2, 7, 0]])
def test_ranks(values):
    expected = [values[:i].count(x) for i, x in enumerate(values)]
    assert ranks(torch.tensor(values, dtype=torch.long)).tolist() == expected
