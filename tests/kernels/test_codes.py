from __future__ import annotations

import pytest
import torch

from kvsched_kernels import dot, mix, pack, unpack


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [1, 3, 8, 63, 64])
def test_packed_codes_come_back_and_multiply(bits, dim):
    draw = torch.Generator().manual_seed(dim)
    codes = torch.randint(0, 2**bits, (2, 9, dim), generator=draw, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, 9, -(-dim * bits // 8))
    assert torch.equal(unpack(packed, bits, dim), codes)
    query, weight = torch.randn(2, 5, dim, generator=draw), torch.rand(2, 5, 9, generator=draw)
    exact = codes.double()
    torch.testing.assert_close(dot(query, packed, bits).double(), query.double() @ exact.mT, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(mix(weight, packed, bits, dim).double(), weight.double() @ exact, atol=1e-3, rtol=1e-5)
