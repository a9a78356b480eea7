"""Cluster attention: every program attends to a slice of one stream's tokens, or means, and a last kernel merges.

One load of a key and value serves the whole query group. Rows are found by a binary search over the runs, whose table
stays in the first-level cache, so clusters are read where they lie. All offsets into tensors are 64 bits wide.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..attention import Part
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

PER_PROCESSOR = 4
"""Programs for each multiprocessor: enough that loads of some overlap with arithmetic of others."""

MOST_SLICES = 64
_MERGED_AT_ONCE = 16


@triton.jit
def _numbers(raw, FLOAT8: tl.constexpr, dtype: tl.constexpr):
    """Loaded numbers in `dtype`. float8_e4m3fn comes as bytes and is decoded here: not every target can."""
    if FLOAT8:
        code = raw.to(tl.uint16)
        half = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True)
        number = half.to(tl.float32) * 256.0  # the exponents' biases differ by 8
        return tl.where((code & 0x7F) == 0x7F, float("nan"), number).to(dtype)
    elif raw.dtype.is_int():
        return raw.to(tl.float32).to(dtype)
    else:
        return raw.to(dtype)


@triton.jit
def _fold(best, total, apart, mixed, score, value, counts, separate, PRECISION: tl.constexpr):
    """One step of an online softmax over `score` `[G, N]` and `value` `[N, Dv]`.

    Scores that `counts` marks enter `total` and `mixed`, those that `separate` marks enter `apart`.
    """
    now = tl.maximum(best, tl.max(score, 1))
    base = tl.where(now == float("-inf"), 0.0, now)
    shrink = tl.exp(best - base)
    weight = tl.exp(score - base[:, None])
    apart = apart * shrink + tl.sum(tl.where(separate[None, :], weight, 0.0), 1)
    weight = tl.where(counts[None, :], weight, 0.0)
    total = total * shrink + tl.sum(weight, 1)
    mixed = mixed * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
    return now, total, apart, mixed


@triton.jit
def _store_part(output, totals, aparts, place, best, total, apart, mixed, group, value_dim, channel, there):
    """Write a slice's attention, normalised, as number `place` of the workspace."""
    head = tl.arange(0, mixed.shape[0])
    # NaN divides to NaN and a slice without tokens to 0, whatever the memory held.
    mixed = tl.where((total == 0.0)[:, None], 0.0, mixed / total[:, None])
    row = place * group + head
    mask = (head[:, None] < group) & there[None, :]
    tl.store(output + row[:, None] * value_dim + channel[None, :], mixed, mask=mask)
    tl.store(totals + row, best + tl.log(total), mask=head < group)
    tl.store(aparts + row, best + tl.log(apart), mask=head < group)


@triton.jit
def _runs_kernel(
    query, key, value, key_scale, value_scale, start, before, bounds, dense,
    output, totals, aparts,
    scaling, softcap, query_stride, head_stride, key_stride, value_stride, group, dim, value_dim, slices, steps,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, FLOAT8: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A part of a stream's runs; the tokens of clusters are what is `apart`."""
    stream, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    channel, wide, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    there, filled = channel < dim, wide < value_dim
    q = load_group(query + stream * query_stride, group, channel, there, head_stride, BLOCK_G)
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    apart = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    first, last = tl.load(bounds + stream), tl.load(bounds + stream + 1)
    begin, end = tl.load(before + first), tl.load(before + last)
    retrieved = tl.load(before + first + tl.load(dense + stream))
    length = tl.cdiv(tl.cdiv(end - begin, parts), BLOCK_N) * BLOCK_N
    begin += part * length
    end = tl.minimum(begin + length, end)
    for tile in range(begin, end, BLOCK_N):
        token = tile + lane
        live = token < end
        low, high = tl.zeros([BLOCK_N], tl.int64) + first, tl.zeros([BLOCK_N], tl.int64) + last
        for _ in range(steps):
            middle = (low + high) // 2
            right = tl.load(before + middle) <= token
            low, high = tl.where(right, middle, low), tl.where(right, high, middle)
        row = token + tl.load(start + low, mask=live, other=0) - tl.load(before + low, mask=live, other=0)
        raw = tl.load(key + row[None, :] * key_stride + channel[:, None], mask=live[None, :] & there[:, None], other=0)
        score = tl.dot(q, _numbers(raw, FLOAT8, q.dtype), input_precision=PRECISION) * scaling
        if SCALED:
            score *= tl.load(key_scale + row, mask=live, other=0.0)[None, :]
        if SOFTCAP:
            score = tanh(score / softcap) * softcap
        score = tl.where(live[None, :], score, float("-inf"))
        raw = tl.load(
            value + row[:, None] * value_stride + wide[None, :],
            mask=live[:, None] & filled[None, :],
            other=0,
        )
        v = _numbers(raw, FLOAT8, q.dtype)
        if SCALED:
            v = (v.to(tl.float32) * tl.load(value_scale + row, mask=live, other=0.0)[:, None]).to(q.dtype)
        best, total, apart, mixed = _fold(
            best, total, apart, mixed, score, v, live, live & (token >= retrieved), PRECISION
        )
    _store_part(
        output, totals, aparts, stream * slices + part, best, total, apart, mixed, group, value_dim, wide, filled
    )


@triton.jit
def _means_kernel(
    query, mean_key, key_step, key_offset, mean_value, value_step, value_offset, size, chosen,
    output, totals, aparts,
    scaling, softcap, query_stride, head_stride, key_stride, key_row, value_stride, value_row,
    size_stride, chosen_stride, group, dim, value_dim, clusters, slices,
    SOFTCAP: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A part of a stream's clusters by their means; the chosen ones are what is `apart`."""
    stream, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    channel, there = channels(dim, KEY_BITS, BLOCK_D)
    wide, filled = channels(value_dim, VALUE_BITS, BLOCK_DV)
    lane = tl.arange(0, BLOCK_N)
    q = load_group(query + stream * query_stride, group, channel, there, head_stride, BLOCK_G)
    q, shift = fold_codes(q, key_step + stream * dim, key_offset + stream * dim, channel, there, KEY_BITS)
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    apart = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    mean_key += stream * key_stride
    mean_value += stream * value_stride
    size += stream * size_stride
    chosen += stream * chosen_stride
    length = tl.cdiv(tl.cdiv(clusters, parts), BLOCK_N) * BLOCK_N
    begin = part * length
    end = tl.minimum(begin + length, clusters)
    for tile in range(begin, end, BLOCK_N):
        cluster = (tile + lane).to(tl.int64)
        inside = cluster < end
        tokens = tl.load(size + cluster, mask=inside, other=0)
        live = tokens > 0
        taken = tl.load(chosen + cluster, mask=inside, other=0) != 0
        k = load_vectors(mean_key + cluster * key_row, live, dim, KEY_BITS, BLOCK_D, q.dtype)
        score = (tl.dot(q, tl.trans(k), input_precision=PRECISION) + shift[:, None]) * scaling
        if SOFTCAP:
            score = tanh(score / softcap) * softcap
        score = tl.where(live[None, :], score + tl.log(tokens.to(tl.float32))[None, :], float("-inf"))
        v = load_vectors(mean_value + cluster * value_row, live & ~taken, value_dim, VALUE_BITS, BLOCK_DV, q.dtype)
        best, total, apart, mixed = _fold(best, total, apart, mixed, score, v, live & ~taken, live & taken, PRECISION)
    if VALUE_BITS < 16:
        step = tl.load(value_step + stream * value_dim + wide, mask=filled, other=0.0)
        offset = tl.load(value_offset + stream * value_dim + wide, mask=filled, other=0.0)
        mixed = mixed * step[None, :] + total[:, None] * offset[None, :]
    place = (stream + 1) * slices - parts + part
    _store_part(output, totals, aparts, place, best, total, apart, mixed, group, value_dim, wide, filled)


@triton.jit
def _merge_kernel(
    parts, part_total, part_apart, sinks, output, total_out,
    group, value_dim, slices, run_parts,
    SINKS: tl.constexpr, CORRECTS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_DV: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    stream, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    base = stream * slices * group + head
    part, wide = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_DV)
    logs = tl.load(part_total + base + part * group, mask=part < slices, other=float("-inf"))
    factor = 0.0
    if CORRECTS:
        apart = tl.load(part_apart + base + part * group, mask=part < slices, other=float("-inf"))
        exact = log_sum(tl.where(part < run_parts, apart, float("-inf")))
        known = log_sum(tl.where(part < run_parts, float("-inf"), apart))
        # Without retrieved clusters, or where a number is not finite, there is nothing to learn from.
        gap = exact - known
        factor = tl.where(tl.abs(gap) < float("inf"), tl.minimum(tl.maximum(gap, -1.0), 1.0), 0.0)
        logs += tl.where(part < run_parts, 0.0, factor)
    total = log_sum(logs)
    if SINKS:
        sink = tl.load(sinks + stream * group + head).to(tl.float32)
        both = tl.maximum(total, sink)
        floor = tl.where(both == float("-inf"), 0.0, both)
        total = floor + tl.log(tl.exp(total - floor) + tl.exp(sink - floor))
    reference = tl.where(total == float("-inf"), 0.0, total)
    mixed = tl.zeros([BLOCK_DV], tl.float32)
    for begin in range(0, slices, AT_ONCE):
        some = begin + tl.arange(0, AT_ONCE)
        each = tl.load(part_total + base + some * group, mask=some < slices, other=float("-inf"))
        weight = tl.exp(each + tl.where(some < run_parts, 0.0, factor) - reference)
        rows = tl.load(
            parts + (base + some * group)[:, None] * value_dim + wide[None, :],
            mask=(some[:, None] < slices) & (wide[None, :] < value_dim),
            other=0.0,
        )
        mixed += tl.sum(rows * weight[:, None], 0)
    place = stream * group + head
    tl.store(output + place * value_dim + wide, mixed, mask=wide < value_dim)
    tl.store(total_out + place, total)


@launches
def cluster_attention(
    query: torch.Tensor,
    pool: Any,
    runs: Any,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    estimate: Any = None,
    slices: int | None = None,
    block: int | None = None,
) -> Part:
    """See `kvsched_kernels.cluster_attention`.

    Args:
        slices: programs that share a stream's tokens; by default enough to fill the device.
        block: tokens of a step, a power of two; by default as many as registers allow.
    """
    streams, group, dim = query.shape
    value_dim, device = pool.value.shape[1], query.device
    query = query if query.stride(2) == 1 else query.contiguous()
    run_parts = fill(streams, device) if slices is None else slices
    mean_parts = 0 if estimate is None or estimate.size.shape[1] == 0 else -(-run_parts // 4)
    slices = run_parts + mean_parts
    output = torch.empty(streams, slices, group, value_dim, device=device)
    totals, aparts = torch.empty(2, streams, slices, group, device=device)
    nothing = query  # stands where a kernel reads nothing
    shape = {"group": group, "dim": dim, "value_dim": value_dim, "slices": slices}
    capped = {"scaling": scaling, "softcap": softcap or 1.0, "SOFTCAP": softcap is not None, "PRECISION": precision()}

    float8 = pool.key.dtype == torch.float8_e4m3fn
    key, value = (pool.key.view(torch.uint8), pool.value.view(torch.uint8)) if float8 else (pool.key, pool.value)
    scaled = pool.key_scale is not None
    key_scale, value_scale = (pool.key_scale, pool.value_scale) if scaled else (nothing, nothing)
    _runs_kernel[(streams, run_parts)](
        query, key, value, key_scale, value_scale, runs.start, runs.before, runs.bounds, runs.dense,
        output, totals, aparts,
        query_stride=query.stride(0), head_stride=query.stride(1), key_stride=key.stride(0),
        value_stride=value.stride(0), steps=len(runs.start).bit_length(), SCALED=scaled, FLOAT8=float8,
        **shape, **capped, **blocks(group, dim, value_dim, query.dtype, block),
    )  # fmt: skip
    if mean_parts:
        keys, values, size, chosen = estimate.key, estimate.value, estimate.size, estimate.chosen.view(torch.uint8)
        _means_kernel[(streams, mean_parts)](
            query, keys.data, *steps_of(keys, nothing), values.data, *steps_of(values, nothing), size, chosen,
            output, totals, aparts,
            query_stride=query.stride(0), head_stride=query.stride(1), key_stride=keys.data.stride(0),
            key_row=keys.data.stride(1), value_stride=values.data.stride(0), value_row=values.data.stride(1),
            size_stride=size.stride(0), chosen_stride=chosen.stride(0), clusters=size.shape[1],
            KEY_BITS=keys.bits, VALUE_BITS=values.bits,
            **shape, **capped, **mean_blocks(group, keys, values, dim, value_dim, query.dtype, block),
        )  # fmt: skip
    merged, total = torch.empty(streams, group, value_dim, device=device), torch.empty(streams, group, device=device)
    _merge_kernel[(streams, group)](
        output, totals, aparts, nothing if sinks is None else sinks.contiguous(), merged, total,
        group, value_dim, slices, run_parts,
        SINKS=sinks is not None, CORRECTS=mean_parts > 0 and estimate.corrects,
        BLOCK_P=triton.next_power_of_2(slices), BLOCK_DV=triton.next_power_of_2(value_dim), AT_ONCE=_MERGED_AT_ONCE,
    )  # fmt: skip
    return merged, total


def fill(streams: int, device: torch.device) -> int:
    """Programs for each of `streams` streams that fill the device."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(MOST_SLICES, max(1, -(-PER_PROCESSOR * processors // streams)))


def blocks(group: int, dim: int, value_dim: int, dtype: torch.dtype, block: int | None = None) -> dict[str, int]:
    """Block sizes and warps of `_runs_kernel` that keep a step's tensors in registers."""
    return _blocks(group, columns(dim, 16), columns(value_dim, 16), dtype, block)


def mean_blocks(
    group: int, keys: Vectors, values: Vectors, dim: int, value_dim: int, dtype: torch.dtype, block: int | None = None
) -> dict[str, int]:
    """The same for `_means_kernel`."""
    return _blocks(group, columns(dim, keys.bits), columns(value_dim, values.bits), dtype, block)


def _blocks(group: int, block_d: int, block_dv: int, dtype: torch.dtype, block: int | None) -> dict[str, int]:
    widest = max(block_d, block_dv) * dtype.itemsize
    return {
        "BLOCK_G": triton.next_power_of_2(max(group, 16)),
        "BLOCK_N": block or (64 if widest <= 256 else 32),
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "num_warps": 4 if widest <= 256 else 8,
    }
