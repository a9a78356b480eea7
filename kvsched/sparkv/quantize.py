"""Tensors as small whole numbers: `[heads, tokens, head_dim]` float32 <-> bytes, with an error of at most half a step.

A number is a multiple of its row's step; symbols are those multiples relative to the row's centre, which is one too.
What lies more than 127 steps away is rare and is kept exactly, apart ("escapes"). A row is a channel of a head, or, in
the values of `int8`, a token of a head. Steps are written with the symbols, which costs a hundredth of them, so that a
reader needs nothing but the payload: not the calibration, nor the same way to choose steps.

    symbols' length, u32 | symbols | zstd of: centres, i32 | steps, bf16 | escapes: index, u32, and number, f32
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

FIDELITY = {"balanced": (0.5, 0.22), "small": (0.58, 0.28)}
"""Steps relative to a calibration's, and, without one, relative to a channel's standard deviation."""

REACH = 127
_ESCAPE = np.dtype([("index", "<u4"), ("value", "<f4")])


def finest(rows: torch.Tensor) -> torch.Tensor:
    """Steps `[rows, 1]` that take every number of `rows` `[rows, n]` to within 127 steps of its row's mean."""
    return (rows - rows.mean(1, keepdim=True)).abs().amax(1, keepdim=True) / REACH


def quantize(rows: torch.Tensor, steps: torch.Tensor, coder: EntropyCoder) -> bytes:
    """Bytes of `rows` `[rows, n]`, float32 and finite, in steps of about `steps` `[rows, 1]`.

    Raises:
        InputError: a number is infinite or none.
    """
    # Below a millionth of its numbers a row's step is lost in float32; eight bits of precision are enough.
    floor = rows.abs().amax(1, keepdim=True) * 1e-6
    written = (steps.maximum(floor).clamp_min(1e-30) * (1 + 2**-8)).bfloat16()
    multiples = rows / written.float()
    if not bool(multiples.isfinite().all() & written.isfinite().all()):
        raise InputError('Keys or values that are infinite or no number can only be published with codec="lossless".')
    centres = multiples.mean(1, keepdim=True).round()
    symbols = (multiples.round() - centres).numpy()
    far = np.abs(symbols) > REACH
    escapes = np.empty(int(far.sum()), _ESCAPE)
    escapes["index"], escapes["value"] = np.flatnonzero(far), rows.numpy()[far]
    body = coder.encode((np.where(far, 0, symbols) + 128).astype(np.uint8))
    side = [centres.numpy().astype("<i4"), written.view(torch.int16).numpy().astype("<i2"), escapes]
    packed = compress(np.frombuffer(b"".join(part.tobytes() for part in side), np.uint8))
    return len(body).to_bytes(4, "little") + body + packed


def dequantize(data: bytes, shape: tuple[int, int], coder: EntropyCoder) -> torch.Tensor:
    """The rows that `quantize` wrote, `shape` float32.

    Raises:
        ChunkError: `data` is no such bytes.
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
    numbers = torch.from_numpy(symbols.astype(np.float32)).add_(centres - 128).mul_(steps[:, None])
    if len(side) > fixed:
        escapes = side[fixed:].view(_ESCAPE)
        if int(escapes["index"].max()) >= symbols.size or not bool(np.isfinite(escapes["value"]).all()):
            raise ChunkError("a payload holds an escape that lies outside its tensor")
        places = torch.from_numpy(escapes["index"].astype(np.int64))
        numbers.view(-1)[places] = torch.from_numpy(escapes["value"].astype(np.float32))
    return numbers


@dataclass(frozen=True)
class Place:
    """Which part of the cache a tensor is: its layer, keys or values, and its first token in the sequence."""

    layer: int
    part: Part
    position: int


class Quantized:
    """The lossy codecs: whole numbers of steps, keys without their rotation, sinks apart.

    Args:
        codec: `int8` gives every row the finest step that fits in 8 bits. The steps of `balanced` and `small` come
            from the calibration; without one they are a fixed part of each channel's standard deviation in the chunk.
        rotation: of the model's keys.
        calibration: of the model, or `None`.
    """

    def __init__(
        self, codec: Literal["int8", "balanced", "small"], rotation: Rotation, calibration: Calibration | None
    ) -> None:
        self.codec, self.rotation, self.calibration = codec, rotation, calibration
        self._coder: EntropyCoder = Ans() if codec == "small" else Zstd()

    def encode(self, tensor: torch.Tensor, place: Place) -> bytes:
        sinks = _sinks(place.position, tensor.shape[1])
        half = tensor[:, :sinks].to(_half(tensor.dtype)).cpu().contiguous()
        if not bool(half.isfinite().all()):
            raise InputError('Numbers beyond half precision can only be published with codec="lossless".')
        rest = tensor[:, sinks:].detach().cpu().float()
        if place.part == "keys":
            rest = self.rotation.remove(rest, place.layer, place.position + sinks)
        if rest.numel() == 0:
            return half.view(torch.uint8).numpy().tobytes()
        rows = rest if self._by_token(place) else rest.transpose(1, 2)
        rows = rows.reshape(-1, rows.shape[2])
        body = quantize(rows, self._steps(rows, place), self._coder)
        return half.view(torch.uint8).numpy().tobytes() + body

    def decode(self, payload: bytes, shape: tuple[int, int, int], dtype: torch.dtype, place: Place) -> torch.Tensor:
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
        numbers = dequantize(payload[size:], rows, self._coder)
        if self._by_token(place):
            rest = numbers.reshape(heads, tokens - sinks, width)
        else:
            rest = numbers.reshape(heads, width, tokens - sinks).transpose(1, 2)
        if place.part == "keys":
            rest = self.rotation.apply(rest, place.layer, place.position + sinks)
        return torch.cat([first, rest.to(dtype)], dim=1) if sinks else rest.to(dtype)

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
