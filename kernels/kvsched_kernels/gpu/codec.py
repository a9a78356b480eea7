"""Rotation and quantisation of keys and values as one Triton kernel: each number is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import launches

_BLOCK_N, _BLOCK_D = 32, 64

_ROUND = 12582912.0
"""Three times 2 ** 22: a float32 has no fraction there, so that adding it rounds to the nearest even number."""


@triton.jit
def _codec_kernel(
    source, step, centre, cos, sin, target,
    source_head, source_row, source_column, step_head, step_row, step_column, centre_head, centre_row, centre_column,
    target_head, target_row, target_column, tokens, dim, pairs, ROUND: tl.constexpr,
    DECODE: tl.constexpr, ENCODE: tl.constexpr, ROTATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    column = (tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :].to(tl.int64)
    inside = (row < tokens) & (column < dim)
    source += head * source_head + row * source_row
    step += head * step_head + row * step_row
    centre += head * centre_head + row * centre_row
    number = tl.load(source + column * source_column, mask=inside, other=0).to(tl.float32)
    if DECODE:
        number += tl.load(centre + column * centre_column, mask=inside, other=0.0)
        number *= tl.load(step + column * step_column, mask=inside, other=0.0)
    if ROTATE:
        turned = inside & (column < 2 * pairs)
        other = tl.where(column < pairs, column + pairs, column - pairs)
        partner = tl.load(source + other * source_column, mask=turned, other=0).to(tl.float32)
        if DECODE:
            partner += tl.load(centre + other * centre_column, mask=turned, other=0.0)
            partner *= tl.load(step + other * step_column, mask=turned, other=0.0)
        wave = row * pairs + column % pairs
        sine = tl.load(sin + wave, mask=turned, other=0.0)
        sine = tl.where(column < pairs, -sine, sine)
        number = number * tl.load(cos + wave, mask=turned, other=1.0) + partner * sine
    if ENCODE:
        number = tl.div_rn(number, tl.load(step + column * step_column, mask=inside, other=1.0))
        number = (number + ROUND) - ROUND - tl.load(centre + column * centre_column, mask=inside, other=0.0)
    place = target + head * target_head + row * target_row + column * target_column
    tl.store(place, number.to(target.dtype.element_ty), mask=inside)


@launches
def code(
    source: torch.Tensor,
    target: torch.Tensor,
    waves: tuple[torch.Tensor, torch.Tensor] | None,
    scale: tuple[torch.Tensor, torch.Tensor] | None = None,
    decode: bool = False,
) -> torch.Tensor:
    """Fill `target` `[H, n, D]` from `source` `[H, n, D]`, both of any strides.

    Args:
        waves: cosine and sine, float32 `[n, pairs]`, or `None` to leave channels unturned.
        scale: step and centre, float32, each expanded to `[H, n, D]`, or `None` for plain numbers on both sides.
        decode: the source holds symbols; else, if there is a scale, the target does.
    """
    heads, tokens, dim = source.shape
    if source.numel() == 0:
        return target
    cos, sin = (source, source) if waves is None else (wave.contiguous() for wave in waves)
    step, centre = (source, source) if scale is None else scale
    grid = (heads, triton.cdiv(tokens, _BLOCK_N), triton.cdiv(dim, _BLOCK_D))
    _codec_kernel[grid](
        source, step, centre, cos, sin, target,
        *source.stride(), *step.stride(), *centre.stride(), *target.stride(),
        tokens, dim, 0 if waves is None else cos.shape[1], ROUND=_ROUND,
        DECODE=decode, ENCODE=scale is not None and not decode, ROTATE=waves is not None,
        BLOCK_N=_BLOCK_N, BLOCK_D=_BLOCK_D,
    )  # fmt: skip
    return target
