"""Device functions that several kernels share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl

from ..codes import Vectors

P = ParamSpec("P")
R = TypeVar("R")


@triton.jit
def tanh(x):
    """There is no hyperbolic tangent that all targets and the interpreter share."""
    shrunk = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0, -size, size)


@triton.jit
def channels(dim, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The channel that each of `BLOCK` columns of a tile holds, and whether it holds one.

    Codes are unpacked part by part (see `codes.pack`), and every part is filled up to a power of two.
    """
    column = tl.arange(0, BLOCK)
    if BITS < 8:
        width, padded = (dim * BITS + 7) // 8, BLOCK * BITS // 8
        channel = column // padded * width + column % padded
        return channel, (column % padded < width) & (channel < dim)
    else:
        return column, column < dim


@triton.jit
def load_vectors(row, live, dim, BITS: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Numbers of the vectors that begin at `row` `[N]`, or their codes: `[N, BLOCK]` in the order of `channels`."""
    if BITS < 8:
        column = tl.arange(0, BLOCK * BITS // 8)
        there = live[:, None] & (column[None, :] < (dim * BITS + 7) // 8)
        packed = tl.load(row[:, None] + column[None, :], mask=there, other=0)
        if BITS == 4:
            parts = tl.permute(tl.join(packed & 15, packed >> 4), (0, 2, 1))
        else:
            low, high = tl.join(packed & 3, (packed >> 2) & 3), tl.join((packed >> 4) & 3, packed >> 6)
            parts = tl.permute(tl.join(low, high), (0, 3, 2, 1))
        return tl.reshape(parts, (row.shape[0], BLOCK)).to(tl.float32).to(dtype)
    else:
        column = tl.arange(0, BLOCK)
        there = live[:, None] & (column[None, :] < dim)
        return tl.load(row[:, None] + column[None, :], mask=there, other=0).to(tl.float32).to(dtype)


@triton.jit
def fold_codes(q, step, offset, channel, there, BITS: tl.constexpr):
    """A query whose product with codes, plus the second answer, is that of `q` with what the codes stand for."""
    shift = tl.zeros([q.shape[0]], tl.float32)
    if BITS < 16:
        numbers = q.to(tl.float32)
        shift = tl.sum(numbers * tl.load(offset + channel, mask=there, other=0.0)[None, :], 1)
        q = (numbers * tl.load(step + channel, mask=there, other=0.0)[None, :]).to(q.dtype)
    return q, shift


@triton.jit
def load_group(query, group, channel, there, head_stride, BLOCK_G: tl.constexpr):
    """The query heads of one stream, `[BLOCK_G, columns]`."""
    head = tl.arange(0, BLOCK_G)
    mask = (head[:, None] < group) & there[None, :]
    return tl.load(query + head[:, None] * head_stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def log_sum(logs):
    best = tl.max(logs, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    return base + tl.log(tl.sum(tl.exp(logs - base), 0))


def launches(function: Callable[P, R]) -> Callable[P, R]:
    """Launch what `function` launches on the device of its first argument, whichever device is current."""

    @functools.wraps(function)
    def there(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(iter((*args, *kwargs.values()))).device  # type: ignore[attr-defined]
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return function(*args, **kwargs)

    return there


def steps_of(vectors: Vectors, nothing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and offset of codes; `nothing` where vectors have none."""
    return (nothing if vectors.step is None else vectors.step, nothing if vectors.offset is None else vectors.offset)


def columns(dim: int, bits: int) -> int:
    """Columns of a tile that holds vectors of `dim` channels: see `channels`. A matrix product takes 16 at least."""
    parts = 8 // bits if bits < 8 else 1
    return max(16, parts * triton.next_power_of_2(-(-dim // parts)))


def precision() -> str:
    """How float32 matrices are multiplied: as precise as float32, on tensor cores where they can do that."""
    return "tf32x3" if torch.version.hip is None else "ieee"
