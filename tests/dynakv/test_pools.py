"""The layout on flash, against a plain record of who has which places."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsched.dynakv.pools import CHUNK, FreePlaces, Numbers, Pools, keep_order

LARGEST = 12


def taken(pools: Pools, size: dict[int, int]) -> dict[int, list[int]]:
    """The places of each cluster, in the order of its entries."""
    addresses = np.array(sorted(size), dtype=np.int64)
    origin, step = pools.where(addresses)
    return {
        address: [first + by * i for i in range(size[address])]
        for address, first, by in zip(addresses.tolist(), origin.tolist(), step.tolist(), strict=True)
    }


def check(pools: Pools, size: dict[int, int]) -> None:
    places = [place for of in taken(pools, size).values() for place in of]
    assert len(set(places)) == len(places)
    assert all(0 <= place < pools.end for place in places)
    assert pools.used == len(size) and pools.entries == sum(size.values())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_clusters_never_share_places_and_stay_where_they_are_while_they_fit(data):
    pools, size = Pools(LARGEST, grain=data.draw(st.sampled_from([1, 2, 4]))), {}
    most = 0
    for _ in range(data.draw(st.integers(1, 25))):
        sizes = np.array(data.draw(st.lists(st.integers(1, LARGEST), min_size=1, max_size=9)))
        what = data.draw(st.sampled_from(["create", "add", "resize", "resize", "free"]))
        which = st.sets(st.sampled_from(sorted(size)), max_size=9) if size else st.just(set())
        some = np.array(sorted(data.draw(which)), dtype=np.int64)
        before = taken(pools, size)
        if what == "create" or (what == "add" and len(some)):
            groups = data.draw(st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes)))
            group, beside = np.sort(np.array(groups)), np.resize(some, len(sizes))
            group = group if what == "create" else pools.group(beside)
            addresses = pools.create(sizes, group) if what == "create" else pools.add(sizes, beside)
            assert not set(addresses.tolist()) & set(size)
            assert pools.group(addresses).tolist() == group.tolist()
            size.update(zip(addresses.tolist(), sizes.tolist(), strict=True))
        elif what == "resize" and len(some):
            sizes = np.resize(sizes, len(some))
            room = pools.have_room(some, sizes)
            moved = pools.resize(some, sizes)
            assert not room.all() or not moved.any()
            for address, new, gone in zip(some.tolist(), sizes.tolist(), moved.tolist(), strict=True):
                assert not (gone and new <= size[address])
                size[address] = new
            stayed = set(size) - set(some[moved].tolist())
        elif what == "free":
            pools.free(some)
            for address in some.tolist():
                del size[address]
        check(pools, size)
        after = taken(pools, size)
        for address in set(before) & set(after) if what != "resize" or not len(some) else set(before) & stayed:
            common = min(len(before[address]), len(after[address]))
            assert before[address][:common] == after[address][:common]
        most = max(most, sum(size.values()))
    assert pools.end <= 8 * most + 6 * CHUNK + 64
    pools.free(np.array(sorted(size), dtype=np.int64))
    assert pools.used == 0


def test_clusters_made_together_lie_together_without_gaps():
    sizes, group = np.array([3, 5, 2, 4, 4, 1, 6]), np.array([0, 0, 0, 1, 1, 1, 1])
    pools = Pools(LARGEST)
    places = taken(pools, dict(zip(pools.create(sizes, group).tolist(), sizes.tolist(), strict=True)))
    assert [min(of) for of in places.values()] == (np.cumsum(sizes) - sizes).tolist()
    # Pairs fill their pool from both ends; the third of the first group has a pool of its own.
    assert [of == sorted(of) for of in places.values()] == [True, False, True, True, False, True, False]


def test_clusters_that_are_going_to_grow_have_room_between_the_two_of_a_pair():
    sizes, pools = np.array([8, 8, 4]), Pools(LARGEST)
    addresses = pools.create(sizes, np.zeros(3, dtype=np.int64), growing=True)
    first, second, third = taken(pools, dict(zip(addresses.tolist(), sizes.tolist(), strict=True))).values()
    assert (first[0], second[0], third[0]) == (0, 19, 20), "one from the start, one from the end of 20, then the next"
    assert pools.have_room(addresses, np.array([10, 10, 5])).all()
    assert pools.have_room(addresses, np.array([10, 11, 6])).tolist() == [False, False, False]
    assert pools.have_room(addresses[:1], np.array([12])).all()
    assert not pools.resize(addresses, np.array([10, 10, 5])).any()


def test_a_pair_grows_inwards_and_a_place_that_was_left_is_taken_by_another():
    pools = Pools(LARGEST)
    (origin,) = pools.create(np.array([4]), np.array([0]))
    first, second = pools.add(np.array([2, 2]), np.array([origin, origin])).tolist()
    a, b = taken(pools, {first: 2, second: 2}).values()
    start = a[0]
    assert a == [start, start + 1] and b == [start + 7, start + 6]
    assert not pools.resize(np.array([first, second]), np.array([5, 3])).any()
    assert pools.resize(np.array([second]), np.array([4])).all()
    pools.resize(np.array([first]), np.array([2]))
    (third,) = pools.add(np.array([3]), np.array([second]))
    assert taken(pools, {third: 3})[third][0] == taken(pools, {second: 4})[second][0] + 15
    pools.free(np.array([second]))
    (fourth,) = pools.add(np.array([4]), np.array([third]))
    assert pools.where(np.array([fourth]))[0] == pools.where(np.array([third]))[0] - 15


def test_growing_costs_few_moves():
    pools, moved = Pools(32), 0
    (address,) = pools.create(np.array([2]), np.array([0]))
    for size in range(3, 33):
        moved += (size - 1) * int(pools.resize(np.array([address]), np.array([size])).sum())
    assert moved <= 2 * 32


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1)), max_size=40))
def test_free_stretches_are_found_and_neighbours_become_one(steps):
    free, held, end = FreePlaces(), [], 0
    for length, which in steps:
        if held and which < 0.5:
            free.give_back(*held.pop(int(which * 2 * len(held))))
            continue
        start = free.take(length)
        if start is None:
            start, end = end, end + length
        assert all(start + length <= other or other + long <= start for other, long in held)
        held.append((start, length))
    for one in held:
        free.give_back(*one)
    assert end == 0 or free.take(end) == 0


def test_numbers_are_used_again():
    numbers = Numbers()
    first = numbers.take(5)
    numbers.give_back(first[1:3])
    assert numbers.used == 3
    assert sorted(numbers.take(3).tolist()) == [1, 2, 5]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_part_that_stays_keeps_its_offsets(data):
    second = np.array(data.draw(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4)))
    sizes = np.array([data.draw(st.integers(0, 7)) for _ in second])
    order = keep_order(second, sizes)
    for row, leaves, size in zip(order.tolist(), second.tolist(), sizes.tolist(), strict=True):
        assert sorted(row) == list(range(7))
        stays = [i for i in range(size) if not leaves[i]]
        assert set(row[: len(stays)]) == set(stays)
        assert set(row[len(stays) : size]) == {i for i in range(size) if leaves[i]}
        assert all(row[i] == i for i in stays if i < len(stays))
