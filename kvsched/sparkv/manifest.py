"""What a store holds of one prefix: a small JSON object per chunk boundary, named by the chunk's address.

A manifest lists *all* chunks up to its own, so the deepest one that exists describes the longest published prefix: one
round trip asks which exist, a second fetches that one, and then bytes flow.

A tenant's manifests carry an HMAC-SHA256 over the JSON without it. A manifest holds each header's digest and a header
each payload's, so with the signature nothing of a prefix is taken on the store's word.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from ..errors import ChunkError
from .address import Prefix, refinement_address
from .codec import MAX_HEADER, Count, Digest, Size
from .store import Store

MAX_MANIFEST = 1 << 24
"""Bytes: ten times what a million tokens in chunks of 256 need in a model of 100 layers."""

_PROBES = 64


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
    """A published prefix.

    Args:
        fingerprint: of the model.
        chunks: from the first on.
        refinements: with `progressive`, the second object of each chunk.
        signature: if a tenant signed it.
    """

    fingerprint: Digest
    codec: str
    chunk_tokens: Count
    chunks: tuple[ChunkEntry, ...]
    refinements: tuple[ChunkEntry, ...] | None = None
    signature: Digest | None = None

    @property
    def objects(self) -> tuple[ChunkEntry, ...]:
        """Every object that belongs to it."""
        return self.chunks + (self.refinements or ())

    def to_bytes(self, key: bytes = b"") -> bytes:
        """The manifest as JSON, signed if there is a key (`Prefix.key`)."""
        return _dump(replace(self, signature=self._sign(key) if key else None))

    def _sign(self, key: bytes) -> str:
        return hmac.digest(key, _dump(replace(self, signature=None)), "sha256").hex()

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read a manifest of whatever prefix; its signature is not checked.

        Raises:
            ChunkError: it is none.
        """
        try:
            return _MANIFEST.validate_json(data)
        except ValidationError as error:
            raise ChunkError(f"a manifest cannot be read: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes, prefix: Prefix) -> Manifest:
        """Read a manifest and check that it describes exactly `prefix`, in sizes that it can have.

        Raises:
            ChunkError: it does not, or its signature is not the tenant's.
        """
        manifest = cls.parse(data)
        if prefix.key and not hmac.compare_digest(manifest._sign(prefix.key), manifest.signature or ""):
            raise ChunkError("a manifest is not signed by this tenant")
        found = (manifest.fingerprint, manifest.codec, manifest.chunk_tokens)
        if found != (prefix.fingerprint, prefix.codec, prefix.chunk_tokens):
            raise ChunkError("a manifest describes another model, codec or chunk size")
        if tuple(chunk.address for chunk in manifest.chunks) != prefix.addresses:
            raise ChunkError("a manifest describes other chunks")
        refined = manifest.chunks if prefix.codec == "progressive" else ()
        addresses = [refinement_address(chunk.address, chunk.header_sha256) for chunk in refined]
        if [chunk.address for chunk in manifest.refinements or ()] != addresses:
            raise ChunkError("a manifest describes other refinements")
        limits = prefix.payload_limits[::-1]  # last layer first, as the payloads lie
        for chunk in manifest.objects:
            if len(chunk.payload_bytes) != len(limits):
                raise ChunkError("a manifest describes chunks with another number of layers")
            if any(size > limit for size, limit in zip(chunk.payload_bytes, limits, strict=True)):
                raise ChunkError("a manifest describes payloads larger than this model's can be")
        return manifest


_MANIFEST = TypeAdapter(Manifest)


def _dump(manifest: Manifest) -> bytes:
    # Fields without a value are left out, so that one added later does not change what earlier manifests sign.
    return _MANIFEST.dump_json(manifest, exclude_none=True)


async def find(store: Store, prefix: Prefix) -> Manifest | None:
    """The manifest of the longest published beginning of `prefix`, or `None`.

    Up to 64 chunks: one round trip, in which all are asked for, and a second for the manifest if there is one. Beyond,
    64 boundaries spread evenly are asked for, then those between the deepest found and the next, so that each factor
    of 64 costs one round trip more: three for a hit among 4,096 chunks (a million tokens in chunks of 256). Opening
    connections is not counted: HTTP/1.1 needs one for each request in flight, opened at the same time.

    Raises:
        StoreError: the store does not answer.
        ChunkError: what it holds is no manifest of this prefix.
    """
    deepest, end = 0, len(prefix.addresses)
    while deepest < end:
        step = -(-(end - deepest) // _PROBES)
        probes = [*range(deepest + step, end, step), end]
        there = await store.exists(manifest_path(prefix.addresses[chunks - 1]) for chunks in probes)
        hit = max((index for index, found in enumerate(there) if found), default=-1)
        end = probes[hit + 1] - 1 if hit + 1 < len(probes) else end
        deepest = probes[hit] if hit >= 0 else deepest
    if deepest == 0:
        return None
    found = prefix.first(deepest)
    return Manifest.from_bytes(await store.get(manifest_path(found.addresses[-1]), MAX_MANIFEST), found)


def manifest_path(address: str) -> str:
    """Where the manifest that ends with chunk `address` lies in a store."""
    return f"manifests/{address[:2]}/{address}.json"


def chunk_path(address: str) -> str:
    """Where the object of chunk `address` lies in a store."""
    return f"chunks/{address[:2]}/{address}.kv"
