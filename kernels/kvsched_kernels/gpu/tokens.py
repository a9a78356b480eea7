"""Products of a query with the residuals of single tokens, as a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..codes import Vectors
from .common import channels, columns, fold_codes, launches, load_group, load_vectors, precision, steps_of

_TOKENS = 64


@triton.jit
def _products_kernel(
    query, code, step, offset, first, size, product,
    query_stride, head_stride, code_stride, code_row, group, dim, count, most,
    BITS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All tokens of one cluster; 0 where the cluster has none."""
    stream, nth = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.arange(0, BLOCK_G)
    channel, there = channels(dim, BITS, BLOCK_D)
    q = load_group(query + stream * query_stride, group, channel, there, head_stride, BLOCK_G)
    q, shift = fold_codes(q, step + stream * dim, offset + stream * dim, channel, there, BITS)
    start, tokens = tl.load(first + stream * count + nth), tl.load(size + stream * count + nth)
    for begin in range(0, most, BLOCK_T):
        token = begin + tl.arange(0, BLOCK_T)
        live = token < tokens
        row = code + stream * code_stride + (start + token) * code_row
        vector = load_vectors(row, live, dim, BITS, BLOCK_D, q.dtype)
        one = tl.dot(q, tl.trans(vector), input_precision=PRECISION) + shift[:, None]
        place = ((stream * group + head)[:, None] * count + nth) * most + token[None, :]
        mask = (head[:, None] < group) & (token[None, :] < most)
        tl.store(product + place, tl.where(live[None, :], one, 0.0), mask=mask)


@launches
def token_products(
    query: torch.Tensor, residuals: Vectors, first: torch.Tensor, size: torch.Tensor, most: int
) -> torch.Tensor:
    """float32 `[S, G, k, most]`, products of `query` `[S, G, D]` with the tokens of clusters; see `token_masses`."""
    streams, group, dim = query.shape
    count = first.shape[1]
    query = query if query.stride(2) == 1 else query.contiguous()
    product = torch.empty(streams, group, count, most, device=query.device)
    _products_kernel[(streams, count)](
        query, residuals.data, *steps_of(residuals, query), first.contiguous(), size.contiguous(), product,
        query.stride(0), query.stride(1), residuals.data.stride(0), residuals.data.stride(1), group, dim, count, most,
        BITS=residuals.bits, PRECISION=precision(), BLOCK_G=triton.next_power_of_2(max(group, 16)),
        BLOCK_T=min(_TOKENS, triton.next_power_of_2(max(most, 16))), BLOCK_D=columns(dim, residuals.bits),
    )  # fmt: skip
    return product
