"""The DRAM budget's table and the slots on flash, against plain dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsched.dynakv.pools import SlotPool
from kvsched.dynakv.residency import Residency
from kvsched.errors import ConfigError


@settings(max_examples=100, deadline=None)
@given(slots=st.integers(2, 8), rounds=st.lists(st.lists(st.integers(0, 90), unique=True, max_size=8), max_size=40))
def test_least_recently_used_leaves_and_dirty_slots_are_written_back(slots, rounds):
    table = Residency(slots, 4096)
    last_used: dict[int, int] = {}
    dirty: dict[int, int] = {}
    for now, wanted in enumerate(rounds):
        wanted = wanted[:slots]
        table.begin()
        hits = [address for address in wanted if address in last_used]
        admission = table.admit(np.array(wanted, dtype=np.int64), np.full(len(wanted), now))
        assert [wanted[i] for i in admission.missing] == [address for address in wanted if address not in last_used]
        assert len(set(admission.slots.tolist())) == len(wanted)
        leave = len(last_used) + len(wanted) - len(hits) - slots
        others = sorted((used, address) for address, used in last_used.items() if address not in wanted)
        gone = {address for address, _ in last_used.items() if table.slot_of(np.array([address]))[0] < 0}
        assert len(gone) == max(0, leave)
        kept = [used for used, address in others if address not in gone]
        assert all(used <= min(kept) for used, address in others if address in gone and kept)
        written = dict(zip(admission.dirty_addresses.tolist(), admission.dirty_entries.tolist(), strict=True))
        assert written == {address: dirty[address] for address in gone if address in dirty}
        for address in gone:
            del last_used[address]
            dirty.pop(address, None)
        last_used.update(dict.fromkeys(wanted, now))
        for address, slot in list(zip(wanted, admission.slots.tolist(), strict=True))[::2]:
            table.changed(np.array([slot]), np.array([address % 7]))
            dirty[address] = address % 7
        for address in wanted[1::2]:
            if address in dirty:
                dirty[address] = now
        if wanted and now % 3 == 0:
            table.forget(np.array(wanted[:1]))
            del last_used[wanted[0]]
            dirty.pop(wanted[0], None)
    assert table.touched <= slots


def test_what_a_round_uses_is_pinned_and_the_error_says_what_would_do():
    table = Residency(4, 4096)
    table.begin()
    table.admit(np.array([1, 2, 3]), np.ones(3, dtype=np.int64))
    with pytest.raises(ConfigError, match=r"dram=16384 bytes .* at least 24576 bytes"):
        table.admit(np.array([4, 5, 6]), np.ones(3, dtype=np.int64))
    table.begin()
    assert len(table.admit(np.array([4, 5, 6]), np.ones(3, dtype=np.int64)).missing) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), st.floats(0, 1)), max_size=20))
def test_slots_on_flash_are_never_shared_and_are_used_again(steps):
    pool, held = SlotPool(), []
    most = 0
    for take, share in steps:
        taken = pool.take(take).tolist()
        assert not set(taken) & set(held)
        held += taken
        most = max(most, len(held))
        assert all(0 <= slot < pool.capacity for slot in held)
        back, held = held[: int(share * len(held))], held[int(share * len(held)) :]
        pool.give_back(np.array(back, dtype=np.int64))
        assert pool.used == len(held)
    assert pool.capacity <= max(64, 2 * most)
