"""The DRAM budget: which cluster lies in which slot of the arena, and which one leaves for another.

A cluster is known here by its slot on flash. Nothing is read or written: `admit` says what has to be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError


@dataclass(frozen=True)
class Admission:
    """What has to happen before the admitted clusters can be used, all int64.

    Args:
        slots: `[n]`, the arena slot of each admitted cluster, in the order asked for.
        missing: indices into `slots` of the clusters that were not resident and must be filled.
        dirty_slots, dirty_addresses, dirty_entries: what must first be written back: from which arena slot, to which
            slot on flash, how many entries.
    """

    slots: np.ndarray
    missing: np.ndarray
    dirty_slots: np.ndarray
    dirty_addresses: np.ndarray
    dirty_entries: np.ndarray


class Residency:
    """The table of an arena of `slots` slots of `slot_bytes` each, shared by all layers."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots, self.slot_bytes = slots, slot_bytes
        self.touched = 0  # slots that ever held a cluster; those beyond take no memory yet
        self.hits = self.misses = 0
        self._round = 0
        self._holds = np.full(slots, -1, dtype=np.int64)
        self._used_in = np.full(slots, -1, dtype=np.int64)
        self._entries = np.zeros(slots, dtype=np.int64)
        self._dirty = np.zeros(slots, dtype=bool)
        self._slot_of = np.full(64, -1, dtype=np.int64)

    def begin(self) -> None:
        """Start a round: what it admits stays resident until the next round starts."""
        self._round += 1

    def slot_of(self, addresses: np.ndarray) -> np.ndarray:
        """The arena slot of each cluster, -1 where it is not resident."""
        if len(addresses) and (top := int(addresses.max())) >= len(self._slot_of):
            grown = np.full(max(top + 1, 2 * len(self._slot_of)), -1, dtype=np.int64)
            grown[: len(self._slot_of)] = self._slot_of
            self._slot_of = grown
        return self._slot_of[addresses]

    def admit(self, addresses: np.ndarray, entries: np.ndarray) -> Admission:
        """Make room for clusters (int64 `[n]`, each once) that hold `entries` tokens each.

        Raises:
            ConfigError: the arena cannot hold all that this round uses.
        """
        slots = self.slot_of(addresses)
        missing = np.flatnonzero(slots < 0)
        self._used_in[slots[slots >= 0]] = self._round
        self.hits += len(addresses) - len(missing)
        self.misses += len(missing)
        taken = self._choose_victims(len(missing))
        dirty = taken[self._dirty[taken]]
        admission = Admission(slots, missing, dirty, self._holds[dirty], self._entries[dirty])
        replaced = self._holds[taken]
        self._slot_of[replaced[replaced >= 0]] = -1
        slots[missing] = taken
        self._slot_of[addresses[missing]] = taken
        self._holds[taken] = addresses[missing]
        self._used_in[taken] = self._round
        self._entries[slots] = entries
        self._dirty[taken] = False
        self.touched = max(self.touched, int(taken.max(initial=-1)) + 1)
        return admission

    def changed(self, slots: np.ndarray, entries: np.ndarray) -> None:
        """`slots` now hold `entries` tokens each, which flash does not."""
        self._dirty[slots] = True
        self._entries[slots] = entries

    def forget(self, addresses: np.ndarray) -> None:
        """Clusters that no longer exist."""
        slots = self.slot_of(addresses)
        self._slot_of[addresses] = -1
        slots = slots[slots >= 0]
        self._holds[slots] = self._used_in[slots] = -1
        self._dirty[slots] = False

    def _choose_victims(self, count: int) -> np.ndarray:
        """The replacement policy: least recently used first, and before those the slots that hold nothing."""
        unpinned = int(np.count_nonzero(self._used_in < self._round))
        if count > unpinned:
            needed = (self.slots - unpinned + count) * self.slot_bytes
            raise ConfigError(
                f"dram={self.slots * self.slot_bytes} bytes cannot hold the clusters that one layer needs at a time. "
                f"Set dram to at least {needed} bytes, or lower budget."
            )
        if self.touched + count <= self.slots:
            return np.arange(self.touched, self.touched + count)
        return np.argsort(self._used_in, kind="stable")[:count]
