"""Clusters that are read before they are fetched, while their step or the layer before them goes on computing."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from .engine import Transfer
from .flash import Buffer, FlashFile


@dataclass(frozen=True)
class Placed:
    """Clusters in a buffer, int64 `[N]` each.

    Args:
        first: byte at which a cluster's first entry begins.
        step: bytes from there to each further entry; negative for those that grow downwards.
        sizes: entries.
    """

    first: np.ndarray
    step: np.ndarray
    sizes: np.ndarray

    def __getitem__(self, which: np.ndarray) -> Placed:
        return Placed(self.first[which], self.step[which], self.sizes[which])


@dataclass
class AheadCounters:
    """How well it went: clusters read ahead and those of them asked for; how long the reads took, and how much of that
    somebody waited for them."""

    clusters: int = 0
    used: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class Ahead:
    """One batch of clusters on their way into a buffer, which is taken until they arrived or are given up."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.counters = AheadCounters()
        self._transfer: Transfer | None = None
        self._index: dict[int, int] = {}
        self._placed: Placed

    def start(self, transfer: Transfer, addresses: np.ndarray, placed: Placed) -> None:
        """The buffer is free, and `transfer` fills it with clusters."""
        self._transfer, self._placed = transfer, placed
        self._index = {address: i for i, address in enumerate(addresses.tolist())}
        self.counters.clusters += len(addresses)

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        """bool: which clusters can be taken."""
        return np.array([address in self._index for address in addresses.tolist()], dtype=bool)

    def take(self, addresses: np.ndarray, flash: FlashFile) -> tuple[np.ndarray, Placed | None]:
        """Those of `addresses` that were read ahead: bool `[N]`, and where they are once they have arrived.

        They are handed out once.
        """
        index = np.array([self._index.pop(address, -1) for address in addresses.tolist()], dtype=np.int64)
        found = index >= 0
        if not found.any():
            return found, None
        self.counters.used += int(found.sum())
        self._finish(flash)
        return found, self._placed[index[found]]

    def forget(self, addresses: np.ndarray) -> None:
        """Clusters no longer exist, or flash holds something else of them."""
        for address in addresses.tolist():
            self._index.pop(address, None)

    def give_up(self, flash: FlashFile) -> None:
        """Forget all; the buffer is free afterwards."""
        self._index = {}
        self._finish(flash)

    def _finish(self, flash: FlashFile) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            started = time.perf_counter()
            flash.wait(transfer)
            self.counters.waited += time.perf_counter() - started
            self.counters.seconds += transfer.seconds


class Order:
    """In which order layers come, as they did last time."""

    def __init__(self) -> None:
        self._after: dict[int, int] = {}
        self._latest: int | None = None

    def follow(self, layer: int) -> int | None:
        """It is a layer's turn; the one that came after it last time, where that is known."""
        if self._latest is not None:
            self._after[self._latest] = layer
        self._latest = layer
        return self._after.get(layer)


class LastStep:
    """What each layer wanted in its last step, so that it can be read while the layer before it computes.

    A new query wants much of what the last one did, and the layers come in the same order in every step. The paper
    says when the next layer's clusters are read, not which.
    """

    def __init__(self) -> None:
        self._wanted: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._order = Order()

    @property
    def nbytes(self) -> int:
        """DRAM that it takes."""
        return sum(addresses.nbytes + wanted.nbytes for addresses, wanted in self._wanted.values())

    def follow(self, layer: int, addresses: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Note the clusters that a layer wants now (int64 `[N]`) and which of their entries (bool `[N, m]`).

        Returns:
            The same of the layer that comes next, as it was in the last step; `None` where that is not known.
        """
        self._wanted[layer] = addresses.astype(np.int32), np.packbits(wanted, axis=1)
        following = self._order.follow(layer)
        if following is None:
            return None
        addresses, packed = self._wanted[following]
        return addresses.astype(np.int64), np.unpackbits(packed, axis=1).astype(bool)
