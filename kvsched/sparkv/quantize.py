"""Tensors as small whole numbers: `[heads, tokens, head_dim]` float32 <-> bytes, with an error of at most half a step.

A number is a multiple of its row's step; symbols are those multiples relative to the row's centre, which is one too.
What lies more than 127 steps away is rare and is kept exactly, apart ("escapes"). A row is a channel of a head, or, in
the values of `int8`, a token of a head.

    symbols' length, u32 | symbols | zstd of: centres, i32 | steps, f32 (if the rows chose them) | escapes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import zstandard

from ..errors import ChunkError, InputError
from .calibration import SINKS, Calibration, Part
from .rope import Rotation

FIDELITY = {"balanced": (0.5, 0.22), "small": (0.58, 0.28)}
"""Steps relative to a calibration's, and, without one, relative to a channel's standard deviation."""

REACH = 127
_ESCAPE = np.dtype([("index", "<u4"), ("value", "<f4")])


class EntropyCoder(Protocol):
    """Bytes for symbols `[rows, n]` u8 and back; the rows of a tensor come in the same order each time."""

    def encode(self, symbols: np.ndarray) -> bytes: ...

    def decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray: ...


class Zstd:
    """Huffman codes fitted to what is at hand; fast."""

    def encode(self, symbols: np.ndarray) -> bytes:
        return compress(symbols)

    def decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray:
        return np.frombuffer(decompress(data, shape[0] * shape[1]), np.uint8).reshape(shape)


def compress(data: np.ndarray) -> bytes:
    """A zstd frame that holds the bytes of `data` and says how many they are."""
    return zstandard.compress(np.ascontiguousarray(data).data, 1)


def decompress(frame: bytes, most: int, least: int | None = None) -> bytes:
    """The `least` to `most` bytes in a zstd frame; exactly `most` if `least` is left out.

    Raises:
        ChunkError: the frame is damaged, or says that it holds more or fewer; nothing is allocated then.
    """
    try:
        size = zstandard.frame_content_size(frame)
        if not (most if least is None else least) <= size <= most:
            raise ChunkError(f"a part of a payload should hold {most} bytes, not {size}")
        return zstandard.ZstdDecompressor().decompress(frame)
    except zstandard.ZstdError as error:
        raise ChunkError(f"a part of a payload cannot be decompressed: {error}") from error


def finest(rows: torch.Tensor) -> torch.Tensor:
    """Steps `[rows, 1]` that take every number of `rows` `[rows, n]` to within 127 steps of its row's mean."""
    return (rows - rows.mean(1, keepdim=True)).abs().amax(1, keepdim=True) / REACH


def quantize(
    rows: torch.Tensor, steps: torch.Tensor | Callable[[torch.Tensor], torch.Tensor], coder: EntropyCoder
) -> bytes:
    """Bytes of `rows` `[rows, n]`, float32 and finite.

    Args:
        steps: `[rows, 1]` float32, known to the decoder; or a function that chooses them, which are then written.
    """
    own = np.empty(0, "<f4")
    if callable(steps):
        # Below a millionth of its numbers a row's step is lost in float32; eight bits of precision are enough.
        floor = rows.abs().amax(1, keepdim=True) * 1e-6
        steps = (steps(rows).maximum(floor).clamp_min(1e-30) * (1 + 2**-8)).bfloat16().float()
        own = steps.numpy().ravel()
    multiples = rows / steps
    if not bool(multiples.isfinite().all()):
        raise InputError('Keys or values that are infinite or no number can only be published with codec="lossless".')
    centres = multiples.mean(1, keepdim=True).round().clamp(-(2**30), 2**30)
    symbols = (multiples.round() - centres).numpy()
    far = np.abs(symbols) > REACH
    escapes = np.empty(int(far.sum()), _ESCAPE)
    escapes["index"], escapes["value"] = np.flatnonzero(far), rows.numpy()[far]
    symbols = (np.where(far, 0, symbols) + 128).astype(np.uint8)
    body = coder.encode(symbols)
    side = b"".join([centres.numpy().astype("<i4").tobytes(), own.tobytes(), escapes.tobytes()])
    return len(body).to_bytes(4, "little") + body + compress(np.frombuffer(side, np.uint8))


def dequantize(data: bytes, shape: tuple[int, int], steps: torch.Tensor | None, coder: EntropyCoder) -> torch.Tensor:
    """The rows that `quantize` wrote, `shape` float32.

    Args:
        steps: `[rows, 1]`, or `None` where the rows chose them.

    Raises:
        ChunkError: `data` is no such bytes.
    """
    rows, _ = shape
    size = int.from_bytes(data[:4], "little")
    fixed = 4 * rows * (2 if steps is None else 1)
    most = fixed + shape[0] * shape[1] * _ESCAPE.itemsize
    side = np.frombuffer(decompress(data[4 + size :], most, fixed), np.uint8)
    symbols = coder.decode(data[4 : 4 + size], shape)
    if (len(side) - fixed) % _ESCAPE.itemsize:
        raise ChunkError("the side data of a payload ends early")
    centres = torch.from_numpy(side[: 4 * rows].view("<i4").astype(np.float32))[:, None]
    if steps is None:
        steps = torch.from_numpy(side[4 * rows : fixed].view("<f4").copy())[:, None]
        if not bool((steps.isfinite() & (steps > 0)).all()):
            raise ChunkError("a payload holds a step that is no positive number")
    numbers = torch.from_numpy(symbols.astype(np.float32)).add_(centres - 128).mul_(steps)
    if len(side) > fixed:
        escapes = side[fixed:].view(_ESCAPE)
        if int(escapes["index"].max()) >= symbols.size or not bool(np.isfinite(escapes["value"]).all()):
            raise ChunkError("a payload holds an escape that lies outside its tensor")
        numbers.view(-1)[torch.from_numpy(escapes["index"].astype(np.int64))] = torch.from_numpy(
            escapes["value"].copy()
        )
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

    def encode(self, tensor: torch.Tensor, place: Place) -> bytes:
        sinks = _sinks(place.position, tensor.shape[1])
        half = tensor[:, :sinks].to(_half(tensor.dtype)).cpu().contiguous()
        if not bool(half.isfinite().all()):
            raise InputError('Numbers beyond half precision can only be published with codec="lossless".')
        rest = tensor[:, sinks:].detach().cpu().float()
        if place.part == "keys":
            rest = self.rotation.remove(rest, place.layer, place.position + sinks)
        steps = self._steps(place)
        if rest.numel() == 0:
            return half.view(torch.uint8).numpy().tobytes()
        body = quantize(self._rows(rest, place), self._choose if steps is None else steps, self._coder(place))
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
        steps = self._steps(place)
        if steps is not None and len(steps) != rows[0]:
            raise ChunkError(f"layer {place.layer} has another shape than its calibration")
        numbers = dequantize(payload[size:], rows, steps, self._coder(place))
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

    def _rows(self, tensor: torch.Tensor, place: Place) -> torch.Tensor:
        rows = tensor if self._by_token(place) else tensor.transpose(1, 2)
        return rows.reshape(-1, rows.shape[2])

    def _steps(self, place: Place) -> torch.Tensor | None:
        if self.codec == "int8" or self.calibration is None:
            return None
        return self.calibration.steps(place.layer, place.part) * FIDELITY[self.codec][0]

    def _choose(self, rows: torch.Tensor) -> torch.Tensor:
        if self.codec == "int8":
            return finest(rows)
        return rows.std(1, keepdim=True, correction=0) * FIDELITY[self.codec][1]

    def _coder(self, place: Place) -> EntropyCoder:
        return Zstd()


def _sinks(position: int, tokens: int) -> int:
    return min(max(SINKS - position, 0), tokens)


def _half(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.float32 else dtype
