"""The DRAM budget: which clusters stay, and which ones leave for others.

Nothing is read or written here: `Residency` says what has to be, so a policy can be replayed from a list of accesses.
Plain recency does badly in a decoder: its layers come in turn, so the cluster used least recently is one whose layer
comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import ConfigError
from .pools import Numbers

UPDATED_WITHIN = 16
"""Steps for which a cluster counts as recently updated: the paper finds 55-80 % of these retrieved again within 16."""

RESERVED = 0.25
"""Share of the budget that recently updated clusters keep whatever else is asked for. The paper leaves it open."""

HALF_LIFE, SMALL, AHEAD = 1.5, 1.0, 2.0
"""Of `ClusterAligned`: what did best over budgets of one to three steps' clusters on a recorded decode."""

SPARE = 1 / 64
"""Share of the budget that is made free beyond what is needed, so that victims are chosen and written in batches."""


@dataclass
class Clock:
    """Where decoding is.

    Args:
        round: counts up whenever clusters are asked for, so it orders all accesses.
        step: tokens decoded; all layers come once in a step.
        rounds_in_step: of the last full step.
    """

    round: int = 0
    step: int = 0
    rounds_in_step: int = 1
    began: int = 0

    def advance(self, step: int | None) -> None:
        """Begin a round; `step` where it is known."""
        self.round += 1
        if step is not None and step != self.step:
            self.rounds_in_step = max(1, self.round - self.began)
            self.step, self.began = step, self.round


@dataclass(frozen=True)
class Candidates:
    """Resident clusters that may leave, int64 `[n]` each.

    Args:
        address: which.
        size: entries.
        used: round of the last use.
        updated: step of the last change, -1 where there was none.
    """

    address: np.ndarray
    size: np.ndarray
    used: np.ndarray
    updated: np.ndarray


class Policy(Protocol):
    """Which clusters are worth keeping."""

    def use(self, addresses: np.ndarray, clock: Clock) -> None:
        """Clusters (int64, each once) are asked for."""

    def forget(self, addresses: np.ndarray) -> None:
        """Clusters no longer exist; their addresses will name others."""

    def worth(self, candidates: Candidates, capacity: int, clock: Clock) -> np.ndarray:
        """float64 `[n]`: those of the lowest worth leave first. `capacity` is in entries."""


class PerAddress:
    """A number for every address."""

    def __init__(self, dtype: type, fill: float) -> None:
        self._dtype, self._fill = dtype, fill
        self.values: np.ndarray = np.zeros(0, dtype=dtype)

    def cover(self, addresses: np.ndarray) -> np.ndarray:
        """The numbers, after making room for `addresses`."""
        if (needed := int(addresses.max(initial=-1)) + 1) > len(self.values):
            more = max(needed, len(self.values) * 9 // 8, 64) - len(self.values)
            self.values = np.concatenate([self.values, np.full(more, self._fill, dtype=self._dtype)])
        return self.values


class LeastRecentlyUsed:
    """The baseline of that name."""

    def use(self, addresses: np.ndarray, clock: Clock) -> None:
        """See `Policy`."""

    def forget(self, addresses: np.ndarray) -> None:
        """See `Policy`."""

    def worth(self, candidates: Candidates, capacity: int, clock: Clock) -> np.ndarray:
        """See `Policy`."""
        return candidates.used.astype(np.float64)


class LeastFrequentlyUsed:
    """The baseline of that name; uses are counted also while a cluster is not resident, ties go by recency."""

    def __init__(self) -> None:
        self._count = PerAddress(np.int32, 0)

    def use(self, addresses: np.ndarray, clock: Clock) -> None:
        """See `Policy`."""
        self._count.cover(addresses)[addresses] += 1

    def forget(self, addresses: np.ndarray) -> None:
        """See `Policy`."""
        self._count.cover(addresses)[addresses] = 0

    def worth(self, candidates: Candidates, capacity: int, clock: Clock) -> np.ndarray:
        """See `Policy`."""
        return self._count.values[candidates.address] + candidates.used / (clock.round + 1)


class ClusterAligned:
    """The paper's: small clusters before large ones, and room reserved for those updated lately.

    It leaves open how uses are weighed. Here they count `2^-(age / half_life)` each, with age in steps, so that what
    is used often and what was used just now are both kept (recency alone and frequency alone are its limits). What is
    left is divided by size, raised to `small`: a small cluster costs as much to read again as a large one, since flash
    counts reads, and takes less room. Worth also falls with the time until the cluster's layer comes again.
    """

    def __init__(
        self, half_life: float = HALF_LIFE, small: float = SMALL, reserved: float = RESERVED, ahead: float = AHEAD
    ) -> None:
        self._half_life, self._small, self._reserved, self._ahead = half_life, small, reserved, ahead
        # log2 of the weighed uses, plus step / half_life: constant until the next use.
        self._uses = PerAddress(np.float32, -np.inf)

    def use(self, addresses: np.ndarray, clock: Clock) -> None:
        """See `Policy`."""
        uses = self._uses.cover(addresses)
        uses[addresses] = np.logaddexp2(uses[addresses], clock.step / self._half_life)

    def forget(self, addresses: np.ndarray) -> None:
        """See `Policy`."""
        self._uses.cover(addresses)[addresses] = -np.inf

    def worth(self, candidates: Candidates, capacity: int, clock: Clock) -> np.ndarray:
        """See `Policy`."""
        worth = self._uses.values[candidates.address] - self._small * np.log2(candidates.size)
        until_next = 1 - (clock.round - candidates.used) / clock.rounds_in_step % 1
        worth -= self._ahead * until_next
        recent = np.flatnonzero((candidates.updated >= 0) & (candidates.updated > clock.step - UPDATED_WITHIN))
        newest = recent[np.argsort(-candidates.updated[recent], kind="stable")]
        kept = newest[np.cumsum(candidates.size[newest]) <= self._reserved * capacity]
        worth[kept] += 1e6
        return worth


@dataclass(frozen=True)
class Evicted:
    """Clusters that leave, int64 `[n]` each: their slots, addresses and sizes in entries."""

    slots: np.ndarray
    addresses: np.ndarray
    sizes: np.ndarray


_NOBODY = Evicted(*[np.zeros(0, dtype=np.int64)] * 3)


class Residency:
    """Which clusters are in DRAM, in which slot, and how many entries they take.

    Args:
        capacity: entries that fit.
        policy: who leaves first.
        entry_bytes: of one entry, for messages.
    """

    def __init__(self, capacity: int, policy: Policy, entry_bytes: int = 1) -> None:
        self.capacity, self.policy = capacity, policy
        self.used = self.hits = self.misses = 0
        self.clock = Clock()
        self._entry_bytes = entry_bytes
        self._slots = Numbers()
        self._slot_of = PerAddress(np.int32, -1)
        self._address = np.zeros(0, dtype=np.int32)
        self._size = np.zeros(0, dtype=np.int32)
        self._used_in = np.zeros(0, dtype=np.int32)
        self._updated = np.zeros(0, dtype=np.int32)

    _PER_SLOT = ("_address", "_size", "_used_in", "_updated")

    @property
    def nbytes(self) -> int:
        """DRAM that the tables take, with 4 bytes for each address that a policy may need."""
        return 2 * self._slot_of.values.nbytes + sum(getattr(self, name).nbytes for name in self._PER_SLOT)

    @property
    def clusters(self) -> int:
        """Clusters that are resident."""
        return self._slots.used

    @property
    def sparse(self) -> bool:
        """Whether tables have many rows for slots that nobody is in: more clusters, or smaller ones, were resident."""
        return len(self._size) > 2 * max(64, self._slots.used)

    def renumber(self) -> np.ndarray:
        """Give the residents the first slots, and shrink the tables to these; int64: the slots they had, in turn."""
        slots = self.residents()
        for name in self._PER_SLOT:
            setattr(self, name, getattr(self, name)[slots])
        self._slot_of.values[self._address] = np.arange(len(slots))
        self._slots = Numbers()
        self._slots.take(len(slots))
        return slots

    def begin(self, step: int | None = None) -> None:
        """Start a round: what it admits stays resident until the next. `step` counts decoded tokens, where known."""
        self.clock.advance(step)

    def slot_of(self, addresses: np.ndarray) -> np.ndarray:
        """int64: the slot of each cluster, -1 where it is not resident."""
        return self._slot_of.cover(addresses)[addresses].astype(np.int64)

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        """bool: which clusters are resident."""
        return self._slot_of.cover(addresses)[addresses] >= 0

    def size(self, slots: np.ndarray) -> np.ndarray:
        """int64: entries in each slot, which may be a part of the cluster's."""
        return self._size[slots].astype(np.int64)

    def address(self, slots: np.ndarray) -> np.ndarray:
        """int64: the cluster in each slot."""
        return self._address[slots].astype(np.int64)

    def residents(self) -> np.ndarray:
        """int64: all slots that hold a cluster."""
        return np.flatnonzero(self._size > 0)

    def admit(self, addresses: np.ndarray, lacking: np.ndarray, fresh: bool = False) -> tuple[np.ndarray, Evicted]:
        """Make room for `lacking` more entries of clusters (int64 `[n]` each, every cluster once).

        Args:
            fresh: they are new, so that it is neither a hit nor a miss that they are not resident.

        Returns:
            The slot of each, -1 where nothing of it was resident (`enter` gives it one), and who leaves.

        Raises:
            ConfigError: the budget cannot hold all that this round uses.
        """
        slots = self.slot_of(addresses)
        here = slots[slots >= 0]
        self._used_in[here] = self.clock.round
        self.policy.use(addresses, self.clock)
        if not fresh:
            misses = int(np.count_nonzero(lacking))
            self.hits += len(addresses) - misses
            self.misses += misses
        return slots, self.make_room(int(lacking.sum()))

    def enter(self, addresses: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Slots, int64 `[n]`, for clusters that room was made for."""
        slots = self._slots.take(len(addresses))
        if (have := len(self._size)) < self._slots.limit:
            for name in self._PER_SLOT:
                more = np.zeros(max(self._slots.limit, have * 9 // 8, 64) - have, dtype=np.int32)
                setattr(self, name, np.concatenate([getattr(self, name), more]))
        self._address[slots], self._size[slots] = addresses, sizes
        self._used_in[slots], self._updated[slots] = self.clock.round, -1
        self._slot_of.cover(addresses)[addresses] = slots
        self.used += int(sizes.sum())
        return slots

    def extend(self, slots: np.ndarray, more: np.ndarray) -> None:
        """Slots hold `more` entries of their clusters than before, which room was made for."""
        self._size[slots] += more.astype(np.int32)
        self.used += int(more.sum())

    def resize(self, slots: np.ndarray, sizes: np.ndarray) -> None:
        """Clusters of this round changed, and have other sizes; `make_room` came first if they are larger."""
        self.used += int((sizes - self._size[slots]).sum())
        self._size[slots] = sizes
        self._updated[slots] = self.clock.step

    def forget(self, addresses: np.ndarray) -> Evicted:
        """Clusters no longer exist; those of them that were resident."""
        self.policy.forget(addresses)
        slots = self.slot_of(addresses)
        return self._remove(slots[slots >= 0])

    def make_room(self, entries: int) -> Evicted:
        """Who has to leave so that `entries` more fit.

        Raises:
            ConfigError: this round uses too much of the budget.
        """
        excess = self.used + entries - self.capacity
        if excess <= 0:
            return _NOBODY
        slots = np.flatnonzero((self._size > 0) & (self._used_in < self.clock.round))
        sizes = self._size[slots].astype(np.int64)
        if sizes.sum() < excess:
            needed = (self.used + entries - int(sizes.sum())) * self._entry_bytes
            raise ConfigError(
                f"the part of dram that is left for clusters, {self.capacity * self._entry_bytes} bytes, cannot hold "
                f"the {needed} bytes that are needed at a time. Set dram higher, or lower budget."
            )
        candidates = Candidates(self.address(slots), sizes, self._used_in[slots], self._updated[slots])
        first = np.argsort(self.policy.worth(candidates, self.capacity, self.clock), kind="stable")
        freed = np.cumsum(sizes[first])
        count = int(np.searchsorted(freed, excess)) + 1
        count = max(count, int(np.searchsorted(freed, min(excess + SPARE * self.capacity, int(freed[-1])))))
        return self._remove(slots[first[:count]])

    def _remove(self, slots: np.ndarray) -> Evicted:
        evicted = Evicted(slots, self.address(slots), self.size(slots))
        self._slot_of.values[evicted.addresses] = -1
        self._size[slots] = 0
        self._slots.give_back(slots)
        self.used -= int(evicted.sizes.sum())
        return evicted


@dataclass(frozen=True)
class Access:
    """Clusters that a layer asked for at a step.

    Args:
        layer, step: when.
        addresses, sizes: int64 `[n]`, which (unique over all layers) and their entries.
        updated: int64 `[m]`, those of them that were changed then.
    """

    layer: int
    step: int
    addresses: np.ndarray
    sizes: np.ndarray
    updated: np.ndarray


@dataclass(frozen=True)
class HitRate:
    """What a replay found: clusters and entries asked for, and those of them found in DRAM."""

    clusters: int
    clusters_found: int
    entries: int
    entries_found: int


def replay(accesses: Iterable[Access], capacity: int, policy: Callable[[], Policy], skip: int = 0) -> HitRate:
    """What a policy keeps of `accesses` in room for `capacity` entries; the first `skip` steps warm it up uncounted."""
    table = Residency(capacity, policy())
    found = np.zeros(4, dtype=np.int64)
    for access in accesses:
        table.begin(access.step)
        slots, _ = table.admit(access.addresses, np.where(table.holds(access.addresses), 0, access.sizes))
        here = slots >= 0
        if access.step >= skip:
            found += [len(here), here.sum(), access.sizes.sum(), access.sizes[here].sum()]
        table.enter(access.addresses[~here], access.sizes[~here])
        slots = table.slot_of(access.addresses)
        changed = (table.size(slots) != access.sizes) | np.isin(access.addresses, access.updated)
        slots, sizes = slots[changed], access.sizes[changed]
        table.make_room(max(0, int((sizes - table.size(slots)).sum())))
        table.resize(slots, sizes)
    return HitRate(*found.tolist())
