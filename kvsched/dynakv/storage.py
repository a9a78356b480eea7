"""The clusters' bytes, in two tiers: an arena of slots in DRAM over a file on flash.

A slot has the same form in both: the entries (key and value of a token, side by side) of one cluster in a row, then
room to grow, up to a multiple of the device's page. Bytes go between them as they are, and a cluster that is half full
is read with half the bytes.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator

import numpy as np
import torch

from ..config import DynaKVConfig, parse_bytes
from ..errors import ConfigError, UnsupportedModelError
from .flash import FlashFile, Request, aligned
from .pools import SlotPool
from .residency import Residency


class ClusterStorage:
    """The storage that all layers of a cache share. It takes its form from the first cluster that comes.

    Addresses are numbers of slots on flash and name a cluster for as long as it lives; slots are places in the arena
    and good until the next round (`begin`). Both are int64 arrays on the host.
    """

    def __init__(self, config: DynaKVConfig) -> None:
        self.flash = FlashFile(config.directory, config.io_threads)
        self.pool = SlotPool()
        self.read_seconds = 0.0
        self.residency: Residency | None = None
        self._max_size = config.max_cluster_size
        self._dram = parse_bytes(config.dram)
        self._width: int
        self.dtype: torch.dtype

    def open(self, width: int, dtype: torch.dtype) -> None:
        """Make the arena for entries of `width` numbers. Calling it again with the same form changes nothing.

        Raises:
            ConfigError: the budget is smaller than two slots.
            UnsupportedModelError: another layer has entries of another form.
        """
        if self.residency is not None:
            if (width, dtype) != (self._width, self.dtype):
                raise UnsupportedModelError(
                    f"the model's full-attention layers differ: a token takes {self._width} numbers of {self.dtype} in "
                    f"one and {width} of {dtype} in another. DynaKV needs them alike; use another cache for this model."
                )
            return
        self._width, self.dtype = width, dtype
        self._entry_bytes = width * dtype.itemsize
        slot_bytes = aligned(self._max_size * self._entry_bytes)
        slots = self._dram // slot_bytes
        if slots < 2:
            raise ConfigError(
                f"dram={self._dram} bytes is less than two clusters, which a split needs. Set it to {2 * slot_bytes} "
                "bytes or more."
            )
        self.residency = Residency(slots, slot_bytes)
        arena = mmap.mmap(-1, slots * slot_bytes)
        self._memory = memoryview(arena)
        self.arena = torch.frombuffer(arena, dtype=dtype).as_strided(
            (slots, self._max_size, width), (slot_bytes // dtype.itemsize, width, 1)
        )
        """`[slots, max_cluster_size, width]`."""

    @property
    def table(self) -> Residency:
        """The residency table of an open storage."""
        assert self.residency is not None
        return self.residency

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena that ever held a cluster; the rest is not in memory."""
        return 0 if self.residency is None else self.residency.touched * self.residency.slot_bytes

    def begin(self) -> None:
        """Start a round: the slots that it hands out stay valid until the next."""
        self.table.begin()

    def fetch(self, addresses: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The arena slots of clusters (each once) that hold `sizes` entries; those not resident are read.

        Raises:
            ConfigError: the DRAM budget cannot hold them at once.
            FlashError: reading or writing back failed.
        """
        slots, missing = self._admit(addresses, sizes)
        if len(missing):
            started = time.perf_counter()
            self.flash.wait(self.flash.read(self._requests(slots[missing], addresses[missing], sizes[missing])))
            self.read_seconds += time.perf_counter() - started
        return slots

    def create(self, entries: torch.Tensor, sizes: np.ndarray) -> np.ndarray:
        """Addresses of new clusters made of `entries` `[N, max_cluster_size, width]`, the first `sizes` of each.

        They lie in the arena and reach flash when they are evicted. Their room there is reserved now.
        """
        addresses = self.pool.take(len(sizes))
        self.flash.reserve(self.pool.capacity * self.table.slot_bytes)
        slots, _ = self._admit(addresses, sizes)
        self.arena[torch.from_numpy(slots)] = entries.to(self.arena)
        self.table.changed(slots, sizes)
        return addresses

    def read(self, slots: np.ndarray, offset: np.ndarray) -> torch.Tensor:
        """Copies of entries, in the dtype of the storage: `[..., width]` for int64 `[...]` of either (broadcast).

        Places beyond a cluster's size give anything.
        """
        return self.arena[torch.from_numpy(slots), torch.from_numpy(offset)]

    def append(self, slots: np.ndarray, offset: np.ndarray, entries: torch.Tensor) -> None:
        """Put entries `[M, width]` at `offset` `[M]` of `slots` `[M]`, which continues each cluster without gaps."""
        self.arena[torch.from_numpy(slots), torch.from_numpy(offset)] = entries.to(self.arena)
        grown, of = np.unique(slots, return_inverse=True)
        sizes = np.zeros(len(grown), dtype=np.int64)
        np.maximum.at(sizes, of, offset + 1)
        self.table.changed(grown, sizes)

    def split(self, slots: np.ndarray, order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Split N clusters in two; the first part keeps slot and address.

        Args:
            slots: int64 `[N]`.
            order: int64 `[N, max_cluster_size]`, old offsets in their new order: first part, second part, anything.
            sizes: int64 `[N, 2]`, entries in either part.

        Returns:
            int64 `[N]`, addresses of the second parts.
        """
        entries = self.read(slots[:, None], order)
        self.arena[torch.from_numpy(slots)] = entries
        self.table.changed(slots, sizes[:, 0])
        behind = (sizes[:, :1] + np.arange(self._max_size)).clip(max=self._max_size - 1)
        return self.create(entries[torch.arange(len(slots)).unsqueeze(1), torch.from_numpy(behind)], sizes[:, 1])

    def resident(self, addresses: np.ndarray) -> np.ndarray:
        """bool: which clusters can be used without reading."""
        return self.table.slot_of(addresses) >= 0

    def changed(self, slots: np.ndarray, sizes: np.ndarray) -> None:
        """The caller wrote to these slots; they now hold `sizes` entries."""
        self.table.changed(slots, sizes)

    def free(self, addresses: np.ndarray) -> None:
        """Forget clusters."""
        self.table.forget(addresses)
        self.pool.give_back(addresses)

    def rounds(self, count: int) -> Iterator[slice]:
        """Parts of `count` clusters small enough to be worked on at once, each in a round of its own.

        A part takes half the arena at most: whoever copies a cluster needs a second slot for it.
        """
        part = max(1, self.table.slots // 2)
        for start in range(0, count, part):
            self.begin()
            yield slice(start, min(start + part, count))

    def close(self) -> None:
        """Give file and threads back; the storage cannot be used afterwards."""
        self.flash.close()

    def _admit(self, addresses: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        admission = self.table.admit(addresses, sizes)
        self.flash.wait(
            self.flash.write(self._requests(admission.dirty_slots, admission.dirty_addresses, admission.dirty_entries))
        )
        return admission.slots, admission.missing

    def _requests(self, slots: np.ndarray, addresses: np.ndarray, sizes: np.ndarray) -> list[Request]:
        slot_bytes = self.table.slot_bytes
        return [
            (
                address * slot_bytes,
                self._memory[slot * slot_bytes : slot * slot_bytes + aligned(size * self._entry_bytes)],
            )
            for slot, address, size in zip(slots.tolist(), addresses.tolist(), sizes.tolist(), strict=True)
        ]
