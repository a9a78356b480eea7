"""Decode attention against a float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvsched_kernels import decode_attention, merge_parts

pytestmark = pytest.mark.usefixtures("path")


def reference(query, key, value, mask, scaling, softcap, sinks):
    out = torch.zeros(*query.shape[:2], value.shape[-1], dtype=torch.float64)
    for s in range(query.shape[0]):
        kept = mask[s].nonzero().flatten()
        for g in range(query.shape[1]):
            score = (key[s, kept].double() @ query[s, g].double()) * scaling
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            weight = score.exp()
            total = weight.sum() + (0.0 if sinks is None else sinks[s, g].double().exp())
            out[s, g] = (weight / total) @ value[s, kept].double()
    return out


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    streams=st.integers(1, 4),
    group=st.integers(1, 7),
    tokens=st.integers(1, 40),
    dim=st.sampled_from([8, 16, 32]),
    softcap=st.sampled_from([None, 5.0]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_matches_float64(streams, group, tokens, dim, softcap, with_sinks, seed):
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(streams, group, dim, generator=draw)
    key = torch.randn(streams, tokens, dim, generator=draw)
    value = torch.randn(streams, tokens, dim + 8, generator=draw)
    mask = torch.rand(streams, tokens, generator=draw) < 0.6
    mask[:, -1] = True
    sinks = torch.randn(streams, group, generator=draw) if with_sinks else None
    key[~mask], value[~mask] = 1e4, -1e4
    cut = tokens // 2
    first = decode_attention(query, key[:, :cut], value[:, :cut], mask[:, :cut], dim**-0.5, softcap)
    second = decode_attention(query, key[:, cut:], value[:, cut:], mask[:, cut:], dim**-0.5, softcap, sinks)
    got = merge_parts([first, second])
    torch.testing.assert_close(
        got.double(), reference(query, key, value, mask, dim**-0.5, softcap, sinks), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, n, 16, generator=draw).to(dtype) for n in (3, 50, 50))
    mask = torch.ones(2, 50, dtype=torch.bool)
    got, _ = decode_attention(query, key, value, mask, 0.25)
    torch.testing.assert_close(got.double(), reference(query, key, value, mask, 0.25, None, None), atol=1e-6, rtol=1e-5)


def test_nothing_to_attend_to_gives_zeros():
    query, key = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    part = decode_attention(query, key, key, torch.zeros(2, 5, dtype=torch.bool), 1.0)
    assert torch.equal(merge_parts([part, part]), torch.zeros(2, 3, 8))
    assert torch.isinf(
        decode_attention(query, key[:, :0], key[:, :0], torch.zeros(2, 0, dtype=torch.bool), 1.0)[1]
    ).all()


def test_masked_keys_may_be_infinite() -> None:
    query, value = torch.ones(1, 2, 4), torch.arange(3.0).view(1, 3, 1)
    key, mask = torch.zeros(1, 3, 4), torch.tensor([[True, False, True]])
    expected, total = decode_attention(query, key, value, mask, 1.0)
    key[0, 1] = float("inf")
    output, same = decode_attention(query, key, value, mask, 1.0)
    assert torch.equal(output, expected) and torch.equal(same, total)
