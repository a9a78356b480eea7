"""The clusters' bytes, in two tiers: an arena of entries in DRAM over a file on flash.

Clusters are made, grow and split in the arena and reach flash, many at a time, when they leave it or, where not all can
stay, when they are made. On flash a cluster is one stretch of entries, and those that are retrieved together lie
together (`pools`). `transfers` moves entries between the two.
Everything here is counted against one budget of DRAM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvsched_kernels import fullest

from ..config import DynaKVConfig, parse_bytes
from ..errors import ConfigError, FlashError, UnsupportedModelError
from .arena import POSITION_BYTES, ROW_TABLES, Arena, places
from .flash import PAGE, FlashFile
from .index_file import IndexFile
from .pools import Pools
from .prefetch import LastStep
from .residency import ClusterAligned, Evicted, PerAddress, Residency
from .runs import WASTE
from .snapshot import Saved, save
from .transfers import Transfers, portions

BUFFER_SHARES = 1 / 32, 1 / 64, 1 / 64
"""Shares of the budget for what a step reads, for what the next layer is expected to, and for writes, up to
`LARGEST_BUFFER` each."""

LARGEST_BUFFER = 1 << 20
"""Bytes that keep the device busy while the next batch is put together."""

WORTH_READING_AHEAD = 4
"""Clusters: to start reading fewer takes as long as to wait for them with all others that a step lacks."""

INDEX_SHARE = 1 / 3
"""Of the budget: when all layers' indexes take more, their vectors move to flash for good. On a recorded run (24
layers, 8,192 tokens, an index of 7.8 MiB) a step then took 79 ms instead of 109 with 16 MiB, and 63 instead of 58 with
32 MiB."""

UNCOUNTED = 1 / 8
"""Share of the budget left to what is not counted one by one: lists of free places and numbers, tables while they are
copied to grow, and what a chunk of a prompt takes for a moment."""

SAVED_PART = 1 << 20
"""Bytes of clusters that are saved, checked and loaded at a time."""


class ClusterStorage:
    """The storage that all layers of a cache share. It takes its form from the first cluster that comes.

    Addresses name clusters for as long as they live; slots are their places in DRAM and good until the next round
    (`begin`). Both are int64 arrays on the host.

    Attributes:
        transfers: what moves between the tiers, and the counts of that.
        index_file: where the vectors of the layers' indexes lie, if DRAM has no room for them.
        entry_bytes: of an entry with its position, as it lies on flash.
    """

    def __init__(self, config: DynaKVConfig) -> None:
        self.flash = FlashFile(config.directory, config.io_threads)
        self.transfers = Transfers(self.flash)
        self.residency: Residency | None = None
        self._largest = config.max_cluster_size
        self._dram = parse_bytes(config.dram)
        open_file = partial(FlashFile, config.directory, config.io_threads)
        self.index_file = IndexFile(open_file, INDEX_SHARE * self._dram)
        self._spent: dict[str, int] = {}
        self._unfit = False
        self._tables_of_slots = 0
        self._last_step = LastStep()
        # Owners of a cluster beyond the first, and the sum of them.
        self._owners, self._extra_owners = PerAddress(np.int16, 0), 0
        self._width: int
        self.dtype: torch.dtype

    def open(self, width: int, dtype: torch.dtype) -> None:
        """Make the arena for entries of `width` numbers. Calling it again with the same form changes nothing.

        Raises:
            ConfigError: the budget is too small to split a cluster in.
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
        self.entry_bytes = width * dtype.itemsize + POSITION_BYTES
        sector = self.flash.alignment
        least = -(-int((1 + WASTE) * self._largest * self.entry_bytes + 2 * PAGE) // PAGE) * PAGE
        buffers = [max(least, int(min(self._dram * share, LARGEST_BUFFER)) // PAGE * PAGE) for share in BUFFER_SHARES]
        row = self.entry_bytes + ROW_TABLES
        self._least_rows = 2 * self._largest
        if self._dram * (1 - UNCOUNTED) < sum(buffers) + self._least_rows * row:
            enough = (len(buffers) * least + self._least_rows * row) / (1 - UNCOUNTED - sum(BUFFER_SHARES))
            raise ConfigError(
                f"dram={self._dram} bytes is less than two clusters and the buffers that bring them take. Set it to "
                f"{math.ceil(enough)} bytes or more."
            )
        self._shared = sum(buffers) + int(self._dram * UNCOUNTED)
        # Sectors hold several entries, or entries several sectors, or neither: then pools share sectors.
        grain = sector // math.gcd(sector, self.entry_bytes)
        self.pools = Pools(self._largest, grain if grain <= 4 else 1)
        self.arena = Arena((self._dram - self._shared) // row, self._largest, width * dtype.itemsize)
        self.residency = Residency(self.arena.limit, ClusterAligned(), self.entry_bytes)
        self.transfers.open(self.arena, self.pools, buffers)

    @property
    def table(self) -> Residency:
        """The residency table of an open storage.

        Raises:
            FlashError: a transfer failed earlier, so that what is here is no longer complete.
        """
        assert self.residency is not None
        if (failed := self.transfers.failed) is not None:
            raise FlashError(f"clusters were lost when a transfer failed. Make a new DynaKVCache. ({failed})")
        return self.residency

    @property
    def arena_bytes(self) -> int:
        """DRAM that resident clusters and buffers take; rows that were never used are not in memory yet."""
        return 0 if self.residency is None else self.arena.touched_bytes + self._shared

    @property
    def table_bytes(self) -> int:
        """DRAM of the tables that say where clusters lie, in DRAM and on flash, and of the buffers for indexes."""
        if self.residency is None:
            return 0
        shared = self._owners.values.nbytes + self.transfers.nbytes + self._last_step.nbytes
        tables = self.pools.nbytes + self.residency.nbytes + self.arena.nbytes + ROW_TABLES * self.arena.limit
        return tables + shared + self.index_file.nbytes

    def spend(self, name: str, nbytes: int) -> None:
        """Count `nbytes` of DRAM that are held elsewhere, as `name`, against the budget; clusters get the rest.

        A budget that others use up leaves what splitting a cluster needs. It takes effect with the next round.
        """
        self._spent[name] = nbytes
        self._unfit = True

    def begin(self, step: int | None = None) -> None:
        """Start a round: the slots that it hands out stay valid until the next.

        Args:
            step: tokens decoded so far, where a round belongs to one: the clock of the replacement policy.
        """
        self.table.begin(step)
        if self._unfit:
            self._fit()

    def fetch(self, addresses: np.ndarray, sizes: np.ndarray, wanted: np.ndarray | None = None) -> np.ndarray:
        """The slots of clusters (each once for every owner) that hold `sizes` entries; those that lack any are read.

        Args:
            wanted: bool `[N, m]`, the entries that have to be there; `None` for all.

        Raises:
            ConfigError: the DRAM budget cannot hold them at once (`gather` and `rounds` take them in parts).
            FlashError: reading or writing back failed.
        """
        if wanted is None:
            wanted = np.arange(int(sizes.max(initial=0))) < sizes[:, None]
        if self._extra_owners:
            addresses, first, of = np.unique(addresses, return_index=True, return_inverse=True)
            by_any = np.zeros((len(addresses), wanted.shape[1]), dtype=bool)
            np.logical_or.at(by_any, of, wanted)
            return self._fetch(addresses, sizes[first], by_any)[of]
        return self._fetch(addresses, sizes, wanted)

    def _fetch(self, addresses: np.ndarray, sizes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        if self.complete:
            needed, lacking = wanted, np.zeros_like(sizes)
        else:
            needed = wanted & ~self.arena.holds(self.table.slot_of(addresses))[:, : wanted.shape[1]]
            lacking = needed.sum(1)
        slots, evicted = self.table.admit(addresses, lacking)
        self._evict(evicted)
        if (read := lacking > 0).any():
            absent = slots < 0
            slots[absent] = self.table.enter(addresses[absent], lacking[absent])
            self.table.extend(slots[~absent], lacking[~absent])
            self.transfers.load(addresses[read], sizes[read], slots[read], needed[read])
            self._unfit |= self.arena.nbytes + self.table.nbytes > self._tables_of_slots
        return slots

    def gather(
        self,
        addresses: np.ndarray,
        sizes: np.ndarray,
        wanted: np.ndarray | None = None,
        stream: np.ndarray | None = None,
        streams: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of clusters, `[S, n, width]`, cluster after cluster, and their positions, int64 `[S, n]`.

        It starts rounds of its own: clusters that DRAM cannot hold at once come one part after the other.

        Args:
            wanted: bool `[N, m]`, which entries; `None` for all.
            stream: int64 `[N]`, of S `streams`; `None` for one. Those with less than the fullest end in entries of 0,
                at position -1.
        """
        wanted = np.arange(int(sizes.max(initial=0))) < sizes[:, None] if wanted is None else wanted
        stream = np.zeros_like(addresses) if stream is None else stream
        width, filled = fullest(wanted, stream, streams), np.zeros(streams, dtype=np.int64)
        entries = torch.zeros(streams, width, self._width, dtype=self.dtype)
        position = torch.full((streams, width), -1)
        into = entries.view(torch.uint8).numpy(), position.numpy()
        ends = np.cumsum(self._taken(addresses, sizes, wanted))
        start = held = 0
        while start < len(sizes):
            self.begin()
            part = slice(start, max(start + 1, int(np.searchsorted(ends, held + self.table.capacity, side="right"))))
            slots = self.fetch(addresses[part], sizes[part], wanted[part])
            self.arena.gather(slots, wanted[part], stream[part], filled, *into)
            start, held = part.stop, int(ends[part.stop - 1])
        return entries, position

    def _taken(self, addresses: np.ndarray, sizes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Entries that clusters take in DRAM, at most, when what is `wanted` of them is there: what is there stays."""
        if self.complete or self._extra_owners:
            return sizes
        return (wanted | self.holds(addresses)[:, : wanted.shape[1]]).sum(1)

    def prefetch(self, addresses: np.ndarray, sizes: np.ndarray) -> None:
        """Start reading clusters that may be asked for next, as many as the buffer takes; nothing waits for them.

        What an earlier call brought is given up when the buffer is wanted, by another or by a read. Clusters may be
        fetched, changed or freed meanwhile: what was read ahead of that is never used.
        """
        if self._extra_owners:
            first = np.sort(np.unique(addresses, return_index=True)[1])
            addresses, sizes = addresses[first], sizes[first]
        away = ~self.resident(addresses)
        if away.any():
            self.transfers.read_ahead(addresses[away], sizes[away])

    def expect_next(self, layer: int, addresses: np.ndarray, wanted: np.ndarray) -> None:
        """Say what a layer wanted in this step; what the next one wanted in its last and DRAM has not is being read.

        Args:
            addresses: int64 `[N]`, wanted: bool `[N, m]`, entries of them.
        """
        following = self._last_step.follow(layer, addresses, wanted)
        if following is None or self.complete:
            return
        addresses, wanted = following
        if self._extra_owners:
            first = np.unique(addresses, return_index=True)[1]
            addresses, wanted = addresses[first], wanted[first]
        sizes, width = self.pools.size(addresses), min(wanted.shape[1], self._largest)
        lacking = wanted[:, :width] & (np.arange(width) < sizes[:, None]) & ~self.holds(addresses)[:, :width]
        lacks = lacking.any(1)
        if np.count_nonzero(lacks) >= WORTH_READING_AHEAD:
            self.transfers.expect(addresses[lacks], sizes[lacks])

    def create(
        self,
        entries: torch.Tensor,
        sizes: np.ndarray,
        position: np.ndarray | None = None,
        group: np.ndarray | None = None,
        growing: bool = False,
    ) -> np.ndarray:
        """Addresses of new clusters, whose places on flash are reserved now; they are written when they leave DRAM.

        All that belong together should come at once. More than half of DRAM holds begin rounds of their own.

        Args:
            entries: `[sizes.sum(), width]`, cluster by cluster.
            sizes: int64 `[N]`.
            position: integers `[sizes.sum()]`, kept with the entries.
            group: int64 `[N]`, ascending: the stream of each, over all layers. Clusters of a group lie side by side in
                the order given.
            growing: tokens are going to join them.
        """
        addresses = self.pools.create(sizes, np.zeros_like(sizes) if group is None else group, growing)
        self.transfers.reserve(self.pools.end)
        ends = np.cumsum(sizes)
        parts = list(portions(sizes, self.table.capacity // 2))
        for part in parts:
            if len(parts) > 1:
                self.begin()
            slots = self._enter(addresses[part], sizes[part])
            rows = self.arena.take(*places(slots, np.zeros_like(slots), sizes[part]))
            held = slice(int(ends[part.stop - 1]) - len(rows), int(ends[part.stop - 1]))
            self._fill(rows, entries[held], None if position is None else position[held])
            if self.pools.end > self.table.capacity:
                # Most will leave DRAM. Now they are neighbours, later each would share its first and last page.
                self.transfers.write_back(slots, addresses[part])
        self._unfit = True
        return addresses

    def read(self, slots: np.ndarray, offset: np.ndarray) -> torch.Tensor:
        """Copies of entries, in the dtype of the storage: `[..., width]` for int64 `[...]` of either (broadcast).

        Places beyond a cluster's size give anything.
        """
        return self._to_tensor(self.arena.entries[self.arena.rows(slots, offset)])

    def positions(self, slots: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Positions of entries, int32, in the way of `read`."""
        return self.arena.position[self.arena.rows(slots, offset)]

    def append(
        self, slots: np.ndarray, offset: np.ndarray, entries: torch.Tensor, position: np.ndarray | None = None
    ) -> None:
        """Put entries `[M, width]` and positions `[M]` at `offset` `[M]` of `slots` `[M]`, without leaving gaps."""
        if len(slots) == 0:
            return
        grown, of = np.unique(slots, return_inverse=True)
        before = self.table.size(grown)
        after = before + np.bincount(of)
        self._evict(self.table.make_room(len(slots)))
        self.arena.take(*places(grown, before, after))
        self._fill(self.arena.rows(slots, offset), entries, position)
        self.table.resize(grown, after)
        moved = self.pools.resize(self.table.address(grown), after)
        self.transfers.reserve(self.pools.end)
        self.arena.clean[self.arena.rows(*places(grown[moved], np.zeros_like(before[moved]), after[moved]))] = False
        self._unfit = True

    def append_unread(
        self, addresses: np.ndarray, sizes: np.ndarray, entries: torch.Tensor, position: np.ndarray
    ) -> None:
        """Add entries to clusters that need not be here, and that `have_room`.

        Args:
            addresses: int64 `[N]`, each once.
            sizes: int64 `[N]`, entries that each gets; `entries` `[sizes.sum(), width]` and `position` are in turn.
        """
        self.transfers.forget(addresses)
        before = self.pools.size(addresses)
        slots, evicted = self.table.admit(addresses, sizes, fresh=True)
        self._evict(evicted)
        absent = slots < 0
        slots[absent] = self.table.enter(addresses[absent], sizes[absent])
        self.table.extend(slots[~absent], sizes[~absent])
        self._fill(self.arena.take(*places(slots, before, before + sizes)), entries, position)
        moved = self.pools.resize(addresses, before + sizes)
        assert not moved.any()
        self._unfit = True

    def have_room(self, addresses: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """bool `[N]`: which clusters can have `sizes` entries where they lie, without others noticing."""
        alone = self._owners.cover(addresses)[addresses] == 0
        return alone & (sizes <= self._largest) & self.pools.have_room(addresses, sizes)

    def split(self, slots: np.ndarray, order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Split N clusters in two; the first part keeps slot, address and place on flash, the second lies near it.

        Args:
            slots: int64 `[N]`.
            order: int64 `[N, max_cluster_size]`, old offsets in their new order: first part, second part, anything.
                Entries of the first part that keep their offset need not be written again (`pools.keep_order`).
            sizes: int64 `[N, 2]`, entries in either part.

        Returns:
            int64 `[N]`, addresses of the second parts.
        """
        first, second = sizes[:, 0], sizes[:, 1]
        rows = self.arena.permute(slots, order, first)
        self.table.resize(slots, first)
        kept = self.table.address(slots)
        self.pools.resize(kept, first)
        addresses = self.pools.add(second, kept)
        self.transfers.reserve(self.pools.end)
        behind = (first[:, None] + np.arange(self._largest)).clip(max=self._largest - 1)
        self.arena.assign(self._enter(addresses, second), np.take_along_axis(rows, behind, 1), second)
        self._unfit = True
        return addresses

    @property
    def complete(self) -> bool:
        """Whether all entries are in DRAM."""
        return self.table.used == self.pools.entries

    def resident(self, addresses: np.ndarray) -> np.ndarray:
        """bool: which clusters are in DRAM whole; anything where there is none."""
        slots = self.table.slot_of(addresses)
        return (slots >= 0) & (self.table.size(slots) == self.pools.size(addresses))

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        """bool `[..., largest]`: which entries of clusters `[...]` are in DRAM; anything where there is none."""
        return self.arena.holds(self.table.slot_of(addresses))

    def share(self, addresses: np.ndarray) -> None:
        """Give clusters one more owner for each time that they are named: as often more they have to be freed."""
        np.add.at(self._owners.cover(addresses), addresses, 1)
        self._extra_owners += len(addresses)

    def own(self, addresses: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Clusters of this round that are about to change, each for one of its owners: others keep what is there now.

        Args:
            addresses, slots: int64 `[N]`.

        Returns:
            The same, but where a cluster has further owners those of a copy.
        """
        if not self._extra_owners:
            return addresses, slots
        shared = np.flatnonzero(self._owners.cover(addresses)[addresses])
        old, source = addresses[shared], slots[shared]
        sizes, none = self.table.size(source), np.zeros_like(source)
        made = self.pools.add(sizes, old)
        self.transfers.reserve(self.pools.end)
        copies = self._enter(made, sizes)
        rows = self.arena.rows(*places(source, none, sizes))
        self.arena.data[self.arena.take(*places(copies, none, sizes))] = self.arena.data[rows]
        self.free(old)
        addresses, slots = addresses.copy(), slots.copy()
        addresses[shared], slots[shared] = made, copies
        self._unfit = True
        return addresses, slots

    def free(self, addresses: np.ndarray) -> None:
        """Forget clusters, or those owners of them for which they are named."""
        if self._extra_owners:
            named, times = np.unique(addresses, return_counts=True)
            owners = self._owners.cover(named)
            taken = np.minimum(owners[named], times)
            owners[named] -= taken
            self._extra_owners -= int(taken.sum())
            addresses = named[taken < times]
        gone = self.table.forget(addresses)
        self.arena.drop(gone.slots)
        self.transfers.forget(addresses)
        self.pools.free(addresses)

    def rounds(self, count: int) -> Iterator[slice]:
        """Parts of `count` clusters small enough to be worked on at once, each in a round of its own.

        A part takes half the arena at most: whoever copies a cluster needs a second slot for it.
        """
        start = 0
        while start < count:
            self.begin()
            part = max(1, self.table.capacity // (2 * self._largest))
            yield slice(start, min(start + part, count))
            start += part

    def save(
        self, folder: Path, tables: Mapping[str, torch.Tensor] | None = None, form: Mapping[str, Any] | None = None
    ) -> None:
        """Keep all clusters in `folder`; what it kept before is replaced when everything is written.

        Args:
            tables, form: kept with them, as `snapshot.save` does.

        Raises:
            FlashError: reading them or writing there failed.
        """
        addresses, sizes, group = self.pools.clusters()
        own = {"address": addresses, "size": sizes, "group": group}
        described = {"width": self._width, "dtype": str(self.dtype).removeprefix("torch."), "largest": self._largest}
        save(
            folder,
            (self._packed(addresses[part], sizes[part]) for part in self._saved_parts(sizes)),
            {**(tables or {}), **{name: torch.from_numpy(table) for name, table in own.items()}},
            {**(form or {}), **described},
        )

    def load(self, saved: Saved) -> np.ndarray:
        """Take in the clusters that `save` kept; the storage must be new.

        Returns:
            Their addresses: int64, new by old (-1 for what named no cluster).

        Raises:
            ConfigError: clusters are of another size here, or there is too little DRAM.
            FlashError: the entries are not what was saved.
        """
        form = saved.form
        if form["largest"] != self._largest:
            raise ConfigError(
                f"max_cluster_size={self._largest}: the clusters in {saved.folder} were made with {form['largest']}. "
                "Load them with that."
            )
        self.open(form["width"], getattr(torch, form["dtype"]))
        old, sizes, group = (saved.table(name, torch.int64, -1).numpy() for name in ("address", "size", "group"))
        addresses = np.full(int(old.max(initial=-1)) + 1, -1, dtype=np.int64)
        for part, packed in zip(self._saved_parts(sizes), saved.parts(), strict=True):
            entries, position = self.arena.apart(np.frombuffer(packed, dtype=self.arena.data.dtype))
            self.begin()  # those of the part before may leave
            addresses[old[part]] = self.create(
                self._to_tensor(entries.copy()), sizes[part], position, group[part], growing=True
            )
        return addresses

    def close(self) -> None:
        """Give files and threads back; the storage cannot be used afterwards."""
        self.flash.close()
        self.index_file.close()

    def _saved_parts(self, sizes: np.ndarray) -> Iterator[slice]:
        return portions(sizes * self.entry_bytes, SAVED_PART)

    def _packed(self, addresses: np.ndarray, sizes: np.ndarray) -> bytes:
        """Entries and positions of clusters as they lie in DRAM."""
        (entries,), (position,) = self.gather(addresses, sizes)
        rows = np.empty(len(position), dtype=self.arena.data.dtype)
        into, at = self.arena.apart(rows)
        into[:], at[:] = self._to_bytes(entries), position.numpy()
        return rows.tobytes()

    def _enter(self, addresses: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Slots for clusters that exist in DRAM alone. Their rows are the caller's matter."""
        _, evicted = self.table.admit(addresses, sizes, fresh=True)
        self._evict(evicted)
        slots = self.table.enter(addresses, sizes)
        self.table.resize(slots, sizes)
        return slots

    def _fit(self) -> None:
        """Keep clusters and everything else within the budget, as tables and what others spend grow.

        Only at the start of a round, when no slot is in use.
        """
        self._unfit = False
        self._tables_of_slots = self.arena.nbytes + self.table.nbytes
        tables = self.table_bytes - ROW_TABLES * self.arena.limit
        row = self.entry_bytes + ROW_TABLES
        rows = max(self._least_rows, (self._dram - self._shared - tables - sum(self._spent.values())) // row)
        if rows >= self.table.capacity:
            if rows > self.arena.limit:
                self.arena.grow(rows)
            self.table.capacity = min(rows, self.arena.limit)
            return
        # A little more than needed, so that it is not done for every new cluster.
        self.table.capacity = max(self._least_rows, rows - rows // 32)
        self._evict(self.table.make_room(0))
        if self.arena.touched > self.table.capacity:
            self.arena.shrink(self.table.capacity)
        if self.table.sparse:
            self.arena.renumber(self.table.renumber())
            self._unfit = True

    def _evict(self, evicted: Evicted) -> None:
        if len(evicted.slots):
            self.transfers.write_back(evicted.slots, evicted.addresses)
            self.arena.drop(evicted.slots)

    def _fill(self, rows: np.ndarray, entries: torch.Tensor, position: np.ndarray | None) -> None:
        self.arena.entries[rows] = self._to_bytes(entries)
        self.arena.position[rows] = 0 if position is None else position

    def _to_bytes(self, entries: torch.Tensor) -> np.ndarray:
        raw = entries.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        return raw.view(self.arena.entries.dtype)[..., 0]

    def _to_tensor(self, entries: np.ndarray) -> torch.Tensor:
        if entries.strides[-1] % self.dtype.itemsize:
            entries = entries.copy()
        raw = torch.from_numpy(entries[..., None].view(np.uint8))
        return raw.view(self.dtype)
