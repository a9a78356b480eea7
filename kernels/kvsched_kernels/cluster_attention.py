"""Attention of one new token over clusters that are read where they lie, with an estimate for those left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .attention import Part, cap_scores, softmax_weights
from .codes import Vectors
from .dispatch import numba_runs, too_wide, triton_runs

_COMPILED = (torch.float32, torch.int8)
"""Rows that are read in place on a CPU; Numba knows no narrower floating types there."""


@dataclass(frozen=True)
class Pool:
    """Keys and values of resident tokens, a row each.

    Args:
        key: `[R, D]`, value: `[R, Dv]`; float32, float16, bfloat16, int8 or float8_e4m3fn. The numbers of a row are
            neighbours in memory; rows may lie any distance apart, such as key and value side by side.
        key_scale, value_scale: float32 `[R]`, factors of the rows, for int8 and float8. Scales of key channels belong
            into the query.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class Runs:
    """The tokens that each stream attends to, as runs of neighbouring rows of a pool.

    Args:
        start: int64 `[M]`, first row of every run, stream by stream.
        before: int64 `[M + 1]`, tokens of all runs before each, and of all runs.
        bounds: int64 `[S + 1]`, where in `start` the runs of each stream begin, and M.
        dense: int64 `[S]`, how many of a stream's runs, its first, hold tokens that always take part (sinks, the recent
            window). The others are retrieved clusters.
    """

    start: torch.Tensor
    before: torch.Tensor
    bounds: torch.Tensor
    dense: torch.Tensor

    @classmethod
    def of(cls, start: torch.Tensor, size: torch.Tensor, bounds: torch.Tensor, dense: torch.Tensor) -> Runs:
        """Runs of `size` tokens, integer `[M]`; the rest as above. A size may be 0."""
        return cls(start, torch.nn.functional.pad(size.long().cumsum(0), (1, 0)), bounds, dense)


@dataclass(frozen=True)
class Estimate:
    """Clusters known by their mean: those left out take part as `size` tokens with mean key and mean value.

    A mean key underrates its cluster, since exp is convex. By how much shows on the retrieved clusters, whose exact sum
    is known: with `corrects` all others are corrected by the same factor, within [1/e, e].

    Args:
        key, value: the means, for C clusters of every stream.
        size: integer `[S, C]`, tokens; 0 where there is no cluster, whose means may be any finite numbers.
        chosen: bool `[S, C]`, the clusters that were retrieved.
    """

    key: Vectors
    value: Vectors
    size: torch.Tensor
    chosen: torch.Tensor
    corrects: bool = True


def cluster_attention(
    query: torch.Tensor,
    pool: Pool,
    runs: Runs,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    estimate: Estimate | None = None,
) -> Part:
    """Softmax attention of each stream's query group over its runs and, if given, the estimate of the other clusters.

    Rows outside the runs never matter, whatever they hold. NaN in a key makes the whole output of its stream NaN, NaN
    in a value its channel's; infinities follow IEEE arithmetic. A stream that attends to nothing gives zeros, and -inf.

    Args:
        query: `[S, G, D]`, floating: the query heads that share a KV head.
        scaling, softcap, sinks: as in `decode_attention`.

    Returns:
        float32 `[S, G, Dv]`, and the log of the softmax's sum, float32 `[S, G]`.

    Raises:
        ValueError: shapes or types do not belong together.
    """
    _check(query, pool, runs, estimate)
    refused = too_wide(pool.key.shape[1], pool.value.shape[1], dtype=query.dtype)
    if triton_runs("cluster_attention", query, refused):
        from .gpu.cluster_attention import cluster_attention as kernel

        return kernel(query, pool, runs, scaling, softcap, sinks, estimate)
    exactly = estimate is not None and estimate.corrects
    if numba_runs("cluster_attention", query) and pool.key.dtype in _COMPILED:
        *part, exact = _compiled(query, pool, runs, scaling, softcap, exactly)
    else:
        *part, exact = _in_torch(query, pool, runs, scaling, softcap)
    if estimate is None and sinks is None:
        return part[0], part[1]
    parts = [part]
    if estimate is not None:
        parts.append([*_estimate(query, estimate, scaling, softcap, exact, pool.value.shape[1])])
    output, totals = (torch.stack(some) for some in zip(*parts, strict=True))
    total = totals.logsumexp(0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.float())
    weight = softmax_weights(totals.movedim(0, -1), total).movedim(-1, 0)
    return (output * weight.unsqueeze(-1)).sum(0), total


def _compiled(
    query: torch.Tensor, pool: Pool, runs: Runs, scaling: float, softcap: float | None, exactly: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `_in_torch` answers, in one pass over the rows."""
    from .cpu.attention import attend_runs, memory

    streams, group, _ = query.shape
    output = torch.empty(streams, group, pool.value.shape[1])
    total, exact = torch.empty(streams, group), torch.full((streams, group), float("-inf"))
    attend_runs(
        (query * scaling).numpy(), memory(pool.key), pool.key.stride(0), _numbers(pool.key_scale), memory(pool.value),
        pool.value.stride(0), _numbers(pool.value_scale), runs.start.numpy(), runs.before.numpy(), runs.bounds.numpy(),
        runs.dense.numpy(), softcap or 0.0, exactly, output.numpy(), total.numpy(), exact.numpy(),
    )  # fmt: skip
    return output, total, exact


def _numbers(scale: torch.Tensor | None) -> np.ndarray:
    return np.ones(0, np.float32) if scale is None else scale.float().contiguous().numpy()


def _in_torch(
    query: torch.Tensor, pool: Pool, runs: Runs, scaling: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and total over the runs, and `exact` `[S, G]`, the log of what the retrieved ones hold.

    Stream by stream the copy of the rows stays in the processor's cache.
    """
    streams, group, _ = query.shape
    token = torch.arange(int(runs.before[-1]), device=query.device)
    row = token + (runs.start - runs.before[:-1]).repeat_interleave(runs.before.diff(), output_size=len(token))
    ends = runs.before[runs.bounds].tolist()
    retrieved = runs.before[runs.bounds[:-1] + runs.dense].tolist()
    output = torch.empty(streams, group, pool.value.shape[1], device=query.device)
    total, exact = torch.empty(2, streams, group, device=query.device).unbind()
    for s, heads in enumerate(query.float()):
        some = row[ends[s] : ends[s + 1]]
        score = cap_scores((heads @ _rows(pool.key, pool.key_scale, some).T).mul_(scaling), softcap)
        total[s], exact[s] = score.logsumexp(-1), score[:, retrieved[s] - ends[s] :].logsumexp(-1)
        output[s] = softmax_weights(score, total[s]) @ _rows(pool.value, pool.value_scale, some)
    return output, total, exact


def _rows(part: torch.Tensor, scale: torch.Tensor | None, row: torch.Tensor) -> torch.Tensor:
    """Rows `[n]` of one side of a pool as numbers: float32 `[n, D]`, a copy."""
    plain = part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part  # which no CPU gathers
    found = plain.index_select(0, row).view(part.dtype).float()
    return found if scale is None else found.mul_(scale.index_select(0, row).unsqueeze(1))


def _estimate(
    query: torch.Tensor,
    estimate: Estimate,
    scaling: float,
    softcap: float | None,
    exact: torch.Tensor,
    value_dim: int,
) -> Part:
    """Attention over the clusters left out; `exact` `[S, G]` is the log of what the retrieved ones hold in truth."""
    score = estimate.key.dot(query).mul_(scaling)
    if numba_runs("cluster_attention", score, exact):
        from .cpu.select import left_out

        total, size, of = torch.empty_like(exact), estimate.size.contiguous(), estimate.chosen.contiguous()
        left_out(
            score.numpy(), softcap or 0.0, size.numpy(), of.numpy(), exact.numpy(), estimate.corrects, total.numpy()
        )
        return estimate.value.mix(score, value_dim), total
    guess = cap_scores(score, softcap) + estimate.size.unsqueeze(1).log()
    chosen = estimate.chosen.unsqueeze(1)
    left = guess.masked_fill(chosen, float("-inf"))
    total = left.logsumexp(-1)
    output = estimate.value.mix(softmax_weights(left, total), value_dim)
    if estimate.corrects:
        known = guess.masked_fill(~chosen, float("-inf")).logsumexp(-1)
        total = total + (exact - known).nan_to_num(0.0, 0.0, 0.0).clamp_(-1.0, 1.0)
    return output, total


def reference(
    query: torch.Tensor,
    pool: Pool,
    runs: Runs,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    estimate: Estimate | None = None,
    dtype: torch.dtype = torch.float64,
) -> Part:
    """The same stream by stream and without any trick, computed in `dtype`."""
    outputs, totals = [], []
    bounds, before = runs.bounds.tolist(), runs.before.tolist()
    for s, heads in enumerate(query.to(dtype)):
        row = [
            torch.arange(before[r + 1] - before[r], device=query.device) + runs.start[r]
            for r in range(bounds[s], bounds[s + 1])
        ]
        always = before[bounds[s] + int(runs.dense[s])] - before[bounds[s]]
        rows = torch.cat(row) if row else torch.zeros(0, dtype=torch.long, device=query.device)
        key, value = pool.key[rows].to(dtype), pool.value[rows].to(dtype)
        if pool.key_scale is not None:
            key = key * pool.key_scale[rows, None].to(dtype)
        if pool.value_scale is not None:
            value = value * pool.value_scale[rows, None].to(dtype)
        score = cap_scores(heads @ key.T * scaling, softcap)
        if estimate is not None:
            mean = estimate.key.read(query.shape[2])[s].to(dtype)
            guess = cap_scores(heads @ mean.T * scaling, softcap) + estimate.size[s].to(dtype).log()
            known = guess[:, estimate.chosen[s]].logsumexp(-1)
            factor = (score[:, always:].logsumexp(-1) - known).nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0)
            left = ~estimate.chosen[s] & (estimate.size[s] > 0)
            guess = guess[:, left] + (factor[:, None] if estimate.corrects else 0.0)
            score = torch.cat([score, guess], dim=-1)
            value = torch.cat([value, estimate.value.read(pool.value.shape[1])[s].to(dtype)[left]])
        total = score.logsumexp(-1)
        if sinks is not None:
            total = torch.logaddexp(total, sinks[s].to(dtype))
        outputs.append(softmax_weights(score, total) @ value)
        totals.append(total)
    return torch.stack(outputs), torch.stack(totals)


def _check(query: torch.Tensor, pool: Pool, runs: Runs, estimate: Estimate | None) -> None:
    streams, _, dim = query.shape
    if pool.key.shape[1] != dim or len(pool.key) != len(pool.value) or pool.key.dtype != pool.value.dtype:
        raise ValueError(
            f"cluster_attention: a query of {dim} channels, keys {tuple(pool.key.shape)} in {pool.key.dtype} and "
            f"values {tuple(pool.value.shape)} in {pool.value.dtype} do not belong together"
        )
    if len(runs.bounds) != streams + 1 or len(runs.dense) != streams or len(runs.before) != len(runs.start) + 1:
        raise ValueError(f"cluster_attention: runs of {len(runs.bounds) - 1} streams for queries of {streams}")
    for part, scale in ((pool.key, pool.key_scale), (pool.value, pool.value_scale)):
        if part.stride(1) != 1:
            raise ValueError("cluster_attention: the numbers of a row must be neighbours in memory: .contiguous()")
        if (scale is None) == (part.dtype in (torch.int8, torch.float8_e4m3fn)):
            raise ValueError(
                f"cluster_attention: {part.dtype} rows with scales {scale is not None}: int8 and float8 "
                "take scales, other types do not"
            )
    if estimate is not None and not estimate.size.shape == estimate.chosen.shape == estimate.key.data.shape[:2]:
        raise ValueError("cluster_attention: sizes, choice and means of the estimate differ in shape")
