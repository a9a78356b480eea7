"""Reads for pieces of a file, against what a plain loop over bytes says."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsched.dynakv.runs import LONGEST_GAP, merge


@settings(max_examples=200, deadline=None)
@given(
    gaps=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 3000)), max_size=12),
    shuffle=st.randoms(use_true_random=False),
    waste=st.sampled_from([0.0, 0.15, 2.0]),
)
def test_every_piece_is_in_one_read_of_whole_sectors(gaps, shuffle, waste):
    pieces, at = [], 0
    for gap, length in gaps:
        pieces.append((at + gap, length))
        at += gap + length
    shuffle.shuffle(pieces)
    start, length = np.array(pieces, dtype=np.int64).reshape(-1, 2).T
    runs = merge(start, length, 512, waste)
    assert not (runs.offset % 512).any() and not (runs.length % 512).any() and (runs.length > 0).all()
    assert (runs.offset[1:] > runs.offset[:-1] + runs.length[:-1]).all()  # those that touch are one
    for (begin, size), run, memory in zip(pieces, runs.run.tolist(), runs.at.tolist(), strict=True):
        offset = begin - runs.offset[run]
        assert offset >= 0 and offset + size <= runs.length[run]
        assert memory == runs.memory[run] + offset
    sectors = {sector for begin, size in pieces for sector in range(begin // 512, (begin + size - 1) // 512 + 1)}
    assert runs.length.sum() <= max(512 * len(sectors), (1 + waste) * length.sum())


def test_small_gaps_are_read_through_and_shortest_first_while_bytes_allow():
    start = np.array([0, 5120, 12288, 1 << 20])
    length = np.array([4096, 4096, 4096, 1 << 18])
    assert merge(start, length, 512, waste=0).length.tolist() == [4096, 4096, 4096, 1 << 18]
    assert merge(start[:3], length[:3], 512, waste=0.1).length.tolist() == [9216, 4096]
    assert merge(start, length, 512).length.tolist() == [16384, 1 << 18]
    assert merge(np.array([0, 1 << 20]), np.array([1 << 19, 1 << 19]), 512, waste=9.0).length.tolist() == [1 << 19] * 2
    assert LONGEST_GAP < 1 << 19
