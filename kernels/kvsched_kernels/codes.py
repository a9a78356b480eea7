"""Vectors in a few bits a channel: packed, and multiplied without being unpacked as a whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Vectors:
    """C vectors of every stream, as plain numbers or as codes of a few bits.

    Args:
        data: floating `[S, C, D]`, or uint8 `[S, C, ceil(D * bits / 8)]` in the form of `pack`.
        bits: of a code: 2, 4 or 8; 16 or more for plain numbers.
        step, offset: float32 `[S, 1, D]`: a number is `code * step + offset`.
    """

    data: torch.Tensor
    bits: int = 16
    step: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def read(self, dim: int) -> torch.Tensor:
        """All vectors: float32 (float64 if that is what they are) `[S, C, dim]`."""
        if self.step is None or self.offset is None:
            return self.data if self.data.dtype == torch.float64 else self.data.float()
        return unpack(self.data, self.bits, dim).float() * self.step + self.offset

    def dot(self, query: torch.Tensor) -> torch.Tensor:
        """Products with `query` `[S, G, D]`: float32 `[S, G, C]`."""
        query = query.float()
        if self.step is None or self.offset is None:
            return torch.bmm(query, self.data.float().transpose(1, 2))
        return dot(query * self.step, self.data, self.bits).add_((query * self.offset).sum(-1, keepdim=True))

    def rows(self, row: torch.Tensor) -> Vectors:
        """Those of int64 `row` `[S, n]`, copied."""
        return replace(self, data=rows(self.data, row))

    def mix(self, weight: torch.Tensor, dim: int) -> torch.Tensor:
        """Sums of vectors by float32 `weight` `[S, G, C]`: float32 `[S, G, dim]`."""
        if self.step is None or self.offset is None:
            return torch.bmm(weight, self.data.float())
        return mix(weight, self.data, self.bits, dim) * self.step + weight.sum(-1, keepdim=True) * self.offset


_AT_ONCE = 1 << 19
"""Numbers that are unpacked at once: no budget counts them, and more at a time are not faster."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes below `2 ** bits` in bytes: uint8 `[..., D]` to uint8 `[..., ceil(D * bits / 8)]`.

    Byte j holds channels j, j + W, j + 2 W, ... of W bytes, lowest bits first, so that each part of the channels is
    read by one shift and one mask.

    Args:
        bits: 2, 4 or 8.
    """
    parts = 8 // bits
    width = -(-codes.shape[-1] // parts)
    codes = torch.nn.functional.pad(codes, (0, parts * width - codes.shape[-1]))
    packed = codes[..., :width].clone()
    for part in range(1, parts):
        packed |= codes[..., part * width : (part + 1) * width] << (part * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 `[..., dim]`."""
    return torch.cat([_part(packed, bits, part) for part in range(8 // bits)], dim=-1)[..., :dim]


def dot(query: torch.Tensor, packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Products of queries with codes: float32 `[S, G, C]` for `query` `[S, G, D]` and `packed` `[S, C, W]`."""
    parts, width = 8 // bits, packed.shape[-1]
    if lacking := parts * width - query.shape[-1]:
        query = torch.nn.functional.pad(query, (0, lacking))
    scaled = [piece.float() * 2.0 ** (-bits * part) for part, piece in enumerate(query.split(width, dim=-1))]
    factor = [*(one - following for one, following in pairwise(scaled)), scaled[-1]]
    products = [_dot(factor, piece, bits) for piece in _pieces(packed, query.shape[2])]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def mix(weight: torch.Tensor, packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Sums of codes: float32 `[S, G, dim]` for float32 `weight` `[S, G, C]` and `packed` `[S, C, W]`."""
    pieces = _pieces(packed, dim)
    sums = [_mix(*both, bits) for both in zip(weight.split(pieces[0].shape[1], dim=2), pieces, strict=True)]
    return (torch.stack(sums).sum(0) if len(sums) > 1 else sums[0])[..., :dim]


def rows(data: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """The rows int64 `[S, n]` of `[S, C, W]`: `[S, n, W]`."""
    streams, clusters, width = data.shape
    first = clusters * torch.arange(streams, device=row.device).unsqueeze(1)
    return data.view(-1, width).index_select(0, (row + first).flatten()).view(*row.shape, width)


def _pieces(packed: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    return packed.split(max(1, _AT_ONCE // max(1, packed.shape[0] * dim)), dim=1)


def _dot(factor: list[torch.Tensor], packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Products with the lowest codes of every byte, with the lowest two, ...: factors are such that codes add up."""
    total = torch.bmm(factor[0], _lowest(packed, bits, 1).transpose(1, 2))
    for part in range(1, len(factor)):
        total.baddbmm_(factor[part], _lowest(packed, bits, part + 1).transpose(1, 2))
    return total


def _mix(weight: torch.Tensor, packed: torch.Tensor, bits: int) -> torch.Tensor:
    sums = [torch.bmm(weight, _lowest(packed, bits, part + 1)) for part in range(8 // bits)]
    apart = [(more - less) / 2 ** (bits * part) for part, (less, more) in enumerate(pairwise(sums), 1)]
    return torch.cat([sums[0], *apart], dim=-1)


def _lowest(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The lowest `count` codes of every byte as one number, float32: a mask is cheaper than a shift and a mask."""
    return (packed if count * bits == 8 else packed & (2 ** (count * bits) - 1)).float()


def _part(packed: torch.Tensor, bits: int, part: int) -> torch.Tensor:
    return packed if bits == 8 else (packed >> (part * bits)) & (2**bits - 1)
