"""Entries copied out of an arena, compiled and not, against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvsched_kernels import fullest, gather_entries


@pytest.mark.usefixtures("path")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 16),
    streams=st.integers(1, 4),
    slots=st.integers(1, 8),
    width=st.sampled_from([3, 8]),
    apart=st.integers(0, 5),
)
def test_entries_come_cluster_after_cluster_to_their_streams(seed, streams, slots, width, apart):
    draw = np.random.default_rng(seed)
    largest, rows = 4, 40
    memory = draw.integers(0, 256, (rows, width + 4 + apart), dtype=np.uint8)
    data = memory[:, :width]
    position = np.ndarray(rows, np.int32, memory.data, offset=width, strides=(memory.shape[1],))  # at odd addresses too
    table = draw.permutation(rows)[: slots * largest].astype(np.int32).reshape(slots, largest)
    asked = draw.permutation(slots)
    wanted = draw.random((slots, largest - 1)) < 0.6
    stream = draw.integers(0, streams, slots)
    for slot, row in zip(asked, wanted, strict=True):
        table[slot, :-1][~row] = 1 << 30  # what is not wanted may be nowhere
    most = fullest(wanted, stream, streams)
    out, at = np.zeros((streams, most + 2, width), np.uint8), np.full((streams, most + 2), -1)
    filled = np.zeros(streams, np.int64)
    for part in (slice(0, slots // 2), slice(slots // 2, slots)):
        gather_entries(memory.reshape(-1), position, table, asked[part], wanted[part], stream[part], filled, out, at)

    expected: list[list[int]] = [[] for _ in range(streams)]
    for nth, slot in enumerate(asked):
        expected[stream[nth]] += table[slot, : largest - 1][wanted[nth]].tolist()
    assert most == max(map(len, expected)) and filled.tolist() == [len(own) for own in expected]
    for s, own in enumerate(expected):
        assert np.array_equal(out[s, : len(own)], data[own]) and not out[s, len(own) :].any()
        assert np.array_equal(at[s, : len(own)], position[own]) and (at[s, len(own) :] == -1).all()
