"""The DRAM budget's table and its policies, against plain dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsched.dynakv.residency import (
    Access,
    ClusterAligned,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    Residency,
    replay,
)
from kvsched.errors import ConfigError

POLICIES = [LeastRecentlyUsed, LeastFrequentlyUsed, ClusterAligned]


def ask(table: Residency, addresses: list[int], sizes: list[int], step: int | None = None) -> list[int]:
    """Ask for clusters in a round of their own; the addresses that were not there."""
    table.begin(step)
    address, size = np.array(addresses, dtype=np.int64), np.array(sizes, dtype=np.int64)
    slots, _ = table.admit(address, np.where(table.holds(address), 0, size))
    table.enter(address[slots < 0], size[slots < 0])
    return address[slots < 0].tolist()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_asked_for_is_there_and_what_is_there_fits(policy, data):
    capacity = data.draw(st.integers(30, 60))
    table, held = Residency(capacity, policy()), {}
    for step in range(data.draw(st.integers(1, 30))):
        wanted = data.draw(st.dictionaries(st.integers(0, 40), st.integers(1, 4), max_size=5))
        wanted = {address: held.get(address, size) for address, size in wanted.items()}
        table.begin(step)
        address, size = np.array(list(wanted), dtype=np.int64), np.array(list(wanted.values()), dtype=np.int64)
        slots, gone = table.admit(address, np.where(table.holds(address), 0, size))
        assert [at >= 0 for at in slots.tolist()] == [at in held for at in wanted]
        assert {at: held.pop(at) for at in gone.addresses.tolist()} == dict(
            zip(gone.addresses.tolist(), gone.sizes.tolist(), strict=True)
        )
        assert not set(gone.addresses.tolist()) & set(wanted)
        table.enter(address[slots < 0], size[slots < 0])
        held.update(wanted)
        if wanted and data.draw(st.booleans()):
            first = next(iter(wanted))
            slot = table.slot_of(np.array([first]))
            for at in table.make_room(max(0, 5 - held[first])).addresses.tolist():
                del held[at]
            table.resize(slot, np.array([5]))
            held[first] = 5
        if wanted and data.draw(st.booleans()):
            last = list(wanted)[-1]
            table.forget(np.array([last]))
            del held[last]
        assert table.used == sum(held.values()) <= capacity
        slots = table.residents()
        assert dict(zip(table.address(slots).tolist(), table.size(slots).tolist(), strict=True)) == held


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), unique=True, max_size=6), max_size=40))
def test_least_recently_used_leaves_first(rounds):
    table, last = Residency(8, LeastRecentlyUsed()), {}
    for now, wanted in enumerate(rounds):
        missing = ask(table, wanted, [1] * len(wanted))
        assert missing == [address for address in wanted if address not in last]
        last.update(dict.fromkeys(wanted, now))
        here = set(table.address(table.residents()).tolist())
        gone = [last.pop(address) for address in set(last) - here]
        assert not gone or max(gone) <= min(last[address] for address in here)


def test_least_frequently_used_counts_also_what_is_away():
    table = Residency(2, LeastFrequentlyUsed())
    for _ in range(3):
        ask(table, [1], [1])
    ask(table, [2], [1])
    assert ask(table, [3], [1]) == [3]
    assert ask(table, [2], [1]) == [2]  # 3 left, used once
    assert ask(table, [3], [1]) == [3]  # 2 left, as often used and longer ago
    assert ask(table, [1], [1]) == []


def test_clusters_that_layers_ask_for_in_turn_are_not_all_lost():
    # Three of four fit. Recency alone loses every one just before its layer comes again.
    accesses = [
        Access(layer, step, np.array([layer]), np.array([4]), np.array([])) for step in range(50) for layer in range(4)
    ]
    assert replay(accesses, 12, LeastRecentlyUsed).clusters_found == 0
    assert replay(accesses, 12, ClusterAligned).clusters_found >= 90


def test_small_clusters_and_those_updated_lately_stay():
    table = Residency(100, ClusterAligned())
    table.begin(1)
    ask(table, [0, 1, 2], [40, 10, 40], step=2)
    assert ask(table, [3], [10], step=3) == [3]
    table.begin(4)
    assert table.make_room(30).addresses.tolist() == [0]
    table = Residency(100, ClusterAligned())
    ask(table, [0, 1, 2], [20, 20, 60], step=2)
    table.resize(table.slot_of(np.array([0])), np.array([20]))
    ask(table, [1, 2], [20, 60], step=3)
    table.begin(4)
    assert 0 not in table.make_room(15).addresses.tolist()


def test_what_a_round_uses_is_pinned_and_the_error_says_what_would_do():
    table = Residency(4, ClusterAligned(), entry_bytes=100)
    ask(table, [1, 2, 3], [1, 1, 1])
    with pytest.raises(ConfigError, match=r"400 bytes, cannot hold the 600 bytes .* Set dram higher"):
        table.admit(np.array([4, 5, 6]), np.array([1, 1, 1]))
    assert ask(table, [4, 5, 6], [1, 1, 1]) == [4, 5, 6]


def test_a_replay_counts_clusters_and_entries_after_warming_up():
    accesses = [Access(0, step, np.array([step % 2, 2]), np.array([3, 2]), np.array([2])) for step in range(6)]
    rate = replay(accesses, 5, LeastRecentlyUsed, skip=2)
    assert (rate.clusters, rate.clusters_found, rate.entries, rate.entries_found) == (8, 4, 20, 8)
    assert replay(accesses, 8, LeastRecentlyUsed, skip=2).clusters_found == 8
    grown = [Access(0, step, np.array([0]), np.array([step + 1]), np.array([])) for step in range(5)]
    assert replay(grown, 5, ClusterAligned).clusters_found == 4
