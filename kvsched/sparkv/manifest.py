"""What a store holds of one prefix: a small JSON object per chunk boundary, named by the chunk's address.

A manifest lists *all* chunks up to its own, so the deepest one that exists describes the longest published prefix: one
round trip asks which exist, a second fetches that one, and then bytes flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from ..errors import ChunkError
from .codec import MAX_HEADER, Count, Digest, Size


@dataclass(frozen=True)
class ChunkEntry:
    """One chunk object: its address, its header's bytes and SHA-256 (hex), its payloads' bytes, last layer first."""

    address: Digest
    header_bytes: Annotated[int, Field(strict=True, ge=8, le=MAX_HEADER)]
    header_sha256: Digest
    payload_bytes: tuple[Size, ...]

    def payload_span(self, upper: int, lower: int) -> tuple[int, int]:
        """Bytes `[start, stop)` in the object that hold the payloads of layers `upper - 1` down to `lower`."""
        layers = len(self.payload_bytes)
        start = self.header_bytes + sum(self.payload_bytes[: layers - upper])
        return start, start + sum(self.payload_bytes[layers - upper : layers - lower])


@dataclass(frozen=True)
class Manifest:
    """A published prefix: the model's fingerprint, and its chunks from the first on."""

    fingerprint: Digest
    codec: str
    chunk_tokens: Count
    chunks: tuple[ChunkEntry, ...]

    def to_bytes(self) -> bytes:
        """The manifest as JSON."""
        return _MANIFEST.dump_json(self)

    @classmethod
    def from_bytes(cls, data: bytes, fingerprint: str, codec: str, addresses: list[str], layers: int) -> Manifest:
        """Read a manifest and check that it describes the chunks named by `addresses`, each with `layers` payloads.

        Raises:
            ChunkError: it does not.
        """
        try:
            manifest = _MANIFEST.validate_json(data)
        except ValidationError as error:
            raise ChunkError(f"a manifest cannot be read: {error}") from error
        if (manifest.fingerprint, manifest.codec) != (fingerprint, codec):
            raise ChunkError("a manifest describes another model or codec")
        if [chunk.address for chunk in manifest.chunks] != addresses:
            raise ChunkError("a manifest describes other chunks")
        if any(len(chunk.payload_bytes) != layers for chunk in manifest.chunks):
            raise ChunkError("a manifest describes chunks with another number of layers")
        return manifest


_MANIFEST = TypeAdapter(Manifest)


def manifest_path(address: str) -> str:
    """Where the manifest that ends with chunk `address` lies in a store."""
    return f"manifests/{address[:2]}/{address}.json"


def chunk_path(address: str) -> str:
    """Where the object of chunk `address` lies in a store."""
    return f"chunks/{address[:2]}/{address}.kv"
