"""What the index keeps of clusters in few bits: how far it is off, and that it follows a drift."""

from __future__ import annotations

import pytest
import torch

from kvsched.dynakv.table import VectorTable


def write(table: VectorTable, vectors: torch.Tensor, start: int = 0) -> None:
    """`[S, n, D]` as clusters from `start` on."""
    streams, n, dim = vectors.shape
    if table.data.shape[1] < start + n:
        table.grow(start + n)
    stream = torch.arange(streams).repeat_interleave(n)
    table.write(stream, torch.arange(start, start + n).repeat(streams), vectors.reshape(-1, dim))


def error(table: VectorTable, vectors: torch.Tensor) -> float:
    """Error's share of the deviation from the mean."""
    deviation = (vectors - vectors.mean((0, 1))).square().mean().sqrt()
    return float((table.read(vectors.shape[1]) - vectors).square().mean().sqrt() / deviation)


@pytest.mark.parametrize(("bits", "most"), [(2, 0.4), (4, 0.13), (8, 0.02), (16, 2e-3), (32, 1e-9)])
@pytest.mark.parametrize("dim", [1, 15, 64])
def test_error_of_each_width(bits, most, dim):
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 200, dim, generator=draw) * 3 + 10 * torch.randn(dim, generator=draw)
    table = VectorTable(3, dim, bits, torch.device("cpu"))
    write(table, vectors)
    assert error(table, vectors) < most
    assert table.nbytes == 600 * (dim * bits // 8 if bits >= 16 else -(-dim * bits // 8))


@pytest.mark.parametrize("bits", [2, 4, 16, 32])
def test_products_and_sums_are_those_of_what_is_read(bits):
    draw = torch.Generator().manual_seed(1)
    table = VectorTable(2, 12, bits, torch.device("cpu"))
    write(table, torch.randn(2, 30, 12, generator=draw) + 5)
    query, weight = torch.randn(2, 7, 12, generator=draw), torch.rand(2, 7, 30, generator=draw)
    vectors = table.read(30)
    torch.testing.assert_close(table.dot(query, 30), query @ vectors.transpose(1, 2), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(table.mix(weight), weight @ vectors, atol=1e-3, rtol=1e-4)


def test_codes_follow_a_drift():
    draw = torch.Generator().manual_seed(2)
    vectors = torch.randn(1, 2000, 16, generator=draw) + torch.linspace(0, 4, 2000).view(1, -1, 1)
    table = VectorTable(1, 16, 4, torch.device("cpu"))
    for start in range(0, 2000, 20):
        write(table, vectors[:, start : start + 20], start)
    assert error(table, vectors) < 0.25


def test_selecting_keeps_each_streams_codes():
    vectors = torch.randn(2, 50, 8) * torch.tensor([1.0, 100.0]).view(2, 1, 1)
    table = VectorTable(2, 8, 4, torch.device("cpu"))
    write(table, vectors)
    before = table.read(50)
    table.select(torch.tensor([1, 0, 1]))
    assert torch.equal(table.read(50), before[[1, 0, 1]])
