"""Tensors as small whole numbers: `[heads, tokens, head_dim]` float32 <-> bytes, with an error of at most half a step.

A number is a multiple of its row's step; symbols are those multiples relative to the row's centre, which is one too.
What lies more than 127 steps away is rare and is kept exactly, apart ("escapes"). A row is a channel of a head, or, in
the values of `int8`, a token of a head. Steps are written with the symbols, which costs a hundredth of them, so that a
reader needs nothing but the payload: not the calibration, nor the same way to choose steps.

    symbols' length, u32 | symbols | zstd of: centres, i32 | steps, bf16 | escapes: index, u32, and number, f32

`progressive` writes the numbers of `balanced` in two parts: a coarse one, in which every symbol is rounded to the
nearest multiple of three, and the residuals -1, 0 and 1. Both together give the bits that `balanced` gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..errors import ChunkError, InputError
from .calibration import SINKS, Calibration, Part
from .entropy import Ans, EntropyCoder, Zstd, compress, decompress
from .rope import Rotation

FIDELITY = {"balanced": (0.5, 0.22), "progressive": (0.5, 0.22), "small": (0.58, 0.28)}
"""Steps relative to a calibration's, and, without one, relative to a channel's standard deviation."""

COARSE = 3
"""Steps of `progressive` are that many times as wide until the residuals come: half the bytes. An odd number rounds
without a bias; at 5 the divergence of the next tokens is four times as high for a third of the bytes less.
"""
FINE_LAYERS = 2
"""First layers that are never coarse: theirs are few bytes, and every later layer takes up their errors."""

REACH = 127
_ESCAPE = np.dtype([("index", "<u4"), ("value", "<f4")])


def finest(rows: torch.Tensor) -> torch.Tensor:
    """Steps `[rows, 1]` that take every number of `rows` `[rows, n]` to within 127 steps of its row's mean."""
    return (rows - rows.mean(1, keepdim=True)).abs().amax(1, keepdim=True) / REACH


@dataclass(frozen=True)
class Symbols:
    """Numbers `[rows, n]` as multiples of their row's step.

    Args:
        near: int16 `[rows, n]`, relative to the centre, within `REACH`; 0 where a number has escaped.
        centres, steps: `[rows, 1]`, float32 and bfloat16.
        escapes: index and value of each number beyond reach.
    """

    near: np.ndarray
    centres: torch.Tensor
    steps: torch.Tensor
    escapes: np.ndarray

    @classmethod
    def of(cls, rows: torch.Tensor, steps: torch.Tensor) -> Symbols:
        """Round `rows` `[rows, n]`, float32 and finite, to steps of about `steps` `[rows, 1]`.

        Raises:
            InputError: a number is infinite or none.
        """
        # Below a millionth of its numbers a row's step is lost in float32; eight bits of precision are enough.
        floor = rows.abs().amax(1, keepdim=True) * 1e-6
        written = (steps.maximum(floor).clamp_min(1e-30) * (1 + 2**-8)).bfloat16()
        multiples = rows / written.float()
        if not bool(multiples.isfinite().all() & written.isfinite().all()):
            raise InputError(
                'Keys or values that are infinite or no number can only be published with codec="lossless".'
            )
        centres = multiples.mean(1, keepdim=True).round()
        symbols = (multiples.round() - centres).numpy()
        far = np.abs(symbols) > REACH
        escapes = np.empty(int(far.sum()), _ESCAPE)
        escapes["index"], escapes["value"] = np.flatnonzero(far), rows.numpy()[far]
        return cls(np.where(far, 0, symbols).astype(np.int16), centres, written, escapes)

    def to_bytes(self, coder: EntropyCoder, stride: int = 1) -> bytes:
        """The numbers, rounded to every `stride`-th step (odd)."""
        body = coder.encode((_thinned(self.near, stride) + 128).astype(np.uint8))
        side = [
            self.centres.numpy().astype("<i4"),
            self.steps.view(torch.int16).numpy().astype("<i2"),
            self.escapes,
        ]
        packed = compress(np.frombuffer(b"".join(part.tobytes() for part in side), np.uint8))
        return len(body).to_bytes(4, "little") + body + packed

    def residual(self, stride: int) -> bytes:
        """What `to_bytes` with this stride leaves out; nothing where that is nothing."""
        left = self.near - _thinned(self.near, stride) * stride
        return compress((left + stride // 2).astype(np.uint8)) if stride > 1 else b""


def _thinned(near: np.ndarray, stride: int) -> np.ndarray:
    return (near + stride // 2) // stride


def dequantize(
    data: bytes, shape: tuple[int, int], coder: EntropyCoder, stride: int = 1, residual: bytes | None = None
) -> torch.Tensor:
    """The rows that `Symbols.to_bytes` wrote with `stride`, `shape` float32; without a loss if the residual is given.

    Raises:
        ChunkError: `data` or `residual` is no such bytes.
    """
    size, fixed = int.from_bytes(data[:4], "little"), 6 * shape[0]
    most = fixed + shape[0] * shape[1] * _ESCAPE.itemsize
    side = np.frombuffer(decompress(data[4 + size :], most, fixed), np.uint8)
    if (len(side) - fixed) % _ESCAPE.itemsize:
        raise ChunkError("the side data of a payload ends early")
    symbols = coder.decode(data[4 : 4 + size], shape)
    centres = torch.from_numpy(side[: 4 * shape[0]].view("<i4").astype(np.float32))[:, None]
    steps = torch.from_numpy(side[4 * shape[0] : fixed].view("<i2").astype(np.int16)).view(torch.bfloat16).float()
    if not bool((steps.isfinite() & (steps > 0)).all()):
        raise ChunkError("a payload holds a step that is no positive number")
    numbers = torch.from_numpy(symbols.astype(np.float32))
    if stride > 1:
        numbers.sub_(128).mul_(stride).add_(128)
    if stride > 1 and residual is not None:
        left = np.frombuffer(decompress(residual, symbols.size), np.uint8).reshape(shape)
        if int(left.max()) >= stride:
            raise ChunkError("a residual is larger than the step that it refines")
        numbers += torch.from_numpy(left.astype(np.float32)).sub_(stride // 2)
    numbers.add_(centres - 128).mul_(steps[:, None])
    if len(side) > fixed:
        escapes = side[fixed:].view(_ESCAPE)
        if int(escapes["index"].max()) >= symbols.size or not bool(np.isfinite(escapes["value"]).all()):
            raise ChunkError("a payload holds an escape that lies outside its tensor")
        places = torch.from_numpy(escapes["index"].astype(np.int64))
        numbers.view(-1)[places] = torch.from_numpy(escapes["value"].astype(np.float32))
    return numbers


Lossy = Literal["int8", "balanced", "small", "progressive"]


@dataclass(frozen=True)
class Place:
    """Which part of the cache a tensor is: its layer, keys or values, and its first token in the sequence."""

    layer: int
    part: Part
    position: int


class Quantized:
    """The lossy codecs: whole numbers of steps, keys without their rotation, sinks apart.

    Args:
        codec: `int8` gives every row the finest step that fits in 8 bits. The steps of the others come from the
            calibration; without one they are a fixed part of each channel's standard deviation in the chunk.
        rotation: of the model's keys.
        calibration: of the model, or `None`.
    """

    def __init__(self, codec: Lossy, rotation: Rotation, calibration: Calibration | None) -> None:
        self.codec, self.rotation, self.calibration = codec, rotation, calibration
        self._coder: EntropyCoder = Ans() if codec in ("small", "progressive") else Zstd()

    def encode(self, tensor: torch.Tensor, place: Place) -> bytes:
        """The payload; of `progressive` its coarse part."""
        sinks = _sinks(place.position, tensor.shape[1])
        half = tensor[:, :sinks].to(_half(tensor.dtype)).cpu().contiguous()
        if not bool(half.isfinite().all()):
            raise InputError('Numbers beyond half precision can only be published with codec="lossless".')
        symbols = self._symbols(tensor, place)
        body = b"" if symbols is None else symbols.to_bytes(self._coder, self._stride(place))
        return half.view(torch.uint8).numpy().tobytes() + body

    def encode_residual(self, tensor: torch.Tensor, place: Place) -> bytes:
        """What the payload of `progressive` leaves out; nothing where that is nothing."""
        symbols = self._symbols(tensor, place)
        return b"" if symbols is None else symbols.residual(self._stride(place))

    def _symbols(self, tensor: torch.Tensor, place: Place) -> Symbols | None:
        """All but the sinks; `None` if that is nothing."""
        sinks = _sinks(place.position, tensor.shape[1])
        rest = tensor[:, sinks:].detach().cpu().float()
        if rest.numel() == 0:
            return None
        if place.part == "keys":
            rest = self.rotation.remove(rest, place.layer, place.position + sinks)
        rows = rest if self._by_token(place) else rest.transpose(1, 2)
        rows = rows.reshape(-1, rows.shape[2])
        return Symbols.of(rows, self._steps(rows, place))

    def decode(
        self,
        payload: bytes,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        place: Place,
        residual: bytes | None = None,
    ) -> torch.Tensor:
        """The tensor of `shape` and `dtype` in `payload`; of `progressive` the coarse one unless `residual` is given.

        Raises:
            ChunkError: the bytes are not such a tensor.
        """
        if place.layer >= len(self.rotation.frequencies):
            raise ChunkError(f"this model has no layer {place.layer}")
        heads, tokens, width = shape
        sinks = _sinks(place.position, tokens)
        size = 2 * heads * sinks * width
        if len(payload) < size:
            raise ChunkError("a payload ends within its first tokens")
        half = torch.frombuffer(bytearray(payload[:size]), dtype=_half(dtype)) if size else torch.empty(0, dtype=dtype)
        first = half.reshape(heads, sinks, width).to(dtype)
        if tokens == sinks:
            return first
        rows = (heads * (tokens - sinks), width) if self._by_token(place) else (heads * width, tokens - sinks)
        numbers = dequantize(payload[size:], rows, self._coder, self._stride(place), residual)
        if self._by_token(place):
            rest = numbers.reshape(heads, tokens - sinks, width)
        else:
            rest = numbers.reshape(heads, width, tokens - sinks).transpose(1, 2)
        if place.part == "keys":
            rest = self.rotation.apply(rest, place.layer, place.position + sinks)
        return torch.cat([first, rest.to(dtype)], dim=1) if sinks else rest.to(dtype)

    def _stride(self, place: Place) -> int:
        return COARSE if self.codec == "progressive" and place.layer >= FINE_LAYERS else 1

    def _by_token(self, place: Place) -> bool:
        """Whether rows are tokens: values of neighbouring channels are alike in size, keys are not."""
        return self.codec == "int8" and place.part == "values"

    def _steps(self, rows: torch.Tensor, place: Place) -> torch.Tensor:
        if self.codec == "int8":
            return finest(rows)
        calibrated, plain = FIDELITY[self.codec]
        if self.calibration is None:
            return rows.std(1, keepdim=True, correction=0) * plain
        return self.calibration.steps(place.layer, place.part) * calibrated


def _sinks(position: int, tokens: int) -> int:
    return min(max(SINKS - position, 0), tokens)


def _half(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.float32 else dtype
