"""One token chunk's keys and values as bytes.

A chunk object is a header followed by one payload a layer, **last layer first**: that is the order in which a loader
wants them, since streaming comes down from the top layer to meet computing, which comes up from the bottom.

    magic "KVSC" | header length, u32 LE | header, JSON | payload of layer L-1 | ... | payload of layer 0

The header holds version, codec, dtype, position, tokens, and for each layer its shapes, its payload's length and
SHA-256, so that decoding can start with any layer and nothing is taken on trust.

With `progressive` a chunk has a second object of the same form, its refinement, whose payloads are the residuals.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError

from ..errors import ChunkError
from .address import LAYOUT_VERSION, fingerprint
from .calibration import Calibration
from .entropy import compress, decompress
from .forward import kv_shapes
from .quantize import Place, Quantized
from .rope import Rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAGIC = b"KVSC"
MAX_HEADER = 1 << 20
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


class Codec(Protocol):
    """How the keys or the values of one layer of a chunk become bytes and come back."""

    def encode(self, tensor: torch.Tensor, place: Place) -> bytes:
        """Bytes of `tensor` `[heads, tokens, head_dim]`.

        Raises:
            InputError: the codec cannot write such numbers.
        """
        ...

    def decode(self, payload: bytes, shape: tuple[int, int, int], dtype: torch.dtype, place: Place) -> torch.Tensor:
        """The tensor of `shape` and `dtype` that `payload` holds.

        Raises:
            ChunkError: the payload is not such a tensor.
        """
        ...


class Lossless:
    """Every bit kept: the bytes of equal significance are put together (planes) and each plane is compressed by zstd.

    Sign and exponent bytes of neighbouring numbers are alike, mantissa bytes are noise; apart, the former shrink.
    """

    def encode(self, tensor: torch.Tensor, place: Place) -> bytes:
        raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        planes = raw.reshape(-1, tensor.element_size())
        frames = [compress(planes[:, i]) for i in range(planes.shape[1])]
        return np.array([len(frame) for frame in frames], "<u4").tobytes() + b"".join(frames)

    def decode(self, payload: bytes, shape: tuple[int, int, int], dtype: torch.dtype, place: Place) -> torch.Tensor:
        count, width = math.prod(shape), dtype.itemsize
        raw = np.empty((count, width), np.uint8)
        lengths = np.frombuffer(payload[: 4 * width], "<u4")
        if len(lengths) != width or int(lengths.sum()) + 4 * width != len(payload):
            raise ChunkError("the payload's planes do not add up to its length")
        start = 4 * width
        for plane, length in enumerate(lengths.tolist()):
            data = decompress(payload[start : start + length], count)
            raw[:, plane] = np.frombuffer(data, np.uint8)
            start += length
        return torch.from_numpy(raw).view(-1).view(dtype).reshape(shape)


CodecName = Literal["lossless", "int8", "balanced", "small", "progressive"]

# Numbers from outside are bounded before anything is allocated for them.
Count = Annotated[int, Field(strict=True, ge=1, le=1 << 24)]
Size = Annotated[int, Field(strict=True, ge=0, le=1 << 40)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class LayerEntry:
    """One layer's payload: its layer index, K and V shapes `[heads, tokens, head_dim]`, bytes and SHA-256 (hex).

    `key_bytes` of the `length` bytes are the keys, the rest the values.
    """

    layer: Size
    keys: tuple[Count, Count, Count]
    values: tuple[Count, Count, Count]
    key_bytes: Size
    length: Size
    sha256: Digest


@dataclass(frozen=True)
class ChunkHeader:
    """What a chunk object says of itself; `layers` in the order of their payloads, last layer first."""

    version: Literal[1]  # LAYOUT_VERSION
    codec: Literal[CodecName, "refinement"]
    calibration: Digest | None  # whose steps the numbers were rounded to; reading them does not take it
    dtype: Literal["float32", "float16", "bfloat16"]
    position: Size
    tokens: Count
    layers: tuple[LayerEntry, ...]

    def to_bytes(self) -> bytes:
        """Magic, length and JSON, as they stand at the start of the object."""
        text = _HEADER.dump_json(self)
        return MAGIC + len(text).to_bytes(4, "little") + text

    @classmethod
    def from_bytes(cls, data: bytes) -> ChunkHeader:
        """Read and check a header.

        Raises:
            ChunkError: `data` is no header of this version.
        """
        if data[:4] != MAGIC or len(data) > MAX_HEADER or int.from_bytes(data[4:8], "little") != len(data) - 8:
            raise ChunkError("these bytes are not the header of a chunk")
        try:
            return _HEADER.validate_json(data[8:])
        except ValidationError as error:
            raise ChunkError(f"the header of a chunk cannot be read: {error}") from error


_HEADER = TypeAdapter(ChunkHeader)


_CALIBRATED = ("balanced", "small", "progressive")


class Coder:
    """Writes and reads the chunk objects of one model with one codec.

    Args:
        codec: a step of the ladder.
        dtype: of the model's keys and values.
        rotation: of the model's keys.
        calibration: of the model, for the codecs that use one to write; reading does not take it.
    """

    def __init__(
        self, codec: CodecName, dtype: torch.dtype, rotation: Rotation, calibration: Calibration | None = None
    ) -> None:
        self.codec, self.dtype = codec, dtype
        self.calibration = calibration if codec in _CALIBRATED else None
        self._codec: Codec = Lossless() if codec == "lossless" else Quantized(codec, rotation, self.calibration)

    @classmethod
    def of(cls, model: PreTrainedModel, codec: CodecName, calibration: Calibration | None = None) -> Coder:
        """The coder for the chunks of `model`; without a calibration it takes the one that this machine has kept.

        Raises:
            ChunkError: the calibration is another model's.
        """
        shapes = kv_shapes(model.config)
        if codec in _CALIBRATED:
            calibration = calibration or Calibration.find(fingerprint(model))
            if calibration is not None:
                calibration.check(fingerprint(model), shapes)
        return cls(codec, model.dtype, Rotation.of(model, len(shapes)), calibration)

    def encode(self, position: int, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[ChunkHeader, bytes]:
        """A chunk's header and its whole object.

        Args:
            position: the chunk's first token in the sequence.
            layers: keys and values `[heads, tokens, head_dim]` of each layer, first layer first.

        Raises:
            InputError: a quantising codec was given numbers that are not finite.
        """
        return self._object(self.codec, position, layers, self._codec.encode)

    def encode_refinement(
        self, position: int, layers: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[ChunkHeader, bytes] | None:
        """The chunk's second object, or `None` where the codec has none; arguments as in `encode`."""
        if not isinstance(self._codec, Quantized) or self.codec != "progressive":
            return None
        return self._object("refinement", position, layers, self._codec.encode_residual)

    def _object(
        self,
        name: Literal[CodecName, "refinement"],
        position: int,
        layers: list[tuple[torch.Tensor, torch.Tensor]],
        encode: Callable[[torch.Tensor, Place], bytes],
    ) -> tuple[ChunkHeader, bytes]:
        entries, payloads = [], []
        for index, (keys, values) in reversed(list(enumerate(layers))):
            key_bytes = encode(keys, Place(index, "keys", position))
            payload = key_bytes + encode(values, Place(index, "values", position))
            digest = hashlib.sha256(payload).hexdigest()
            entries.append(LayerEntry(index, _shape(keys), _shape(values), len(key_bytes), len(payload), digest))
            payloads.append(payload)
        dtype: Any = str(self.dtype).removeprefix("torch.")
        calibration = self.calibration.id if self.calibration else None
        tokens = layers[0][0].shape[1]
        header = ChunkHeader(LAYOUT_VERSION, name, calibration, dtype, position, tokens, tuple(entries))
        return header, b"".join([header.to_bytes(), *payloads])

    def decode(self, header: ChunkHeader, entry: LayerEntry, payload: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[heads, tokens, head_dim]` of one layer, in the model's dtype.

        Raises:
            ChunkError: the payload is truncated, altered or not what `entry` says, or was written by another codec.
        """
        key_bytes, value_bytes = self._parts(self.codec, header, entry, payload)
        places = Place(entry.layer, "keys", header.position), Place(entry.layer, "values", header.position)
        keys = self._codec.decode(key_bytes, entry.keys, self.dtype, places[0])
        return keys, self._codec.decode(value_bytes, entry.values, self.dtype, places[1])

    def refine(
        self, header: ChunkHeader, entry: LayerEntry, payload: bytes, base: Base
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `decode`, for a layer of a refinement and the base that it refines.

        Raises:
            ChunkError: as in `decode`, or the codec has no refinements.
        """
        if not isinstance(self._codec, Quantized):
            raise ChunkError(f"{self.codec} chunks have no refinement")
        bases = self._parts(self.codec, base.header, base.entry, base.payload)
        residuals = self._parts("refinement", header, entry, payload)
        found = []
        for part, shape, data, residual in zip(
            ("keys", "values"), (entry.keys, entry.values), bases, residuals, strict=True
        ):
            place = Place(entry.layer, part, header.position)  # type: ignore[arg-type]
            found.append(self._codec.decode(data, shape, self.dtype, place, residual))
        return found[0], found[1]

    def _parts(self, codec: str, header: ChunkHeader, entry: LayerEntry, payload: bytes) -> tuple[bytes, bytes]:
        """The bytes of the keys and those of the values, once checked."""
        if (header.codec, _DTYPES[header.dtype]) != (codec, self.dtype):
            raise ChunkError(f"the chunk at token {header.position} was written by another codec or in another dtype")
        if len(payload) != entry.length or hashlib.sha256(payload).hexdigest() != entry.sha256:
            raise ChunkError(f"layer {entry.layer} of the chunk at token {header.position} is truncated or altered")
        return payload[: entry.key_bytes], payload[entry.key_bytes :]


@dataclass(frozen=True)
class Base:
    """A layer of a `progressive` chunk as it came, until its refinement comes too."""

    header: ChunkHeader
    entry: LayerEntry
    payload: bytes


def _shape(tensor: torch.Tensor) -> tuple[int, int, int]:
    heads, tokens, head_dim = tensor.shape
    return heads, tokens, head_dim
