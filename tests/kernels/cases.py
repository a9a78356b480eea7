"""Random arguments of the operations, ragged and poisoned: what no operation may read is not a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvsched_kernels import Estimate, Pool, Runs, Vectors, pack

FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Shape:
    """What a case of cluster attention looks like.

    Args:
        stored: dtype of the pool; `bits`: of the means' keys and values, or `None` for no estimate.
    """

    streams: int = 2
    group: int = 3
    dim: int = 32
    value_dim: int = 32
    most_runs: int = 6
    dtype: torch.dtype = torch.float32
    stored: torch.dtype = torch.float32
    bits: tuple[int, int] | None = None
    clusters: int = 20
    softcap: float | None = None
    sinks: bool = False
    corrects: bool = True


def attention_case(shape: Shape, seed: int) -> dict[str, Any]:
    """Arguments of `cluster_attention`. Rows of the pool outside the runs hold NaN, or codes that are far off."""
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, shape.most_runs + 1, (shape.streams,), generator=draw)
    size = torch.randint(0, 10, (int(counts.sum()),), generator=draw)
    start = size.cumsum(0) - size + 3 * torch.arange(len(size)) + 5  # with rows between the runs
    order = torch.randperm(len(size), generator=draw)  # streams own rows all over the pool
    size, start = size[order], start[order]
    bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    dense = (counts * torch.rand(shape.streams, generator=draw)).long()
    runs = Runs.of(start, size, bounds, dense)
    rows = int((start + size).max()) + 7 if len(size) else 9
    used = torch.zeros(rows, dtype=torch.bool)
    for first, count in zip(start.tolist(), size.tolist(), strict=True):
        used[first : first + count] = True
    entries = _stored(torch.randn(rows, shape.dim + shape.value_dim + 1, generator=draw), used, shape.stored)
    # Side by side with a number between them, so that no row is aligned.
    key, value = entries[:, : shape.dim], entries[:, shape.dim + 1 :]
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if shape.stored in (torch.int8, FLOAT8):
        key_scale, value_scale = torch.rand(2, rows, generator=draw) / (40 if shape.stored == torch.int8 else 1) + 0.01
        key_scale[~used] = value_scale[~used] = float("nan")
        scales = key_scale, value_scale
    case: dict[str, Any] = {
        "query": torch.randn(shape.streams, shape.group, shape.dim, generator=draw).to(shape.dtype),
        "pool": Pool(key, value, *scales),
        "runs": runs,
        "scaling": shape.dim**-0.5,
        "softcap": shape.softcap,
        "sinks": torch.randn(shape.streams, shape.group, generator=draw) if shape.sinks else None,
        "estimate": None,
    }
    if shape.bits is not None:
        tokens = torch.randint(0, 9, (shape.streams, shape.clusters), generator=draw, dtype=torch.uint8)
        chosen = (torch.rand(shape.streams, shape.clusters, generator=draw) < 0.4) & (tokens > 0)
        mean_key = vectors(shape.streams, shape.clusters, shape.dim, shape.bits[0], shape.dtype, tokens, draw)
        mean_value = vectors(shape.streams, shape.clusters, shape.value_dim, shape.bits[1], shape.dtype, tokens, draw)
        case["estimate"] = Estimate(mean_key, mean_value, tokens, chosen, shape.corrects)
    return case


def vectors(
    streams: int, count: int, dim: int, bits: int, dtype: torch.dtype, tokens: torch.Tensor, draw: torch.Generator
) -> Vectors:
    """Vectors that are far off where there is no cluster, if they are plain numbers."""
    if bits >= 16:
        numbers = torch.randn(streams, count, dim, generator=draw).to(dtype)
        numbers[tokens == 0] = 1e4
        return Vectors(numbers)
    codes = pack(torch.randint(0, 2**bits, (streams, count, dim), generator=draw, dtype=torch.uint8), bits)
    step = (0.5 + torch.rand(streams, 1, dim, generator=draw)) * 3 / 2**bits
    return Vectors(codes, bits, step, torch.randn(streams, 1, dim, generator=draw) - 1.5)


def _stored(numbers: torch.Tensor, used: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.where(used[:, None], (numbers * 40).round(), -128.0).to(torch.int8)
    numbers[~used] = float("nan")
    return numbers.to(dtype)
