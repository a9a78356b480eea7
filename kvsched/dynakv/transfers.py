"""What moves between the two tiers: clusters that are read, and entries that are written back.

Reads and writes of whole sectors go through buffers, from which entries are copied to their rows and the other way; so
neighbours come in one read whatever lies between. What is first written of a page is the whole page: for less the file
system waits until all else is written (on ext4 60 pieces of 1.5 KB took 100 ms, of 4 KB .5 ms).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..errors import FlashError
from .arena import Arena, places
from .engine import Request, Transfer
from .flash import PAGE, Buffer, FlashFile
from .pools import Pools
from .prefetch import Ahead, Placed
from .runs import WASTE, Runs, merge

SMALLEST_STEP, LARGEST_STEP = 1 << 20, 64 << 20
"""Bytes by which the file grows: it doubles in between."""


class Transfers:
    """Moves entries between an arena and the places that pools give them in a file.

    Attributes:
        asked, expected: what is read ahead: for the step that goes on, and for the layer that comes next.
        on_read: called for every read of clusters that is issued, with its bytes and the addresses it brings.
        failed: what went wrong; clusters are incomplete since.
        entries_read: entries of clusters that reads were issued for.
        read_seconds: how long callers waited for reads.
        bytes_moved: of entries that were written to flash again because their cluster moved or was split.
    """

    def __init__(self, flash: FlashFile) -> None:
        self.flash = flash
        self.on_read: Callable[[int, np.ndarray], None] | None = None
        self.failed: FlashError | None = None
        self.entries_read = 0
        self.read_seconds = 0.0
        self.bytes_moved = 0
        self._writing: Transfer | None = None
        self._written = np.zeros((0, 2), dtype=np.int64)
        self._fresh = np.zeros(0, dtype=bool)  # pages that nothing was written to

    @property
    def nbytes(self) -> int:
        """DRAM of what is known of the file's pages."""
        return self._fresh.nbytes

    def open(self, arena: Arena, pools: Pools, buffers: Sequence[int]) -> None:
        """Take the form of entries from an arena, and buffers of so many bytes: asked, expected, and for writes."""
        self.arena, self.pools = arena, pools
        self.asked, self.expected = (Ahead(Buffer(size)) for size in buffers[:2])
        self._writer = Buffer(buffers[2])
        self._entry_bytes = arena.data.itemsize
        self._step_bytes = math.gcd(self._entry_bytes, self.flash.alignment)

    def reserve(self, places: int) -> None:
        """Have room on flash for so many places, in steps, so that the device cannot turn out full later."""
        needed = (places + 1) * self._entry_bytes + PAGE
        if needed > self.flash.size:
            size = max(needed, self.flash.size + min(self.flash.size, LARGEST_STEP), SMALLEST_STEP)
            with self._failing():
                self.flash.reserve(size // PAGE * PAGE)
            more = np.ones(self.flash.size // PAGE - len(self._fresh), dtype=bool)
            self._fresh = np.concatenate([self._fresh, more])

    def read_ahead(self, addresses: np.ndarray, sizes: np.ndarray) -> None:
        """Start reading clusters that are about to be asked for, as many of the first as the buffer takes.

        They take the place of what was read ahead before; what was expected is there already.
        """
        away = ~self.expected.holds(addresses)
        self._begin(self.asked, addresses[away], sizes[away])

    def expect(self, addresses: np.ndarray, sizes: np.ndarray) -> None:
        """Start reading clusters that the next layer may ask for; the same, in a buffer of its own."""
        self._begin(self.expected, addresses, sizes)

    def forget(self, addresses: np.ndarray) -> None:
        """Flash no longer holds clusters as they were when they were read ahead."""
        self.asked.forget(addresses)
        self.expected.forget(addresses)

    def _begin(self, ahead: Ahead, addresses: np.ndarray, sizes: np.ndarray) -> None:
        with self._failing():
            ahead.give_up(self.flash)
            if len(addresses):
                start, length, _ = self._stretches(addresses, sizes)
                some = next(portions(self._needs(start, length, self.flash.alignment), len(ahead.buffer.memory)))
                transfer, placed = self._start_reading(addresses[some], sizes[some], ahead.buffer)
                ahead.start(transfer, addresses[some], placed)

    def load(self, addresses: np.ndarray, sizes: np.ndarray, slots: np.ndarray, needed: np.ndarray) -> None:
        """Bring what is `needed` (bool `[N, m]`) of clusters to slots: from what was read ahead, and from flash."""
        started = time.perf_counter()
        with self._failing():
            for ahead in (self.expected, self.asked):
                here, placed = ahead.take(addresses, self.flash)
                if placed is not None:
                    self._unpack(placed, ahead.buffer, slots[here], needed[here])
                addresses, sizes, slots, needed = addresses[~here], sizes[~here], slots[~here], needed[~here]
            if len(addresses):
                self.asked.give_up(self.flash)  # the buffer is wanted for these
            reader = self.asked.buffer
            start, length, _ = self._stretches(addresses, sizes)
            order = np.argsort(start)
            for part in portions(self._needs(start, length, self.flash.alignment)[order], len(reader.memory)):
                some = order[part]
                transfer, placed = self._start_reading(addresses[some], sizes[some], reader)
                self.flash.wait(transfer)
                self._unpack(placed, reader, slots[some], needed[some])
        self.read_seconds += time.perf_counter() - started

    def _start_reading(self, addresses: np.ndarray, sizes: np.ndarray, into: Buffer) -> tuple[Transfer, Placed]:
        start, length, placed = self._stretches(addresses, sizes)
        runs = merge(start, length, self.flash.alignment)
        self._finish_writes(runs.offset, runs.length)
        if self.on_read is not None:
            for i, nbytes in enumerate(runs.length.tolist()):
                self.on_read(nbytes, addresses[runs.run == i])
        transfer = self.flash.read(_requests(runs, into))
        self.entries_read += int(sizes.sum())
        return transfer, Placed(runs.at + placed.first, placed.step, sizes)

    def _unpack(self, placed: Placed, buffer: Buffer, slots: np.ndarray, needed: np.ndarray) -> None:
        """Copy entries that were read to rows of their own."""
        cluster, offset = needed.nonzero()
        rows = self.arena.take(slots[cluster], offset)
        at = placed.first[cluster] + placed.step[cluster] * offset
        self.arena.data[rows] = self._entries_of(buffer)[at // self._step_bytes]
        self.arena.clean[rows] = self.arena.stored[rows] = True

    def write_back(self, slots: np.ndarray, addresses: np.ndarray) -> None:
        """Write what flash does not hold of clusters; it may still be under way afterwards."""
        cluster, offset = self.arena.holds(slots).nonzero()
        rows = self.arena.rows(slots[cluster], offset)
        changed = ~self.arena.clean[rows]
        if not changed.any():
            return
        self.forget(addresses[np.unique(cluster[changed])])
        self.bytes_moved += int(self.arena.stored[rows[changed]].sum()) * self._entry_bytes
        origin, step = self.pools.where(addresses)
        place = origin[cluster] + step[cluster] * offset
        # A cluster's entries that share a sector with changed ones are written too: it spares reading the sector.
        sector = self.flash.alignment
        low, high = place * self._entry_bytes // sector, (place * self._entry_bytes + self._entry_bytes - 1) // sector
        touched = np.unique([low[changed], high[changed]])
        changed = np.isin(low, touched) | np.isin(high, touched)
        order = np.argsort(place[changed])
        rows, place = rows[changed][order], place[changed][order]
        self.arena.clean[rows] = self.arena.stored[rows] = True

        longest = len(self._writer.memory) // (4 * self._entry_bytes)
        begins = np.flatnonzero(np.diff(place, prepend=-2) != 1)
        count = np.diff(begins, append=len(place))
        pieces, nth = places(np.arange(len(begins)), np.zeros_like(count), -(-count // longest))
        begins = begins[pieces] + nth * longest
        count = np.diff(begins, append=len(place))
        start, length = place[begins] * self._entry_bytes, count * self._entry_bytes
        with self._failing():
            for part in portions(self._needs(start, length, PAGE), len(self._writer.memory)):
                some = slice(int(begins[part.start]), int(begins[part.stop - 1] + count[part.stop - 1]))
                self._write(start[part], length[part], rows[some])

    def _write(self, start: np.ndarray, length: np.ndarray, rows: np.ndarray) -> None:
        """Start writing pieces of the file (bytes, ascending) that hold the entries of `rows` in turn."""
        self._finish_writes()
        sector, end = self.flash.alignment, start + length
        fresh = self._fresh[start // PAGE], self._fresh[(end - 1) // PAGE]
        # Sectors of which only a part changes keep the rest, but in fresh pages, which are written whole.
        edges = np.concatenate([start[~fresh[0]], end[~fresh[1]]])
        shared = np.unique(edges[edges % sector > 0] // sector * sector)
        first = np.where(fresh[0], start // PAGE * PAGE, start)
        last = np.where(fresh[1], -(-end // PAGE) * PAGE, end)
        first[1:] = np.maximum(first[1:], last[:-1])  # of pieces in one fresh page the first has all of it
        runs = merge(first, last - first, sector, waste=0)
        run = np.searchsorted(runs.offset, shared, side="right") - 1
        memory = runs.memory[run] + shared - runs.offset[run]
        reads = [
            (offset, self._writer.memory[at : at + sector])
            for offset, at in zip(shared.tolist(), memory.tolist(), strict=True)
        ]
        self.flash.wait(self.flash.read(reads))
        piece, nth = places(np.arange(len(start)), np.zeros_like(length), length // self._entry_bytes)
        at = (runs.at + start - first)[piece] + nth * self._entry_bytes
        self._entries_of(self._writer)[at // self._step_bytes] = self.arena.data[rows]
        self._writing = self.flash.write(_requests(runs, self._writer))
        self._written = np.stack([runs.offset, runs.offset + runs.length], axis=1)
        page, past = runs.offset // PAGE, (runs.offset + runs.length - 1) // PAGE + 1
        self._fresh[places(page, page, past)[1]] = False

    def _finish_writes(self, offset: np.ndarray | None = None, length: np.ndarray | None = None) -> None:
        """Wait for writes under way; if reads are given, only where they touch what is being written."""
        if self._writing is None:
            return
        if offset is not None and length is not None:
            next_write = np.searchsorted(self._written[:, 1], offset, side="right").clip(max=len(self._written) - 1)
            begin, end = self._written[next_write].T
            if not ((begin < offset + length) & (end > offset)).any():
                return
        writing, self._writing = self._writing, None
        self.flash.wait(writing)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Whatever fails in between leaves clusters incomplete, so nothing may be taken from here afterwards."""
        try:
            yield
        except FlashError as error:
            self.failed = error
            raise

    def _entries_of(self, buffer: Buffer) -> np.ndarray:
        """The entries that begin at each multiple of `_step_bytes` of a buffer, as opaque bytes."""
        count = (len(buffer.memory) - self._entry_bytes) // self._step_bytes + 1
        return np.ndarray((count,), self.arena.data.dtype, buffer.memory, strides=(self._step_bytes,))

    def _stretches(self, addresses: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, Placed]:
        """Where clusters lie in the file: the first byte of each and their bytes, and their entries from there on."""
        origin, step = self.pools.where(addresses)
        first = np.where(step < 0, sizes - 1, 0)
        placed = Placed(first * self._entry_bytes, step * self._entry_bytes, sizes)
        return (origin - first) * self._entry_bytes, sizes * self._entry_bytes, placed

    @staticmethod
    def _needs(start: np.ndarray, length: np.ndarray, unit: int) -> np.ndarray:
        """Bytes of buffer that pieces of the file take at most: whole units, or gaps that are read through."""
        whole = -(-(start + length) // unit) * unit - start // unit * unit
        return np.maximum(whole, np.ceil((1 + WASTE) * length).astype(np.int64))


def portions(needs: np.ndarray, room: int) -> Iterator[slice]:
    """Consecutive parts whose needs fit in `room`, as long as can be."""
    ends, start = np.cumsum(needs), 0
    while start < len(needs):
        taken = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, taken + room, side="right")))
        yield slice(start, stop)
        start = stop


def _requests(runs: Runs, buffer: Buffer) -> list[Request]:
    return [
        (offset, buffer.memory[at : at + length])
        for offset, at, length in zip(runs.offset.tolist(), runs.memory.tolist(), runs.length.tolist(), strict=True)
    ]
