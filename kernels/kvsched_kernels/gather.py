"""Entries of chosen tokens, copied from where their clusters lie in host memory to a dense batch."""

from __future__ import annotations

import numpy as np

from .dispatch import numba_installed


def fullest(wanted: np.ndarray, stream: np.ndarray, streams: int) -> int:
    """Most entries that any of S streams has among bool `wanted` `[N, m]` of clusters of `stream` (int64 `[N]`)."""
    if numba_installed("fullest"):
        from .cpu.gather import fullest as compiled

        return compiled(wanted, stream, streams)
    return int(np.bincount(stream, weights=wanted.sum(1), minlength=streams).max())


def gather_entries(
    memory: np.ndarray,
    position: np.ndarray,
    table: np.ndarray,
    slots: np.ndarray,
    wanted: np.ndarray,
    stream: np.ndarray,
    filled: np.ndarray,
    entries_out: np.ndarray,
    position_out: np.ndarray,
) -> None:
    """Copy entries to the first free columns of their streams, cluster after cluster.

    Args:
        memory: uint8, R rows of as many bytes, which begin with entries of E bytes, at `position` (int32 `[R]`).
        table: int32 `[C, m']`, the row of each entry of each slot.
        slots: int64 `[N]`, of the clusters; wanted: bool `[N, m]`, which of their entries; stream: int64 `[N]`.
        filled: int64 `[S]`, columns that are taken; it counts on.
        entries_out: uint8 `[S, n, E]`; position_out: int64 `[S, n]`. Both are written.
    """
    if numba_installed("gather_entries"):
        from .cpu.gather import gather_entries as compiled

        compiled(memory, position, table, slots, wanted, stream, filled, entries_out, position_out)
        return
    rows = memory.reshape(len(position), -1)[:, : entries_out.shape[2]]
    nth, offset = wanted.nonzero()
    of, row = stream[nth], table[slots[nth], offset]
    order = np.argsort(of, kind="stable")
    count = np.bincount(of, minlength=len(filled))
    column = np.empty_like(of)
    column[order] = np.arange(len(of)) - np.repeat(np.cumsum(count) - count - filled, count)
    entries_out[of, column], position_out[of, column] = rows[row], position[row]
    filled += count
