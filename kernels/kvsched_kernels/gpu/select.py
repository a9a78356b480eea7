"""Scores of clusters and the choice among them as Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..codes import Vectors
from .common import (
    channels,
    columns,
    fold_codes,
    launches,
    load_group,
    load_vectors,
    log_sum,
    precision,
    steps_of,
    tanh,
)

_CLUSTERS = 64
_SORTED = 1024


@triton.jit
def _score_kernel(
    query, key, step, offset, size, score_out, totals,
    scaling, softcap, query_stride, head_stride, key_stride, key_row, size_stride, group, dim, clusters,
    SOFTCAP: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of a block of clusters, and the log of the attention that they hold together."""
    stream, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.arange(0, BLOCK_G)
    channel, there = channels(dim, BITS, BLOCK_D)
    q = load_group(query + stream * query_stride, group, channel, there, head_stride, BLOCK_G)
    q, shift = fold_codes(q, step + stream * dim, offset + stream * dim, channel, there, BITS)
    cluster = block.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    tokens = tl.load(size + stream * size_stride + cluster, mask=cluster < clusters, other=0)
    live = tokens > 0
    k = load_vectors(key + stream * key_stride + cluster * key_row, live, dim, BITS, BLOCK_D, q.dtype)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    score = (score + shift[:, None]) * scaling
    if SOFTCAP:
        score = tanh(score / softcap) * softcap
    place = (stream * group + head)[:, None] * clusters + cluster[None, :]
    tl.store(score_out + place, score, mask=(head[:, None] < group) & live[None, :])
    logs = tl.where(live[None, :], score + tl.log(tokens.to(tl.float32))[None, :], float("-inf"))
    best = tl.max(logs, 1)
    base = tl.where(best == float("-inf"), 0.0, best)
    total = base + tl.log(tl.sum(tl.exp(logs - base[:, None]), 1))
    tl.store(totals + (stream * group + head) * tl.num_programs(1) + block, total, mask=head < group)


@triton.jit
def _worth_kernel(
    score, totals, elsewhere, size, worth, size_stride, group, clusters, blocks,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A token's share of attention in each cluster of a block, summed over the heads."""
    stream, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cluster = block.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cluster < clusters
    live = tl.load(size + stream * size_stride + cluster, mask=inside, other=0) > 0
    part = tl.arange(0, BLOCK_B)
    sum_ = tl.zeros([BLOCK_C], tl.float32)
    for head in range(group):
        row = stream * group + head
        known = tl.load(totals + row * blocks + part, mask=part < blocks, other=float("-inf"))
        other = tl.load(elsewhere + row)
        total = log_sum(tl.where(part == blocks, other, known))
        sum_ += tl.exp(tl.load(score + row * clusters + cluster, mask=live, other=float("-inf")) - total)
    tl.store(worth + stream * clusters + cluster, tl.where(live, sum_, 0.0), mask=inside)


@triton.jit
def _choose_kernel(
    order, size, worth, budget, chosen, size_stride, worth_stride, chosen_stride, considered, clusters, mass,
    MASS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Walk over the clusters of a stream in falling order of worth, block by block."""
    stream = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    left = tl.load(budget + stream)
    held = tl.zeros([], tl.float32)
    wanted = tl.zeros([], tl.float32)
    if MASS:
        for begin in range(0, clusters, BLOCK_C):
            cluster = begin + tl.arange(0, BLOCK_C)
            inside = cluster < clusters
            tokens = tl.load(size + stream * size_stride + cluster, mask=inside, other=0)
            each = tl.load(worth + stream * worth_stride + cluster, mask=tokens > 0, other=0.0)
            wanted += tl.sum(each * tokens.to(tl.float32), 0)
        wanted *= mass
    for begin in range(0, considered, BLOCK):
        rank = begin + lane
        cluster = tl.load(order + stream * considered + rank, mask=rank < considered, other=0)
        tokens = tl.load(size + stream * size_stride + cluster, mask=rank < considered, other=0).to(tl.int64)
        candidate = (tokens > 0) & (tokens <= left)
        taken = candidate & (tokens < 0)
        share = tl.zeros([BLOCK], tl.float32)
        if MASS:
            share = tl.load(worth + stream * worth_stride + cluster, mask=tokens > 0, other=0.0) * tokens.to(tl.float32)
        # All candidates up to the first that overflows are taken at once; that one is then too large for what is left.
        while tl.sum(candidate.to(tl.int32), 0) > 0:
            sizes = tl.where(candidate, tokens, 0)
            upto = tl.cumsum(sizes, 0)
            fits = candidate & (upto <= left)
            if MASS:
                shares = tl.where(candidate, share, 0.0)
                # Of what was taken, as far as all before it are.
                enough = (upto - sizes <= left) & (held + tl.cumsum(shares, 0) - shares >= wanted)
                fits = fits & (enough == 0)
                candidate = candidate & (enough == 0)
                held += tl.sum(tl.where(fits, share, 0.0), 0)
            taken = taken | fits
            left -= tl.sum(tl.where(fits, tokens, 0), 0)
            candidate = candidate & (fits == 0) & (tokens <= left)
        tl.store(chosen + stream * chosen_stride + cluster, taken.to(tl.uint8), mask=rank < considered)


@launches
def cluster_worth(
    query: torch.Tensor,
    means: Vectors,
    size: torch.Tensor,
    scaling: float,
    elsewhere: torch.Tensor,
    softcap: float | None = None,
) -> torch.Tensor:
    """See `kvsched_kernels.cluster_worth`."""
    streams, group, dim = query.shape
    clusters = size.shape[1]
    blocks = -(-clusters // _CLUSTERS)
    query = query if query.stride(2) == 1 else query.contiguous()
    score = torch.empty(streams, group, clusters, device=query.device)
    totals = torch.empty(streams, group, blocks, device=query.device)
    worth = torch.empty(streams, clusters, device=query.device)
    if clusters == 0:
        return worth
    _score_kernel[(streams, blocks)](
        query, means.data, *steps_of(means, query), size, score, totals,
        scaling, softcap or 1.0, query.stride(0), query.stride(1), means.data.stride(0), means.data.stride(1),
        size.stride(0), group, dim, clusters,
        SOFTCAP=softcap is not None, BITS=means.bits, PRECISION=precision(),
        BLOCK_G=triton.next_power_of_2(max(group, 16)), BLOCK_C=_CLUSTERS,
        BLOCK_D=columns(dim, means.bits), num_warps=8,
    )  # fmt: skip
    _worth_kernel[(streams, blocks)](
        score, totals, elsewhere.float().contiguous(), size, worth, size.stride(0), group, clusters, blocks,
        BLOCK_B=triton.next_power_of_2(blocks + 1), BLOCK_C=_CLUSTERS,
    )  # fmt: skip
    return worth


@launches
def choose_clusters(
    score: torch.Tensor, size: torch.Tensor, budget: torch.Tensor, mass: float, considered: int, block: int = _SORTED
) -> torch.Tensor:
    """See `kvsched_kernels.choose_clusters`; `considered` clusters of the highest scores are looked at."""
    streams, clusters = score.shape
    score, budget = score.float(), budget.contiguous()
    order = score.masked_fill(size == 0, float("-inf")).topk(considered, dim=1).indices
    chosen = torch.zeros(streams, clusters, dtype=torch.uint8, device=score.device)
    if considered:
        _choose_kernel[(streams,)](
            order, size, score, budget, chosen, size.stride(0), score.stride(0), chosen.stride(0), considered, clusters,
            mass, MASS=mass < 1, BLOCK=min(block, triton.next_power_of_2(considered)), BLOCK_C=_SORTED,
        )  # fmt: skip
    return chosen.view(torch.bool)
