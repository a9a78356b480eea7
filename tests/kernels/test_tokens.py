"""Single tokens of clusters in plain torch, compiled for the CPU and interpreted, against loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvsched_kernels import ClusterMasses, Tokens, Vectors, choose_tokens, pack, token_masses
from kvsched_kernels.cpu.scores import exponentials

ANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def masses(seed: int, streams: int, group: int, clusters: int, softcap: float | None = None) -> ClusterMasses:
    """Some clusters of a stream are none, though scores there are the highest."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 6, (streams, clusters), generator=draw, dtype=torch.uint8)
    score = torch.randn(streams, group, clusters, generator=draw) * 4
    score.masked_fill_((tokens == 0).unsqueeze(1), 1000.0)
    return ClusterMasses(score, tokens, torch.randn(streams, group, generator=draw) * 4, softcap)


def capped(score: np.ndarray, softcap: float | None) -> np.ndarray:
    return score if softcap is None else np.tanh(score / softcap) * softcap


@ANY
@given(
    seed=st.integers(0, 1 << 16),
    streams=st.integers(1, 3),
    group=st.integers(1, 5),
    clusters=st.integers(1, 12),
    dim=st.sampled_from([1, 7, 16, 33]),
    bits=st.sampled_from([2, 4, 8]),
    softcap=st.sampled_from([None, 5.0]),
)
def test_every_token_has_its_share_of_the_attention(path, seed, streams, group, clusters, dim, bits, softcap):
    draw = torch.Generator().manual_seed(seed)
    held = masses(seed, streams, group, clusters, softcap)
    if seed % 3 == 0:
        held.elsewhere.fill_(float("-inf"))
    size = held.tokens.long()
    codes = torch.randint(0, 2**bits, (streams, int(size.sum(1).max()) + 3, dim), generator=draw, dtype=torch.uint8)
    step, offset = torch.rand(2, streams, 1, dim, generator=draw).sub_(0.5).unbind()
    step *= 4 / 2**bits
    query = torch.randn(streams, group, dim, generator=draw)
    near = torch.rand(streams, clusters, generator=draw).argsort(1)[:, : -(-clusters // 2)]
    first = (size.cumsum(1) - size).gather(1, near)
    found = token_masses(query, held, near, Vectors(pack(codes, bits), bits, step, offset), first, size.gather(1, near))

    vectors = codes.double().numpy() * step.double().numpy() + offset.double().numpy()
    for s in range(streams):
        of = {c: nth for nth, c in enumerate(near[s].tolist())}
        score = held.score[s].double().numpy()
        for h in range(group):
            parts = {}
            for c in np.flatnonzero(size[s].numpy()):
                if c in of:
                    rows = vectors[s, int(first[s, of[c]]) :][: int(size[s, c])]
                    parts[c] = capped(rows @ query[s, h].double().numpy() + score[h, c], softcap)
                else:
                    parts[c] = np.full(int(size[s, c]), capped(score[h, c], softcap))
            peak = float(held.peak[s, h, 0])
            if parts:
                assert peak == pytest.approx(
                    max(float(held.elsewhere[s, h, 0]), *map(np.max, parts.values())), abs=1e-4
                )
            for c in range(clusters):
                mass = np.exp(parts.get(c, np.zeros(0)) - peak)
                if c in of:
                    own = found.mass[s, h, of[c]].numpy()
                    np.testing.assert_allclose(own[: len(mass)], mass, rtol=2e-4, atol=1e-30)
                    assert not own[len(mass) :].any(), "tokens that are not there hold nothing"
                np.testing.assert_allclose(held.mass[s, h, c], mass.sum(), rtol=2e-4, atol=1e-30)
    share = found.mass / held.total().unsqueeze(3)
    torch.testing.assert_close(found.worth, share.sum(1), rtol=1e-4, atol=1e-7)
    assert torch.equal(found.there, found.there & (torch.arange(found.worth.shape[2]) < found.size.unsqueeze(2)))
    assert int(found.there.sum()) == int(found.size.sum())


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_one_more_token_would_hold_its_share(softcap):
    held = masses(3, 2, 3, 9, softcap)
    score = torch.randn(2, 3, 9) * 4
    share = held.share_of(score)
    for s in range(2):
        there = np.flatnonzero(held.tokens[s].numpy())
        for c in range(9):
            expected = 0.0
            for h in range(3):
                of_all = [math.exp(held.elsewhere[s, h, 0])]
                of_all += [
                    int(held.tokens[s, i]) * math.exp(capped(held.score[s, h, i].double().numpy(), softcap))
                    for i in there
                ]
                own = math.exp(capped(score[s, h, c].double().numpy(), softcap))
                expected += own / (own + sum(of_all))
            assert float(share[s, c]) == pytest.approx(expected if c in there else 0.0, rel=1e-4)


def greedy(worth, there, room):
    best = sorted(((w, i) for i, w in enumerate(worth) if there[i]), reverse=True)[:room]
    return {i for _, i in best}, (math.inf if room == 0 else best[-1][0] if len(best) == room else 0.0)


@ANY
@given(data=st.data(), seed=st.integers(0, 1 << 16), streams=st.integers(1, 3), count=st.integers(1, 7))
def test_the_best_tokens_are_chosen_and_few_clusters_read(path, data, seed, streams, count):
    draw = torch.Generator().manual_seed(seed)
    group, largest = 2, 5
    held = masses(seed, streams, group, count + 2)
    near = torch.rand(streams, count + 2, generator=draw).argsort(1)[:, :count]
    size = held.tokens.long().gather(1, near)
    there = torch.arange(largest) < size.unsqueeze(2)
    mass = torch.rand(streams, group, count, largest, generator=draw) * there.unsqueeze(1)
    worth = torch.rand(streams, count, largest, generator=draw).mul_(there)
    tokens = Tokens(near, size, mass, worth)
    budget = torch.tensor([[data.draw(st.integers(0, 20))] for _ in range(streams)])
    enough, left = data.draw(st.sampled_from([0.0, 0.5, 2.0])), data.draw(st.sampled_from([0.0, 0.25, 1.0]))
    here = torch.rand(streams, count, largest + 3, generator=draw) < data.draw(st.sampled_from([0.2, 0.9, 1.0]))
    before = held.mass.clone()
    choice = choose_tokens(held, tokens, budget, None if bool(here.all()) else here[:, :, :largest], enough, left)

    for s in range(streams):
        value, inside = worth[s].flatten().tolist(), there[s].flatten().tolist()
        mine = (there[s] & here[s, :, :largest]).flatten().tolist()
        room = int(budget[s])
        kept, least = greedy(value, mine, room)
        lacking = [max(0.0, w - least) * (i and not m) for w, i, m in zip(value, inside, mine, strict=True)]
        gain = [sum(lacking[c * largest : (c + 1) * largest]) for c in range(count)]
        wanted = 0.0 if sum(inside) <= room else enough
        read = set()
        if sum(gain) > wanted:
            below = 0.0
            for c in sorted(range(count), key=lambda c: gain[c]):
                below += gain[c]
                if gain[c] > 0 and below > left * wanted:
                    read.add(c)
        assert set(choice.read[s].nonzero()[:, 0].tolist()) == read
        arrived = [m or (i and n // largest in read) for n, (m, i) in enumerate(zip(mine, inside, strict=True))]
        kept, _ = greedy(value, arrived, room)
        assert set(choice.kept[s].flatten().nonzero()[:, 0].tolist()) == kept
    looked = near.unsqueeze(1).expand(-1, group, -1)
    torch.testing.assert_close(choice.held, (mass * choice.kept.unsqueeze(1)).sum((2, 3)))
    torch.testing.assert_close(held.mass.gather(2, looked), (mass * ~choice.kept.unsqueeze(1)).sum(3))
    others = torch.ones_like(before, dtype=torch.bool).scatter(2, looked, False)
    assert torch.equal(held.mass[others], before[others])


def test_of_equal_tokens_as_many_are_chosen_as_fit(path):
    held = masses(0, 1, 1, 3)
    near, size = torch.arange(3)[None], torch.full((1, 3), 4)
    tokens = Tokens(near, size, torch.ones(1, 1, 3, 4), torch.full((1, 3, 4), 0.5))
    for room in (0, 1, 5, 12, 40):
        assert int(choose_tokens(held, tokens, torch.tensor([[room]])).kept.sum()) == min(room, 12)


def test_what_is_not_a_number_stays_in_its_stream(path):
    held = masses(1, 2, 2, 4)
    held.tokens.fill_(3)
    held.score.normal_()
    near = torch.tensor([[0, 2], [1, 3]])
    residuals = Vectors(torch.zeros(2, 12, 1, dtype=torch.uint8), 2, torch.ones(2, 1, 4), torch.zeros(2, 1, 4))
    query = torch.tensor([[[math.nan] * 4] * 2, [[1.0] * 4] * 2])
    found = token_masses(query, held, near, residuals, near * 3, torch.full((2, 2), 3))
    assert torch.isfinite(found.worth[1]).all() and float(found.worth[1].sum()) > 0
    choice = choose_tokens(held, found, torch.tensor([[4], [4]]))
    assert int(choice.kept[1].sum()) == 4


def test_streams_without_anything_are_worth_nothing(path):
    held = ClusterMasses(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.uint8), torch.full((1, 2), -math.inf))
    assert not held.worth().any()
    near = torch.tensor([[1]])
    residuals = Vectors(torch.zeros(1, 4, 1, dtype=torch.uint8), 2, torch.ones(1, 1, 4), torch.zeros(1, 1, 4))
    found = token_masses(torch.ones(1, 2, 4), held, near, residuals, torch.zeros(1, 1).long(), torch.zeros(1, 1).long())
    assert not found.worth.any() and not found.there.any() and not held.mass.any()


def test_exponentials_are_those_of_the_standard_library():
    numbers = np.concatenate([-np.geomspace(1e-6, 200, 5000), [0.0, -math.inf]]).astype(np.float32)
    for highest in (0.0, 40.0):
        got = numbers.copy() + np.float32(highest)
        exact = np.exp(got.astype(np.float64) - highest)
        exponentials(got, np.float32(highest))
        np.testing.assert_allclose(got, np.where(exact < math.exp(-87), 0.0, exact), rtol=1e-6, atol=2e-38)
    lost = np.array([math.nan], dtype=np.float32)
    exponentials(lost, np.float32(0))
    assert np.isnan(lost).all()
