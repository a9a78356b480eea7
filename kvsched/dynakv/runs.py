"""Which reads bring a set of clusters: neighbours in one, and small gaps read through where that is cheaper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WASTE = 0.15
"""Bytes that may be read beyond those asked for, as a share of them: for whole sectors, and for gaps."""

LONGEST_GAP = 24 * 1024
"""A longer gap costs more than one more read: what a device moves in the time of a read, as in the paper's figures."""


@dataclass(frozen=True)
class Runs:
    """Reads of whole sectors, in the order of the file, one after the other in memory.

    Args:
        offset, length: int64 `[R]`, bytes in the file.
        run: int64 `[N]`, the read that brings each piece.
        at: int64 `[N]`, where each piece begins in memory.
    """

    offset: np.ndarray
    length: np.ndarray
    run: np.ndarray
    at: np.ndarray

    @property
    def memory(self) -> np.ndarray:
        """int64 `[R]`: where each read begins in memory."""
        return self.length.cumsum() - self.length


def merge(start: np.ndarray, length: np.ndarray, sector: int, waste: float = WASTE) -> Runs:
    """Reads for pieces of the file.

    Args:
        start, length: int64 `[N]`, bytes; pieces do not overlap.
        sector: what offsets and lengths of reads are multiples of.
        waste: bytes that may be read beyond the pieces' own, as a share of these. Whole sectors come first; what is
            left goes to the gaps, shortest first.
    """
    order = np.argsort(start, kind="stable")
    first = start[order] // sector * sector
    last = -(-(start[order] + length[order]) // sector) * sector
    gap = first[1:] - last[:-1]
    apart = np.flatnonzero(gap > 0)
    left = (1 + waste) * length.sum() - (last - first).sum() - np.minimum(gap, 0).sum()
    shortest = apart[np.argsort(gap[apart], kind="stable")]
    bridged = (np.cumsum(gap[shortest]) <= left) & (gap[shortest] <= LONGEST_GAP)
    opens = np.zeros(len(start), dtype=bool)
    opens[:1] = opens[shortest[~bridged] + 1] = True
    begins = np.flatnonzero(opens)
    offset = first[begins]
    size = last[np.append(begins, len(start))[1:] - 1] - offset
    run = np.empty(len(start), dtype=np.int64)
    run[order] = opens.cumsum() - 1
    memory = size.cumsum() - size
    return Runs(offset, size, run, memory[run] + start - offset[run])
