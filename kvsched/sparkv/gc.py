"""Takes old prefixes out of a store, or as many as it takes to fit a size, and what interrupted publications left.

What is kept or goes is a chunk with its boundary's manifest. Its age is counted from the newest manifest that lists it,
so a document stays whole while anything published on top of it stays. Manifests go before chunks, and the deepest
before the others: a reader never finds a manifest whose chunks went first, and one that read its manifest before is
left to compute what is no longer there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import PurePosixPath

from tqdm.auto import tqdm

from ..errors import ChunkError
from .manifest import MAX_MANIFEST, Manifest, chunk_path, manifest_path
from .store import Store, StoredObject

_BATCH = 64  # manifests in flight


@dataclass(frozen=True)
class CollectReport:
    """What `collect` deleted, or would delete.

    Args:
        manifests, chunks: how many of each.
        bytes_freed: their bytes.
        bytes_kept: bytes of everything that stays.
    """

    manifests: int
    chunks: int
    bytes_freed: int
    bytes_kept: int


def collect(
    store: Store,
    older_than: timedelta | None = None,
    max_bytes: int | None = None,
    grace: timedelta = timedelta(days=1),
    dry_run: bool = False,
) -> CollectReport:
    """Delete what is too old, then the oldest until the rest fits, then chunks that no manifest lists.

    Stores do not record reads, so age counts from publication. Needs no tenant's secret: signatures are not checked,
    and a manifest that cannot be read, which no reader can use either, is deleted. It must not be older than the
    version that publishes.

    Args:
        older_than: prefixes last extended before that go; `None` keeps any age.
        max_bytes: size of the store to get down to; `None` keeps any size.
        grace: a chunk without a manifest may belong to a publication under way, and stays so long.
        dry_run: delete nothing.

    Raises:
        StoreError: the store cannot be listed, read or written.
    """
    now = datetime.now(timezone.utc)
    listed, chunks = _by_address(store.list_objects("manifests")), _by_address(store.list_objects("chunks"))
    manifests = _read(store, listed)
    used: dict[str, datetime] = {}
    depth: dict[str, int] = {}
    for address, manifest in manifests.items():
        for index, chunk in enumerate(manifest.objects):
            used[chunk.address] = max(used.get(chunk.address, listed[address].modified), listed[address].modified)
            depth[chunk.address] = index % len(manifest.chunks)

    # Oldest first, and of equal age the deepest first: what is left is always whole from its beginning.
    order = sorted(used, key=lambda address: (used[address], -depth[address]))
    sizes = {
        address: sum(found[address].size for found in (listed, chunks) if address in found)
        for address in used.keys() | chunks.keys()
    }
    total, dropped = sum(sizes[address] for address in used), set()
    for address in order:
        is_old = older_than is not None and now - used[address] > older_than
        if not is_old and (max_bytes is None or total <= max_bytes):
            break
        dropped.add(address)
        total -= sizes[address]

    going = [address for address in listed if address in dropped or address not in manifests]
    going.sort(key=lambda address: depth.get(address, 0), reverse=True)
    staying = {address: manifest for address, manifest in manifests.items() if address not in dropped}
    if not dry_run:
        store.delete([manifest_path(address) for address in going])
        # What was published meanwhile may need chunks that were about to go.
        relisted = _by_address(store.list_objects("manifests"))
        staying |= _read(store, {address: relisted[address] for address in relisted.keys() - staying.keys()})
    kept = {chunk.address for manifest in staying.values() for chunk in manifest.objects}
    orphans = [
        address
        for address, found in chunks.items()
        if address not in kept and (address in dropped or now - found.modified > grace)
    ]
    if not dry_run:
        store.delete([chunk_path(address) for address in orphans])
    freed = sum(listed[address].size for address in going) + sum(chunks[address].size for address in orphans)
    everything = sum(found.size for found in (*listed.values(), *chunks.values()))
    return CollectReport(len(going), len(orphans), freed, everything - freed)


def _by_address(objects: Iterable[StoredObject]) -> dict[str, StoredObject]:
    return {PurePosixPath(found.path).stem: found for found in objects}


def _read(store: Store, listed: dict[str, StoredObject]) -> dict[str, Manifest]:
    """The manifests that can be read."""
    addresses = [address for address, found in listed.items() if found.size <= MAX_MANIFEST]
    manifests = {}

    async def fetch(batch: list[str]) -> list[bytes]:
        return await asyncio.gather(*(store.get(manifest_path(address), MAX_MANIFEST) for address in batch))

    for start in tqdm(range(0, len(addresses), _BATCH), desc="read manifests", unit="batch", disable=None):
        batch = addresses[start : start + _BATCH]
        for address, data in zip(batch, store.wait(fetch(batch)), strict=True):
            with contextlib.suppress(ChunkError):
                manifests[address] = Manifest.parse(data)
    return manifests
