from __future__ import annotations

import pytest
import torch

from kvsched_kernels import Vectors, dot, mix, pack, unpack
from kvsched_kernels import codes as codes_module


@pytest.mark.parametrize("at_once", [1, 500, 1 << 20])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [1, 3, 8, 63, 64])
def test_packed_codes_come_back_and_multiply(at_once, bits, dim, monkeypatch):
    monkeypatch.setattr(codes_module, "_AT_ONCE", at_once)
    draw = torch.Generator().manual_seed(dim)
    codes = torch.randint(0, 2**bits, (2, 9, dim), generator=draw, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, 9, -(-dim * bits // 8))
    assert torch.equal(unpack(packed, bits, dim), codes)
    query, weight = torch.randn(2, 5, dim, generator=draw), torch.rand(2, 5, 9, generator=draw)
    exact = codes.double()
    torch.testing.assert_close(dot(query, packed, bits).double(), query.double() @ exact.mT, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(mix(weight, packed, bits, dim).double(), weight.double() @ exact, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_vectors_are_the_same_numbers_read_multiplied_or_mixed(bits):
    draw = torch.Generator().manual_seed(bits)
    if bits == 16:
        vectors = Vectors(torch.randn(2, 9, 20, generator=draw).half())
    else:
        codes = torch.randint(0, 2**bits, (2, 9, 20), generator=draw, dtype=torch.uint8)
        vectors = Vectors(pack(codes, bits), bits, *torch.rand(2, 2, 1, 20, generator=draw))
    numbers = vectors.read(20).double()
    query, weight = torch.randn(2, 5, 20, generator=draw), torch.rand(2, 5, 9, generator=draw)
    torch.testing.assert_close(vectors.dot(query).double(), query.double() @ numbers.mT, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(vectors.mix(weight, 20).double(), weight.double() @ numbers, atol=1e-3, rtol=1e-5)
