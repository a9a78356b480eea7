"""k-means over streams: masks, no empty clusters, exact bookkeeping, the same answer every time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsched_kernels import divide, kmeans, lloyd_step, members, moments, nearest, two_means, update


def draw_points(seed: int, streams: int, n: int, dim: int = 4, distinct: int = 1 << 30, offset: float = 0.0):
    draw = torch.Generator().manual_seed(seed)
    points = torch.randn(streams, n, dim, generator=draw)
    return points[:, torch.randint(0, min(distinct, n), (n,), generator=draw)] + offset


@settings(max_examples=80, deadline=None)
@given(
    streams=st.integers(1, 4),
    n=st.integers(1, 60),
    distinct=st.integers(1, 60),
    most=st.integers(1, 9),
    seed=st.integers(0, 1 << 16),
)
def test_every_point_has_a_cluster_and_every_cluster_a_point(streams, n, distinct, most, seed):
    points = draw_points(seed, streams, n, distinct=distinct)
    draw = torch.Generator().manual_seed(seed + 1)
    mask = torch.rand(streams, n, generator=draw) < 0.7
    clusters = (mask.sum(1) * torch.rand(streams, generator=draw)).ceil().long()
    label = kmeans(points, mask, clusters)
    assert torch.equal(label >= 0, mask & (clusters > 0).unsqueeze(1))
    for s in range(streams):
        assert set(label[s][label[s] >= 0].tolist()) == set(range(int(clusters[s])))

    wanted = (clusters * 3).clamp_max(n)
    label, clusters = divide(points, label, clusters, wanted, most)
    _, size, deviation = moments(points, label, int(clusters.max()))
    splittable = ((size > 1) & (deviation > 0)).any(1)
    assert ((clusters >= wanted) | ~splittable).all()
    for s in range(streams):
        assert set(label[s][label[s] >= 0].tolist()) == set(range(int(clusters[s])))
    assert (size <= most).all()

    stream, cluster = size.nonzero(as_tuple=True)
    token = members(label, stream, cluster, most)
    for s, c, row in zip(stream.tolist(), cluster.tolist(), token.tolist(), strict=True):
        assert [i for i in row if i >= 0] == (label[s] == c).nonzero().flatten().tolist()


def test_finds_separate_groups_and_is_deterministic():
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
    noise = torch.randn(2, 80, 2, generator=torch.Generator().manual_seed(3))
    group = torch.arange(80) // 20
    points, mask = centres[group] + noise, torch.ones(2, 80, dtype=torch.bool)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    label = kmeans(points, mask, torch.tensor([4, 4]))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(label, kmeans(points, mask, torch.tensor([4, 4])))
    centroid, _, deviation = moments(points, label, 4)
    assert (deviation.sum(1) < 80 * 2 * 1.5).all()
    assert torch.cdist(centroid, centres.expand(2, -1, -1)).min(1).values.max() < 1.0


def test_more_clusters_than_points_is_refused():
    with pytest.raises(ValueError, match="more clusters than points"):
        kmeans(torch.zeros(1, 3, 2), torch.tensor([[True, True, False]]), torch.tensor([3]))


@pytest.mark.parametrize("offset", [0.0, 200.0])
def test_nearest_far_from_the_origin(offset):
    points, centroid = draw_points(1, 3, 500, 64, offset=offset), draw_points(2, 3, 40, 64, offset=offset)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1, 5:] = False
    label, distance = nearest(points, centroid, mask)
    exact = torch.cdist(points.double(), centroid.double()).square().masked_fill(~mask.unsqueeze(1), float("inf"))
    chosen = exact.gather(2, label.unsqueeze(-1)).squeeze(-1)
    assert mask.gather(1, label).all()
    torch.testing.assert_close(chosen, exact.min(-1).values, atol=0, rtol=1e-4)
    torch.testing.assert_close(distance.double(), chosen, atol=0, rtol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 200.0])
def test_moments_against_float64(offset):
    points = draw_points(4, 2, 300, 16, offset=offset)
    label = torch.randint(-1, 7, (2, 300), generator=torch.Generator().manual_seed(5))
    centroid, size, deviation = moments(points, label, 7)
    for s in range(2):
        for c in range(7):
            own = points[s, label[s] == c].double()
            assert size[s, c] == len(own)
            torch.testing.assert_close(centroid[s, c].double(), own.mean(0), atol=1e-4, rtol=1e-6)
            expected = (own - own.mean(0)).square().sum()
            torch.testing.assert_close(deviation[s, c].double(), expected, atol=0, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(sets=st.integers(1, 5), m=st.integers(2, 33), distinct=st.integers(1, 33), seed=st.integers(0, 1 << 16))
def test_two_means_leaves_neither_half_empty(sets, m, distinct, seed):
    points = draw_points(seed, sets, m, distinct=distinct)
    mask = torch.rand(sets, m, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[:, :2] = True
    for least in (0.0, 0.25):
        second = two_means(points, mask, least)
        assert not (second & ~mask).any()
        smaller = torch.minimum(second.sum(1), (mask & ~second).sum(1))
        assert (smaller >= torch.clamp((least * mask.sum(1)).floor(), min=1)).all()


def test_two_means_separates_two_groups():
    points = torch.randn(3, 30, 8, generator=torch.Generator().manual_seed(0))
    points[:, ::3] += 20.0
    second = two_means(points, torch.ones(3, 30, dtype=torch.bool))
    expected = (torch.arange(30) % 3 == 0).expand(3, -1)
    for got, want in zip(second, expected, strict=True):
        assert torch.equal(got, want) or torch.equal(got, ~want)


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("first", [0, 1, 30])
def test_moments_are_updated_as_if_all_points_came_at_once(by_channel, first):
    points = draw_points(4, 2, 40, 6, offset=20.0)
    label = torch.randint(-1, 7, (2, 40), generator=torch.Generator().manual_seed(5))
    before = moments(points[:, :first], label[:, :first], 7, by_channel)
    after = update(before, points[:, first:], label[:, first:])
    for got, wanted in zip(after, moments(points.double(), label, 7, by_channel), strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), atol=1e-3, rtol=1e-5)


def test_a_step_of_kmeans_takes_every_point_to_its_nearest_centroid_and_fills_empty_clusters():
    points, centroid = draw_points(6, 2, 50, 3), draw_points(7, 2, 5, 3)
    centroid[:, 4] = 1e3  # nobody's nearest
    mask, live = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) < 0.8, torch.ones(2, 5, dtype=torch.bool)
    label, moved = lloyd_step(points, mask, centroid, live)
    assert torch.equal(label >= 0, mask)
    distance = torch.cdist(points, centroid)
    for s in range(2):
        closest = distance[s].argmin(1)
        away = (mask[s] & (label[s] != closest)).nonzero().flatten()
        empty = set(range(5)) - set(closest[mask[s]].tolist())
        assert 4 in empty and set(label[s, away].tolist()) == empty and len(away) == len(empty)
        far = distance[s].min(1).values.masked_fill(~mask[s], -1.0).argmax()
        assert far in away
        for c in range(5):
            torch.testing.assert_close(moved[s, c], points[s, label[s] == c].mean(0))
