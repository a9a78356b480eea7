"""One token chunk's keys and values as bytes.

A chunk object is a header followed by one payload a layer, **last layer first**: that is the order in which a loader
wants them, since streaming comes down from the top layer to meet computing, which comes up from the bottom.

    magic "KVSC" | header length, u32 LE | header, JSON | payload of layer L-1 | ... | payload of layer 0

The header holds version, codec, dtype, position, tokens, and for each layer its shapes, its payload's length and
SHA-256, so that decoding can start with any layer and nothing is taken on trust.
"""

from __future__ import annotations

import hashlib
import math
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


CodecName = Literal["lossless", "int8", "balanced", "small"]

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
    codec: CodecName
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
        self.calibration = calibration if codec in ("balanced", "small") else None
        self._codec: Codec = Lossless() if codec == "lossless" else Quantized(codec, rotation, self.calibration)

    @classmethod
    def of(cls, model: PreTrainedModel, codec: CodecName, calibration: Calibration | None = None) -> Coder:
        """The coder for the chunks of `model`; without a calibration it takes the one that this machine has kept.

        Raises:
            ChunkError: the calibration is another model's.
        """
        shapes = kv_shapes(model.config)
        if codec in ("balanced", "small"):
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
        entries, payloads = [], []
        for index, (keys, values) in reversed(list(enumerate(layers))):
            key_bytes = self._codec.encode(keys, Place(index, "keys", position))
            value_bytes = self._codec.encode(values, Place(index, "values", position))
            payload = key_bytes + value_bytes
            digest = hashlib.sha256(payload).hexdigest()
            entries.append(LayerEntry(index, _shape(keys), _shape(values), len(key_bytes), len(payload), digest))
            payloads.append(payload)
        name: Any = str(self.dtype).removeprefix("torch.")
        calibration_id = self.calibration.id if self.calibration else None
        header = ChunkHeader(
            LAYOUT_VERSION, self.codec, calibration_id, name, position, layers[0][0].shape[1], tuple(entries)
        )
        return header, b"".join([header.to_bytes(), *payloads])

    def decode(self, header: ChunkHeader, entry: LayerEntry, payload: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[heads, tokens, head_dim]` of one layer, in the model's dtype.

        Raises:
            ChunkError: the payload is truncated, altered or not what `entry` says, or was written by another codec.
        """
        if (header.codec, _DTYPES[header.dtype]) != (self.codec, self.dtype):
            raise ChunkError(f"the chunk at token {header.position} was written by another codec or in another dtype")
        if len(payload) != entry.length or hashlib.sha256(payload).hexdigest() != entry.sha256:
            raise ChunkError(f"layer {entry.layer} of the chunk at token {header.position} is truncated or altered")
        parts = payload[: entry.key_bytes], payload[entry.key_bytes :]
        keys = self._codec.decode(parts[0], entry.keys, self.dtype, Place(entry.layer, "keys", header.position))
        return keys, self._codec.decode(
            parts[1], entry.values, self.dtype, Place(entry.layer, "values", header.position)
        )


def _shape(tensor: torch.Tensor) -> tuple[int, int, int]:
    heads, tokens, head_dim = tensor.shape
    return heads, tokens, head_dim
