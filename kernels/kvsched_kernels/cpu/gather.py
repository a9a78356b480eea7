"""Entries copied one by one, without lists of where each comes from and goes to."""

from __future__ import annotations

import numpy as np

from . import compiled


@compiled
def fullest(wanted, stream, streams):
    """See `gather.fullest`."""
    count = np.zeros(streams, np.int64)
    for nth in range(len(stream)):
        for offset in range(wanted.shape[1]):
            count[stream[nth]] += wanted[nth, offset]
    return count.max()


@compiled
def gather_entries(memory, position, table, slots, wanted, stream, filled, entries_out, position_out):
    """See `gather.gather_entries`."""
    step, size = len(memory) // len(position), entries_out.shape[2]
    for nth in range(len(slots)):
        into = stream[nth]
        for offset in range(wanted.shape[1]):
            if wanted[nth, offset]:
                row, column = np.int64(table[slots[nth], offset]), filled[into]
                source, target = memory[row * step : row * step + size], entries_out[into, column]
                for byte in range(size):  # which becomes one copy of memory
                    target[byte] = source[byte]
                position_out[into, column] = position[row]
                filled[into] += 1
