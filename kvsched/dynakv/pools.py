"""Who lies where on flash: clusters in pairs, each pair in a pool that it fills from both ends.

The file is a row of places, one for each entry (key and value of a token). After DynaKV's dual-head pools: the first
cluster of a pool grows upwards from its start, the second downwards from its end, so appending moves nothing while
both fit. The paper leaves open what a full pool does; here the cluster that grows out of it goes to a new one, which
costs little: a cluster that grows out of its pool lies in DRAM whole. It sizes a pool to twice the largest cluster;
most of a prompt's never grow again, so pools that are made together (a prompt's) have `SPARE` of their two clusters as
room between these, which a read of both passes over, and pools of clusters that did grow have `GROWTH` times the room
that these need now.
"""

from __future__ import annotations

import bisect

import numpy as np

GROWTH = 2
"""Room of a growing cluster, in multiples of its size: it moves when it doubled, so each entry moves about once."""

SPARE = 0.25
"""Room in a prompt's pool, as a share of its two clusters, where clusters grow at all."""

CHUNK = 256
"""Places set aside at a time for the pools of one group, so that what a stream adds in turn lies side by side."""


class FreePlaces:
    """Stretches of the file that nobody uses; neighbours become one."""

    def __init__(self) -> None:
        self._by_length: list[tuple[int, int]] = []
        self._length: dict[int, int] = {}
        self._start_by_end: dict[int, int] = {}

    def take(self, length: int) -> int | None:
        """The start of `length` places from the shortest stretch that has them; `None` if there is none."""
        at = bisect.bisect_left(self._by_length, (length, 0))
        if at == len(self._by_length):
            return None
        found, start = self._by_length[at]
        self._remove(start)
        if found > length:
            self._add(start + length, found - length)
        return start

    def give_back(self, start: int, length: int) -> None:
        """Free `length` places, which must be in use."""
        if (before := self._start_by_end.get(start)) is not None:
            start, length = before, length + self._remove(before)
        if start + length in self._length:
            length += self._remove(start + length)
        self._add(start, length)

    def _add(self, start: int, length: int) -> None:
        bisect.insort(self._by_length, (length, start))
        self._length[start] = length
        self._start_by_end[start + length] = start

    def _remove(self, start: int) -> int:
        length = self._length.pop(start)
        del self._start_by_end[start + length]
        del self._by_length[bisect.bisect_left(self._by_length, (length, start))]
        return length


class Numbers:
    """Small whole numbers to name things by, used again once given back."""

    def __init__(self) -> None:
        self.limit = 0
        self._free: list[int] = []

    @property
    def used(self) -> int:
        """Numbers taken and not given back."""
        return self.limit - len(self._free)

    def take(self, count: int) -> np.ndarray:
        """`count` numbers, int64."""
        cut = max(0, len(self._free) - count)
        again, self._free = self._free[cut:], self._free[:cut]
        fresh = range(self.limit, self.limit + count - len(again))
        self.limit = fresh.stop
        return np.array([*again[::-1], *fresh], dtype=np.int64)

    def taken(self) -> np.ndarray:
        """int64, ascending: all numbers taken and not given back."""
        taken = np.ones(self.limit, dtype=bool)
        taken[self._free] = False
        return np.flatnonzero(taken)

    def give_back(self, numbers: np.ndarray) -> None:
        """`numbers`, which must be in use."""
        self._free.extend(numbers.tolist())


class Pools:
    """Places of all clusters. A cluster is named by its address, which it keeps wherever it lies.

    Args:
        largest: entries that a cluster may reach.
        grain: places that fill whole sectors; pools for growing clusters begin and end on multiples, so that writing
            one leaves its neighbours' sectors alone.
    """

    def __init__(self, largest: int, grain: int = 1) -> None:
        self.largest, self.grain = largest, grain
        self.end = self.entries = 0
        self._free = FreePlaces()
        self._chunks: dict[int, tuple[int, int]] = {}
        self._open: dict[int, list[int]] = {}
        self._addresses, self._pools = Numbers(), Numbers()
        self._pool = np.zeros(0, dtype=np.int32)
        self._side = np.zeros(0, dtype=np.int8)
        # There is a row for every cluster, and clusters hold few tokens: tables are as narrow as can be.
        small = largest <= np.iinfo(np.uint8).max
        self._size = np.zeros(0, dtype=np.uint8 if small else np.int32)
        self._start = np.zeros(0, dtype=np.int32)
        self._capacity = np.zeros(0, dtype=np.uint16 if small else np.int32)
        self._group = np.zeros(0, dtype=np.int32)
        self._member = np.zeros((0, 2), dtype=np.int32)

    _PER_CLUSTER = ("_pool", "_side", "_size")
    _PER_POOL = ("_start", "_capacity", "_group", "_member")

    @property
    def used(self) -> int:
        """Clusters there are; `entries` counts what they hold."""
        return self._addresses.used

    def size(self, addresses: np.ndarray) -> np.ndarray:
        """int64: entries of each cluster."""
        return self._size[addresses].astype(np.int64)

    @property
    def nbytes(self) -> int:
        """DRAM that the tables take."""
        return sum(getattr(self, name).nbytes for name in (*self._PER_CLUSTER, *self._PER_POOL))

    def clusters(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Address, size and group of all clusters, int64 `[N]` each, by group and then in the order of the file."""
        addresses = self._addresses.taken()
        group = self.group(addresses)
        order = np.lexsort((self.where(addresses)[0], group))
        addresses = addresses[order]
        return addresses, self._size[addresses].astype(np.int64), group[order]

    def create(self, sizes: np.ndarray, group: np.ndarray, growing: bool = False) -> np.ndarray:
        """Lay clusters down side by side in the order given: those that are retrieved together, together.

        Args:
            sizes: int64 `[N]`, entries of each.
            group: int64 `[N]`, ascending; a pair is always of one group (a stream of a layer).
            growing: they are going to grow, so that pairs have room; else there are no gaps.

        Returns:
            int64 `[N]`, their addresses.
        """
        addresses = self._new_addresses(sizes)
        if len(sizes) == 0:
            return addresses
        begins = np.flatnonzero(np.diff(group, prepend=group[0] - 1))
        rank = np.arange(len(sizes)) - np.repeat(begins, np.diff(begins, append=len(sizes)))
        side = rank % 2
        nth = np.cumsum(side == 0) - 1
        capacity = np.ceil(np.bincount(nth, weights=sizes) * (1 + SPARE * growing)).astype(np.int64)
        start = self._take_places(self._whole(int(capacity.sum()))) + np.cumsum(capacity) - capacity
        pools = self._new_pools(start, capacity, group[side == 0])
        self._member[pools[nth], side] = addresses
        self._pool[addresses], self._side[addresses] = pools[nth], side
        rest = self._whole(int(capacity.sum())) - int(capacity.sum())
        self._capacity[pools[-1]] += rest
        return addresses

    def add(self, sizes: np.ndarray, beside: np.ndarray) -> np.ndarray:
        """Clusters that are going to grow, each the partner of `beside` (int64 `[N]`) if there is room, else near it.

        Returns:
            int64 `[N]`, their addresses, of the same groups.
        """
        addresses = self._new_addresses(sizes)
        for address, size, other in zip(addresses.tolist(), sizes.tolist(), beside.tolist(), strict=True):
            pool = int(self._pool[other])
            candidates = self._open.get(int(self._group[pool]), [])
            if pool in candidates and self._capacity[pool] - self._size[other] >= size:
                candidates.remove(pool)
                self._join(pool, address, size)
            else:
                self._settle(address, size, int(self._group[pool]))
        return addresses

    def resize(self, addresses: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Let clusters (each once) have other sizes; bool `[N]`: which had to move to another place."""
        moved = np.zeros(len(addresses), dtype=bool)
        self.entries += int((sizes - self.size(addresses)).sum())
        smaller = sizes < self._size[addresses]
        self._size[addresses[smaller]] = sizes[smaller]
        for i in np.flatnonzero(sizes > self._size[addresses]).tolist():
            address, size = int(addresses[i]), int(sizes[i])
            pool, side = int(self._pool[address]), int(self._side[address])
            partner = int(self._member[pool, 1 - side])
            beside = int(self._size[partner]) if partner >= 0 else 0
            self._size[address] = size
            if size + beside > self._capacity[pool]:
                self._leave(address)
                self._settle(address, size, int(self._group[pool]))
                moved[i] = True
        return moved

    def have_room(self, addresses: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """bool `[N]`: which clusters (each once) would not have to move if all of them had these sizes."""
        after = self._size.astype(np.int64)
        after[addresses] = sizes
        pool = self._pool[addresses]
        partner = self._member[pool, 1 - self._side[addresses]]
        return sizes + np.where(partner >= 0, after[partner], 0) <= self._capacity[pool]

    def free(self, addresses: np.ndarray) -> None:
        """Forget clusters."""
        self.entries -= int(self.size(addresses).sum())
        for address in addresses.tolist():
            self._leave(address)
        self._addresses.give_back(addresses)

    def where(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 `[N]` each: the place of a cluster's first entry, and the step (1 or -1) to each further one."""
        pool, side = self._pool[addresses], self._side[addresses].astype(np.int64)
        return self._start[pool] + side * (self._capacity[pool] - 1), 1 - 2 * side

    def group(self, addresses: np.ndarray) -> np.ndarray:
        """int64 `[N]`: the group of each cluster."""
        return self._group[self._pool[addresses]].astype(np.int64)

    def _settle(self, address: int, size: int, group: int) -> None:
        """Find a place for a cluster that lies nowhere."""
        room = min(self.largest, GROWTH * size)
        candidates = self._open.setdefault(group, [])
        for i in range(len(candidates) - 1, max(-1, len(candidates) - 9), -1):
            pool = candidates[i]
            partner = int(self._member[pool].max())
            if self._capacity[pool] - self._size[partner] >= room:
                del candidates[i]
                break
        else:
            capacity = self._whole(2 * room)
            (pool,) = self._new_pools(
                np.array([self._take_near(group, capacity)]), np.array([capacity]), np.array([group])
            ).tolist()
            candidates.append(pool)
        self._join(pool, address, size)

    def _join(self, pool: int, address: int, size: int) -> None:
        side = int(self._member[pool, 0] >= 0)
        self._member[pool, side] = address
        self._pool[address], self._side[address], self._size[address] = pool, side, size

    def _leave(self, address: int) -> None:
        pool, side = int(self._pool[address]), int(self._side[address])
        self._member[pool, side] = -1
        group, partner = int(self._group[pool]), int(self._member[pool, 1 - side])
        if partner >= 0:
            # Less room than a cluster like the partner would want is found again when the partner leaves.
            if self._capacity[pool] - self._size[partner] >= min(self.largest, GROWTH * int(self._size[partner])):
                self._open.setdefault(group, []).append(pool)
            return
        if pool in (candidates := self._open.get(group, [])):
            candidates.remove(pool)
        self._free.give_back(int(self._start[pool]), int(self._capacity[pool]))
        self._pools.give_back(np.array([pool]))

    def _whole(self, places: int) -> int:
        return -(-places // self.grain) * self.grain

    def _take_near(self, group: int, length: int) -> int:
        """Places beside those that the group took last."""
        start, end = self._chunks.get(group, (0, 0))
        if end - start < length:
            if end > start:
                self._free.give_back(start, end - start)
            start = self._take_places(chunk := max(length, self._whole(CHUNK)))
            end = start + chunk
        self._chunks[group] = (start + length, end)
        return start

    def _take_places(self, length: int) -> int:
        start = self._free.take(length)
        if start is None:
            start, self.end = self.end, self.end + length
        return start

    def _new_addresses(self, sizes: np.ndarray) -> np.ndarray:
        addresses = self._addresses.take(len(sizes))
        self._make_room(self._PER_CLUSTER, self._addresses.limit)
        self._size[addresses] = sizes
        self.entries += int(sizes.sum())
        return addresses

    def _new_pools(self, start: np.ndarray, capacity: np.ndarray, group: np.ndarray) -> np.ndarray:
        pools = self._pools.take(len(start))
        self._make_room(self._PER_POOL, self._pools.limit)
        self._start[pools], self._capacity[pools], self._group[pools] = start, capacity, group
        self._member[pools] = -1
        return pools

    def _make_room(self, names: tuple[str, ...], needed: int) -> None:
        have = len(getattr(self, names[0]))
        if needed > have:
            for name in names:
                old = getattr(self, name)
                more = np.zeros((max(needed, have + have // 8, 64) - have, *old.shape[1:]), dtype=old.dtype)
                setattr(self, name, np.concatenate([old, more]))


def keep_order(second: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """An order for `ClusterStorage.split` in which entries of the first part stay at their offsets where they can.

    Args:
        second: bool `[N, n]`, which entries leave.
        sizes: int64 `[N]`, entries of each cluster before.

    Returns:
        int64 `[N, n]`: old offsets of the first part, of the second, and then of what is beyond the size.
    """
    offset = np.arange(second.shape[1])
    inside = offset < sizes[:, None]
    first = inside & ~second
    count = first.sum(1, keepdims=True)
    order = np.argsort(np.where(first, 0, np.where(inside, 1, 2)), axis=1, kind="stable")
    # Entries of the first part that lie too far back go, in turn, to the offsets that the second part leaves.
    movers, holes = first & (offset >= count), ~first & (offset < count)
    row, nth = np.nonzero(movers)[0], np.nonzero(movers)[1]
    order = np.where(offset < count, offset, order)
    order[np.nonzero(holes)] = nth
    assert np.array_equal(row, np.nonzero(holes)[0])
    return order
