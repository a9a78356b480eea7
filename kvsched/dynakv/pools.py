"""Who lies where on flash: one slot for each cluster, of the size that a cluster may reach.

Slots are numbered across all layers. A cluster grows inside its slot, so appending never moves data; a slot that is
given back is used again before the file grows. In the paper's dual-head pools (section on continuity-centric flash
management) two such slots lie side by side and fill towards each other: a slot is half a pool.
"""

from __future__ import annotations

import numpy as np


class SlotPool:
    """Hands out slot numbers and says how many slots the file needs."""

    def __init__(self) -> None:
        self.capacity = 0
        self._fresh = 0
        self._free: list[int] = []

    @property
    def used(self) -> int:
        """Slots handed out and not given back."""
        return self._fresh - len(self._free)

    def take(self, count: int) -> np.ndarray:
        """`count` slots, int64. Fresh ones are neighbours in the file, so clusters made together lie together."""
        reused = [self._free.pop() for _ in range(min(count, len(self._free)))]
        fresh = range(self._fresh, self._fresh + count - len(reused))
        self._fresh = fresh.stop
        while self.capacity < self._fresh:
            self.capacity = max(64, 2 * self.capacity)
        return np.array([*reused, *fresh], dtype=np.int64)

    def give_back(self, slots: np.ndarray) -> None:
        """Free `slots`, which must be in use."""
        self._free.extend(slots.tolist())
