"""The DRAM tier: entries of resident clusters, in rows that any cluster may take.

A cluster takes a row for each of its entries that is here, wherever one is free, and a table says which; so nothing is
lost to clusters smaller than the largest, appending takes one more row, splitting moves rows without copying them, and
of a cluster that was read only what a query wants has to stay.
"""

from __future__ import annotations

import mmap

import numpy as np

from kvsched_kernels import gather_entries

POSITION_BYTES = 4
"""Bytes that follow an entry, in DRAM and on flash: the token's position in the sequence, int32."""

ROW_TABLES = 6
"""Bytes beside its entry that a row takes: its number while it is free, and two flags."""


_NOWHERE = -1
"""In place of a row: the entry is not here."""

_SLOTS_AT_ONCE = 4096
"""Slots that are looked at together when rows move, so that this takes no memory beside the budget."""


class Arena:
    """Rows for `rows` entries of `entry_bytes` each, given to slots of up to `largest` entries.

    Attributes:
        data: `[rows]`, entries with their positions, as opaque bytes. Memory is touched when a row is first used.
        entries: `[rows]`, of these the entries alone (dtype `V<entry_bytes>`).
        position: int32 `[rows]`, of these the positions alone.
        clean: bool `[rows]`, whether flash holds the row where its cluster lies.
        stored: bool `[rows]`, whether flash held it anywhere at some time: writing it again moves data.
    """

    def __init__(self, rows: int, largest: int, entry_bytes: int) -> None:
        row = entry_bytes + POSITION_BYTES
        self._memory = mmap.mmap(-1, rows * row, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.data = np.frombuffer(self._memory, dtype=f"V{row}", count=rows)
        self.entries, self.position = self.apart(self.data)
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self.clean = np.zeros(rows, dtype=bool)
        self.stored = np.zeros(rows, dtype=bool)
        self.limit = rows
        self.touched = 0
        self._table = np.full((0, largest), _NOWHERE, dtype=np.int32)
        # Taken from the end, so that low rows come first and the rest stays untouched.
        self._free = np.arange(rows - 1, -1, -1, dtype=np.int32)
        self._free_count = rows

    @staticmethod
    def apart(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Entries and positions of rows `[n]`, in place."""
        row = data.itemsize
        entries = np.ndarray(data.shape, f"V{row - POSITION_BYTES}", data.data, strides=(row,))
        return entries, np.ndarray(data.shape, np.int32, data.data, offset=row - POSITION_BYTES, strides=(row,))

    @property
    def nbytes(self) -> int:
        """DRAM of the table of slots."""
        return self._table.nbytes

    @property
    def touched_bytes(self) -> int:
        """DRAM of the rows that were ever used."""
        return self.touched * self.data.itemsize

    def rows(self, slots: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """int32: the rows at `offset` of `slots` (broadcast); anything beyond a slot's size."""
        return self._table[slots, offset]

    def holds(self, slots: np.ndarray) -> np.ndarray:
        """bool `[..., largest]`: which entries of `slots` are here; none where a slot is -1."""
        if len(self._table) == 0:
            return np.zeros((*slots.shape, self._table.shape[1]), dtype=bool)
        return (self._table[slots] >= 0) & (slots >= 0)[..., None]

    def gather(
        self,
        slots: np.ndarray,
        wanted: np.ndarray,
        stream: np.ndarray,
        filled: np.ndarray,
        entries: np.ndarray,
        position: np.ndarray,
    ) -> None:
        """Copy what is `wanted` of `slots`; see `gather_entries`."""
        gather_entries(self._bytes, self.position, self._table, slots, wanted, stream, filled, entries, position)

    def take(self, slot: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Give rows to entries that are not here, at `offset` of `slot` (int64 `[N]` each).

        Returns:
            int32, the rows; neither clean nor stored.
        """
        self._cover(slot)
        self._free_count -= len(slot)
        assert self._free_count >= 0, "room was not made"
        rows = self._free[self._free_count : self._free_count + len(slot)][::-1]
        self._table[slot, offset] = rows
        self.clean[rows] = self.stored[rows] = False
        self.touched = max(self.touched, int(rows.max(initial=-1)) + 1)
        return rows

    def drop(self, slots: np.ndarray) -> None:
        """Free all rows of `slots`."""
        rows = self._table[slots]
        self._give_back(rows[rows >= 0])
        self._table[slots] = _NOWHERE

    def permute(self, slots: np.ndarray, order: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Rows of `slots` in another order, `[N, n]`; clean only where a row of the first `size` stays."""
        rows = self._table[slots[:, None], order]
        old = self._table[slots]
        offset = np.arange(rows.shape[1])
        moved = (offset < size[:, None]) & (rows != old)
        self.clean[rows[moved]] = False
        self._table[slots] = np.where(offset < size[:, None], rows, _NOWHERE)
        return rows

    def assign(self, slots: np.ndarray, rows: np.ndarray, size: np.ndarray) -> None:
        """Give `slots` the first `size` of `rows` `[N, n]`, which were other slots'; they are no longer clean."""
        self._cover(slots)
        own = np.arange(rows.shape[1]) < size[:, None]
        self._table[slots, : rows.shape[1]] = np.where(own, rows, _NOWHERE)
        self.clean[rows[own]] = False

    def shrink(self, limit: int) -> None:
        """Give the memory of rows from `limit` on back; what slots hold there moves below."""
        slot, offset = self._above(limit)
        source = self._table[slot, offset]
        free = self._free[: self._free_count]
        below = free[free < limit]
        target = below[len(below) - len(source) :]
        self.data[target] = self.data[source]
        self.clean[target], self.stored[target] = self.clean[source], self.stored[source]
        self._table[slot, offset] = target
        below = below[: len(below) - len(target)]
        self._free[: len(below)], self._free_count = below, len(below)
        self.limit = limit
        self.touched = min(self.touched, limit)
        first = -(-limit * self.data.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        if len(self._memory) > first:
            self._memory.madvise(mmap.MADV_DONTNEED, first, len(self._memory) - first)

    def _above(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Slot and offset of what lies in rows from `limit` on; some slots at a time, so that it takes no memory."""
        found = [(np.zeros(0, dtype=np.int64),) * 2]
        for start in range(0, len(self._table), _SLOTS_AT_ONCE):
            slot, at = (self._table[start : start + _SLOTS_AT_ONCE] >= limit).nonzero()
            found.append((slot + start, at))
        slot, at = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return slot, at

    def grow(self, limit: int) -> None:
        """Use rows up to `limit` again, or as many as there are."""
        more = np.arange(min(limit, len(self.data)) - 1, self.limit - 1, -1, dtype=np.int32)
        free = np.concatenate([more, self._free[: self._free_count]])
        self._free[: len(free)], self._free_count = free, len(free)
        self.limit += len(more)

    def renumber(self, slots: np.ndarray) -> None:
        """Keep `slots` alone, as the first in this order."""
        self._table = self._table[slots]

    def _cover(self, slots: np.ndarray) -> None:
        if (have := len(self._table)) <= (most := int(slots.max(initial=-1))):
            more = np.full((max(most + 1, have * 9 // 8, 64) - have, self._table.shape[1]), _NOWHERE, dtype=np.int32)
            self._table = np.concatenate([self._table, more])

    def _give_back(self, rows: np.ndarray) -> None:
        self._free[self._free_count : self._free_count + len(rows)] = rows
        self._free_count += len(rows)


def places(slots: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slot and offset of every entry from `begin` to `end` of each of `slots`, int64, slot by slot."""
    count = end - begin
    ends = np.cumsum(count)
    offset = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - count - begin, count)
    return np.repeat(slots, count), offset
