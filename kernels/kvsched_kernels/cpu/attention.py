"""Decode attention over rows where they lie, in float32: no copy is made of them."""

from __future__ import annotations

import math

import numpy as np
import torch

from . import compiled
from .scores import TINY, cap, exponentials


def memory(rows: torch.Tensor) -> np.ndarray:
    """From the first number of `[..., D]` to the last, whatever lies between, as one row: numbers of a row that begin
    at an offset are then known to be neighbours."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(rows.shape, rows.stride(), strict=True))
    return rows.as_strided((span if rows.numel() else 0,), (1,)).numpy()


@compiled
def attend_masked(query, key, key_strides, value, value_strides, mask, softcap, output, total):
    """See `attention.decode_attention`, without sinks; `query` is scaled. Strides `(stream, token)` are in numbers."""
    for stream in range(len(mask)):
        row = np.flatnonzero(mask[stream])
        keys = stream * key_strides[0] + row * key_strides[1]
        values = stream * value_strides[0] + row * value_strides[1]
        scale = np.ones(0, np.float32)
        score = _scores(query[stream], key, keys, scale, row, softcap)
        _mix(score, value, values, scale, row, output[stream], total[stream])


@compiled
def attend_runs(
    query, key, key_stride, key_scale, value, value_stride, value_scale, start, before, bounds, dense, softcap, exactly,
    output, total, exact,
):  # fmt: skip
    """See `cluster_attention`, without sinks and estimate; `exact` is the log of what runs from `dense` on hold."""
    for stream in range(len(query)):
        first, last = bounds[stream], bounds[stream + 1]
        row = np.empty(before[last] - before[first], np.int64)
        for run in range(first, last):
            for token in range(before[run], before[run + 1]):
                row[token - before[first]] = start[run] + token - before[run]
        score = _scores(query[stream], key, row * key_stride, key_scale, row, softcap)
        if exactly:
            for head in range(len(score)):
                exact[stream, head] = _log_sum(score[head, before[first + dense[stream]] - before[first] :].copy())
        _mix(score, value, row * value_stride, value_scale, row, output[stream], total[stream])


@compiled
def _scores(query, key, begin, scale, row, softcap):
    """Capped scores `[G, n]` of `query` `[G, D]` and the keys that begin at `begin` `[n]` of `key`."""
    group, dim = query.shape
    score = np.empty((group, len(begin)), np.float32)
    for token in range(len(begin)):
        numbers = key[begin[token] : begin[token] + dim]
        for head in range(group):
            heads, product = query[head], np.float32(0)
            for channel in range(dim):
                product += heads[channel] * np.float32(numbers[channel])
            score[head, token] = product * scale[row[token]] if len(scale) else product
    if softcap > 0:
        for head in range(group):
            cap(score[head], softcap)
    return score


@compiled
def _mix(score, value, begin, scale, row, output, total):
    """Values weighed by `score` `[G, n]`, which is written over, to `output` `[G, Dv]` and `total` `[G]`."""
    group, dim = output.shape
    for head in range(group):
        output[head] = 0
        total[head] = _log_sum(score[head])
    for token in range(len(begin)):
        numbers = value[begin[token] : begin[token] + dim]
        factor = scale[row[token]] if len(scale) else np.float32(1)
        for head in range(group):
            sums, weight = output[head], score[head, token] * factor
            for channel in range(dim):
                sums[channel] += weight * np.float32(numbers[channel])


@compiled
def _log_sum(score):
    """log of the sum of exp(score), -inf for none; the scores become their shares of it."""
    highest = np.float32(-np.inf)
    for i in range(len(score)):
        highest = max(highest, score[i])
    if highest == -np.inf:
        highest = np.float32(0)  # of nothing, or NaN alone
    exponentials(score, highest)
    together = np.float32(0)
    for i in range(len(score)):
        together += score[i]
    share = np.float32(1) / (together + TINY)
    for i in range(len(score)):
        score[i] *= share
    return highest + np.float32(math.log(together)) if together != 0 else np.float32(-np.inf)
