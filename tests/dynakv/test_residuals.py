"""Residuals of tokens against a plain record, through anything that happens to clusters."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsched.dynakv.residuals import TokenResiduals

WIDTH, STREAMS, MOST = 5, 2, 4


def signs(count: int, draw: torch.Generator) -> torch.Tensor:
    """Residuals whose signs are all that is asked: rounding may not change them."""
    return torch.randint(0, 2, (count, WIDTH), generator=draw).float() * 2 - 1


def check(residuals: TokenResiduals, held: list[list[torch.Tensor]]) -> None:
    width = max(len(clusters) for clusters in held)
    if width == 0 or max(len(own) for clusters in held for own in clusters) == 0:
        return
    cluster = torch.arange(width).flip(0).repeat(STREAMS, 1)  # in any order
    vectors, first, size = residuals.lie(cluster)
    kept = vectors.read(WIDTH)
    for stream, clusters in enumerate(held):
        for number in range(width):
            own = clusters[number] if number < len(clusters) else torch.zeros(0, WIDTH)
            at = width - 1 - number
            assert int(size[stream, at]) == len(own)
            assert torch.equal(kept[stream, int(first[stream, at]) :][: len(own)].sign(), own.sign())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_token_keeps_its_residual(data):
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    residuals = TokenResiduals(STREAMS, WIDTH, 2, torch.zeros(STREAMS, 0, dtype=torch.uint8))
    held: list[list[torch.Tensor]] = [[] for _ in range(STREAMS)]
    steps = st.sampled_from(["create", "put", "append", "empty", "drop", "truncate", "select"])
    for step in data.draw(st.lists(steps, min_size=1, max_size=12)):
        some = [(s, c) for s, of in enumerate(held) for c in range(len(of)) if data.draw(st.booleans())]
        if step == "create":
            some = [(s, len(of) + i) for s, of in enumerate(held) for i in range(data.draw(st.integers(0, 3)))]
            residuals.grow(max(residuals.size.shape[1], max(len(of) for of in held) + 3))
            for s, _ in some:
                held[s].append(torch.zeros(0, WIDTH))
        stream, cluster = torch.tensor(some, dtype=torch.long).view(-1, 2).T
        if step in ("create", "put", "empty"):
            size = torch.randint(1, MOST, (len(some),), generator=draw) * (step != "empty")
            fresh = signs(int(size.sum()), draw)
            residuals.put(stream, cluster, size, fresh)
            for (s, c), own in zip(some, fresh.split(size.tolist()), strict=True):
                held[s][c] = own
        elif step == "append":
            stream, cluster = stream.repeat_interleave(2), cluster.repeat_interleave(2)
            fresh = signs(len(stream), draw)
            residuals.append(stream, cluster, fresh)
            for s, c, own in zip(stream.tolist(), cluster.tolist(), fresh, strict=True):
                held[s][c] = torch.cat([held[s][c], own[None]])
        elif step == "drop":
            residuals.permute((residuals.size == 0).to(torch.uint8).argsort(dim=1, stable=True))
            held = [[own for own in of if len(own)] for of in held]
        elif step == "truncate":
            end = data.draw(st.integers(0, 4))
            gone = torch.arange(residuals.size.shape[1]) >= end
            residuals.truncate(gone.expand(STREAMS, -1))
            held = [of[:end] for of in held]
        elif step == "select":
            order = torch.tensor([data.draw(st.integers(0, STREAMS - 1)) for _ in range(STREAMS)])
            residuals.select(order)
            held = [list(held[s]) for s in order.tolist()]
        check(residuals, held)


def test_products_spread_as_the_channels_do():
    draw = torch.Generator().manual_seed(0)
    deviation = torch.tensor([[3.0, 0.1, 1.0, 0.5, 2.0], [0.2, 4.0, 1.0, 1.0, 0.1]]).unsqueeze(1)
    keys = torch.randn(STREAMS, 2000, WIDTH, generator=draw) * deviation
    residuals = TokenResiduals(STREAMS, WIDTH, 2, torch.zeros(STREAMS, 0, dtype=torch.int16))
    residuals.grow(1)
    residuals.put(
        torch.arange(STREAMS),
        torch.zeros(STREAMS, dtype=torch.long),
        torch.tensor([2000] * STREAMS),
        keys.flatten(0, 1),
    )
    query = torch.randn(STREAMS, 3, WIDTH, generator=draw)
    length = keys.square().sum(2).mean(1).sqrt().view(STREAMS, 1, 1)
    expected = (query @ keys.mT).std(dim=2, keepdim=True)
    torch.testing.assert_close(residuals.spread(query) * length, expected, rtol=0.1, atol=0)
