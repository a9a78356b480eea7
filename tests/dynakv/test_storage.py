"""Both tiers together against a plain dictionary of entries, with faults at every call that reaches the device."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvsched import DynaKVConfig
from kvsched.dynakv import aio, flash
from kvsched.dynakv.engine import ThreadEngine
from kvsched.dynakv.pools import keep_order
from kvsched.dynakv.snapshot import Saved, save
from kvsched.dynakv.storage import ClusterStorage
from kvsched.errors import ConfigError, FlashError, UnsupportedModelError

LARGEST = 8
FORMS = [(6, torch.float32), (128, torch.float16), (64, torch.float32), (40, torch.bfloat16)]


class Recorded:
    """A storage, and beside it the entries and positions of every cluster as they should be."""

    def __init__(self, width: int, dtype: torch.dtype, dram: int, seed: int = 0) -> None:
        self.storage = ClusterStorage(DynaKVConfig(cluster_size=4, max_cluster_size=LARGEST, dram=dram, io_threads=2))
        self.storage.open(width, dtype)
        self.width, self.dtype = width, dtype
        self.held: dict[int, tuple[torch.Tensor, np.ndarray]] = {}
        self._draw = torch.Generator().manual_seed(seed)
        self._tokens = 0

    def away(self, count: int) -> list[int]:
        """Neighbours on flash that are not in DRAM."""
        addresses = np.array(list(self.held))
        away = ~self.storage.resident(addresses)
        start = next(i for i in range(len(away)) if away[i : i + count].all())
        return addresses[start : start + count].tolist()

    def fresh(self, count: int) -> tuple[torch.Tensor, np.ndarray]:
        """Entries that differ in every bit, NaN and infinities among them, and positions."""
        nbytes = count * self.width * self.dtype.itemsize
        raw = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=self._draw)
        self._tokens += count
        return raw.view(self.dtype).view(count, self.width), np.arange(self._tokens - count, self._tokens)

    def sizes(self, addresses: list[int]) -> np.ndarray:
        return np.array([len(self.held[address][0]) for address in addresses], dtype=np.int64)

    def create(self, sizes: list[int], groups: int = 1) -> list[int]:
        size = np.array(sizes, dtype=np.int64)
        entries, position = self.fresh(int(size.sum()))
        self.storage.begin()
        made = self.storage.create(entries, size, position, np.arange(len(sizes)) * groups // len(sizes)).tolist()
        for address, end, count in zip(made, np.cumsum(size).tolist(), sizes, strict=True):
            assert address not in self.held
            self.held[address] = entries[end - count : end], position[end - count : end]
        return made

    def append(self, addresses: list[int]) -> None:
        for part in self.storage.rounds(len(addresses)):
            some = addresses[part]
            size = self.sizes(some)
            slots = self.storage.fetch(np.array(some), size)
            entries, position = self.fresh(len(some))
            self.storage.append(slots, size, entries, position)
            for i, address in enumerate(some):
                old, at = self.held[address]
                self.held[address] = torch.cat([old, entries[i : i + 1]]), np.append(at, position[i])

    def append_unread(self, addresses: list[int], count: int) -> list[int]:
        """Append `count` entries to each of those that have room; which."""
        more = np.full(len(addresses), count)
        fits = self.storage.have_room(np.array(addresses, dtype=np.int64), self.sizes(addresses) + more)
        fitting = np.array(addresses, dtype=np.int64)[fits]
        reads = self.storage.flash.counters.reads
        for part in self.storage.rounds(len(fitting)):
            some = fitting[part]
            entries, position = self.fresh(len(some) * count)
            self.storage.append_unread(some, more[: len(some)], entries, position)
            for i, address in enumerate(some.tolist()):
                own, (old, at) = slice(i * count, (i + 1) * count), self.held[address]
                self.held[address] = torch.cat([old, entries[own]]), np.append(at, position[own])
        self.read = self.storage.flash.counters.reads - reads
        return fitting.tolist()

    def split(self, addresses: list[int], draw: np.random.Generator) -> list[int]:
        made = []
        for part in self.storage.rounds(len(addresses)):
            some = addresses[part]
            size = self.sizes(some)
            slots = self.storage.fetch(np.array(some), size)
            second = np.stack([draw.permutation(LARGEST) < LARGEST // 2 for _ in some])
            offset = np.arange(LARGEST)
            second = np.where(offset == 0, False, np.where(offset == 1, True, second))
            order = keep_order(second, size)
            into = (second & (offset < size[:, None])).sum(1)
            sizes = np.stack([size - into, into], axis=1)
            addresses_made = self.storage.split(slots, order, sizes).tolist()
            for address, other, by, (stay, leave) in zip(some, addresses_made, order, sizes.tolist(), strict=True):
                entries, position = self.held[address]
                self.held[address] = entries[by[:stay]], position[by[:stay]]
                self.held[other] = entries[by[stay : stay + leave]], position[by[stay : stay + leave]]
            made += addresses_made
        return made

    def free(self, addresses: list[int]) -> None:
        self.storage.free(np.array(addresses, dtype=np.int64))
        for address in addresses:
            del self.held[address]

    def check(self, addresses: list[int]) -> None:
        (entries,), (position,) = self.storage.gather(np.array(addresses, dtype=np.int64), self.sizes(addresses))
        wanted = [self.held[address] for address in addresses]
        if addresses:
            expected = torch.cat([part for part, _ in wanted])
            assert torch.equal(entries.view(torch.uint8), expected.view(torch.uint8))
            assert position.tolist() == np.concatenate([at for _, at in wanted]).tolist()

    def check_some(self, addresses: list[int], draw: np.random.Generator) -> None:
        """Some entries of clusters."""
        sizes = self.sizes(addresses)
        wanted = draw.random((len(addresses), LARGEST)) < 0.3
        wanted &= np.arange(LARGEST) < sizes[:, None]
        (entries,), (position,) = self.storage.gather(np.array(addresses, dtype=np.int64), sizes, wanted)
        held = [self.held[address] for address in addresses]
        if addresses:
            expected = torch.cat([part[mask[: len(at)]] for (part, at), mask in zip(held, wanted, strict=True)])
            assert torch.equal(entries.view(torch.uint8), expected.view(torch.uint8))
            assert position.tolist() == [p for (_, at), m in zip(held, wanted, strict=True) for p in at[m[: len(at)]]]


class Everything(RuleBasedStateMachine):
    """Any sequence of what layers do, with DRAM for a few clusters."""

    @initialize(form=st.sampled_from(FORMS), room=st.integers(0, 12), seed=st.integers(0, 99))
    def start(self, form, room, seed):
        width, dtype = form
        entry = width * dtype.itemsize + 10
        # What the error of a too small budget asks for, and room for some more.
        self.record = Recorded(width, dtype, 4 * (4096 * (3 + 10 * entry // 4096)) + (2 + room) * LARGEST * entry, seed)
        self.draw = np.random.default_rng(seed)

    def some(self, count: int, at_least: int = 1, at_most: int = LARGEST) -> list[int]:
        fitting = [a for a, (entries, _) in self.record.held.items() if at_least <= len(entries) <= at_most]
        return [int(a) for a in self.draw.permutation(fitting)[:count]]

    @rule(sizes=st.lists(st.integers(1, LARGEST), min_size=1, max_size=30), groups=st.integers(1, 3))
    def create(self, sizes, groups):
        self.record.create(sizes, groups)

    @precondition(lambda self: self.record.held)
    @rule(count=st.integers(1, 12))
    def append(self, count):
        self.record.append(self.some(count, at_most=LARGEST - 1))

    @precondition(lambda self: self.record.held)
    @rule(count=st.integers(1, 12), each=st.integers(1, 2))
    def append_unread(self, count, each):
        self.record.append_unread(self.some(count), each)

    @precondition(lambda self: self.record.held)
    @rule(count=st.integers(1, 6))
    def split(self, count):
        self.record.split(self.some(count, at_least=2), self.draw)

    @precondition(lambda self: self.record.held)
    @rule(count=st.integers(1, 10))
    def free(self, count):
        self.record.free(self.some(count))

    @rule(count=st.integers(1, 40))
    def read(self, count):
        self.record.check(self.some(count))

    @rule(count=st.integers(1, 40))
    def read_some(self, count):
        self.record.check_some(self.some(count), self.draw)

    @rule(count=st.integers(1, 40))
    def read_ahead(self, count):
        some = self.some(count)
        self.record.storage.prefetch(np.array(some, dtype=np.int64), self.record.sizes(some))

    @rule(layer=st.integers(0, 2), count=st.integers(1, 40))
    def a_layer_takes_its_step(self, layer, count):
        some = self.some(count)
        wanted = self.draw.random((len(some), LARGEST)) < 0.5
        self.record.storage.expect_next(layer, np.array(some, dtype=np.int64), wanted)

    @rule(others=st.integers(0, 100_000))
    def others_take_dram(self, others):
        self.record.storage.spend("others", others)

    @invariant()
    def nothing_is_counted_twice(self):
        if hasattr(self, "record"):
            assert self.record.storage.pools.used == len(self.record.held)
            assert self.record.storage.table.used <= self.record.storage.table.capacity
            assert self.record.storage.pools.entries == sum(len(entries) for entries, _ in self.record.held.values())

    def teardown(self):
        if hasattr(self, "record"):
            self.record.check(list(self.record.held))
            self.record.storage.close()


TestEverything = Everything.TestCase
TestEverything.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.fixture
def recorded() -> Iterator[Callable[..., Recorded]]:
    """Makes storages with a record and closes them, also when a test fails."""
    made: list[Recorded] = []

    def make(*args: Any, **kwargs: Any) -> Recorded:
        made.append(Recorded(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.storage.close()


def test_a_budget_shared_with_others_gives_memory_back(recorded):
    record = recorded(128, torch.float32, 4 << 20)
    addresses = record.create([4] * 3000)
    before, capacity = record.storage.arena_bytes, record.storage.table.capacity
    record.storage.spend("index of a layer", 2 << 20)
    record.check(addresses[:10])
    assert record.storage.arena_bytes + (2 << 20) <= 4 << 20 <= before + (2 << 20)
    record.check(addresses)
    record.storage.spend("index of a layer", 0)
    record.check(addresses)
    assert record.storage.table.capacity > 0.9 * capacity
    assert record.storage.arena_bytes + record.storage.table_bytes <= 4 << 20


@pytest.mark.parametrize("mebibytes", [64, 192])
def test_memory_stays_in_the_budget_however_much_is_held(mebibytes, tmp_path):
    grown = subprocess.run([sys.executable, "-c", HOLD, str(mebibytes), tmp_path], check=True, capture_output=True)
    assert int(grown.stdout) <= 1.05 * (32 << 20)


HOLD = """
import sys
from pathlib import Path
import numpy as np, torch
from kvsched import DynaKVConfig
from kvsched.dynakv.storage import ClusterStorage

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def hold(storage, mebibytes):
    storage.open(128, torch.float16)
    sizes, entries = np.full(256, 4), torch.ones(1024, 128, dtype=torch.float16)
    for step in range(mebibytes * 4):
        storage.begin(step)
        made = storage.create(entries, sizes, np.arange(1024), np.full(256, step % 16))
        storage.prefetch(made[::4] // 2, sizes[::4])
        assert bool((storage.gather(made[::4] // 2, sizes[::4])[0] == 1).all())

small = ClusterStorage(DynaKVConfig(directory=sys.argv[2], dram="2MiB"))
hold(small, 4)
small.close()
before = resident()
storage = ClusterStorage(DynaKVConfig(directory=sys.argv[2], dram="32MiB"))
hold(storage, int(sys.argv[1]))
print(resident() - before)
storage.close()
"""


def test_a_step_that_needs_more_than_dram_comes_in_parts(recorded):
    record = recorded(128, torch.float32, 1 << 20)
    addresses = record.create([LARGEST] * 600)
    assert record.storage.table.capacity < 600 * LARGEST
    record.check(addresses)
    with pytest.raises(ConfigError, match="Set dram higher, or lower budget"):
        record.storage.begin()
        record.storage.fetch(np.array(addresses), record.sizes(addresses))


def test_neighbours_come_in_one_read_and_its_bytes_are_told(recorded):
    record = recorded(126, torch.float32, 2 << 20)
    record.create([4] * 2000)
    told = []
    record.storage.transfers.on_read = lambda nbytes, brought: told.append((nbytes, brought.tolist()))
    wanted = record.away(12)
    record.check(wanted)
    assert [sorted(brought) for _, brought in told] == [sorted(wanted)]
    bytes_wanted = record.sizes(wanted).sum() * 508
    assert bytes_wanted <= told[0][0] <= bytes_wanted + 2 * record.storage.flash.alignment


def test_appends_and_splits_write_little_again(recorded):
    record = recorded(128, torch.float32, 256 << 10)
    addresses = record.create([2] * 400)
    record.check(addresses)
    assert record.storage.transfers.bytes_moved == 0
    for _ in range(5):
        record.append(addresses[:100])
    record.check(addresses)
    moved = record.storage.transfers.bytes_moved // 516
    assert 200 <= moved <= 100 * (2 + 4)  # out of the pool that was full, and once more when it doubled


def test_of_a_cluster_only_what_is_wanted_stays_and_the_rest_is_read_when_it_is(recorded):
    record = recorded(126, torch.float32, 2 << 20)
    record.create([8] * 1000)
    wanted, counters = record.away(4), record.storage.flash.counters
    mask = np.tile(np.arange(8) < 3, (4, 1))
    record.storage.gather(np.array(wanted), record.sizes(wanted), mask)
    slots = record.storage.table.slot_of(np.array(wanted))
    assert record.storage.table.size(slots).tolist() == [3] * 4 and counters.reads > 0
    assert np.array_equal(record.storage.holds(np.array(wanted))[:, :8], mask)
    assert not record.storage.resident(np.array(wanted)).any()
    reads = counters.reads
    record.storage.gather(np.array(wanted), record.sizes(wanted), mask)
    assert counters.reads == reads
    record.check(wanted)
    assert counters.reads > reads and record.storage.resident(np.array(wanted)).all()


def test_clusters_on_flash_grow_without_being_read(recorded):
    record = recorded(126, torch.float32, 2 << 20)
    addresses = record.create([2] * 4000)
    record.append(addresses[:100])  # out of pools without room, into such with room for twice as much
    record.check(addresses[2000:])
    assert not record.storage.resident(np.array(addresses[:100])).any()
    assert record.append_unread(addresses[200:210], 1) == [], "a prompt's clusters lie without gaps"
    grown = record.append_unread(addresses[:100], 2)
    assert len(grown) >= 50 and record.read == 0 and not record.storage.resident(np.array(grown)).any()
    record.check(addresses[2000:])
    record.check(addresses[:100])


def test_what_is_read_ahead_is_not_read_again(recorded):
    record = recorded(128, torch.float32, 2 << 20)
    record.create([4] * 2000)
    wanted = record.away(15)
    record.storage.prefetch(np.array(wanted), record.sizes(wanted))
    told = []
    record.storage.transfers.on_read = lambda nbytes, brought: told.append(brought)
    record.check(wanted[:5])
    record.free(wanted[5:10])
    again = record.create([4] * 5)  # they take the addresses that were freed
    record.check(again)
    record.check(wanted[10:])
    assert told == []
    counters = record.storage.transfers.asked.counters
    assert (counters.clusters, counters.used) == (15, 10)
    assert counters.waited >= 0 and counters.seconds > 0


def test_what_the_next_layer_wanted_is_read_while_this_one_computes(recorded):
    record = recorded(128, torch.float32, 2 << 20)
    record.create([4] * 2000)
    layers = [record.away(10), record.away(30)[20:]]
    every = np.ones((10, 4), dtype=bool)
    for layer in (0, 1, 0):  # the order is known once the first layer has come again
        assert record.storage.transfers.expected.counters.clusters == 0
        record.storage.expect_next(layer, np.array(layers[layer]), every)
    assert record.storage.transfers.expected.counters.clusters == 10
    told = []
    record.storage.transfers.on_read = lambda nbytes, brought: told.append(brought)
    record.storage.prefetch(np.array(layers[1]), record.sizes(layers[1]))
    record.check(layers[1])
    assert told == [] and record.storage.transfers.expected.counters.used == 10
    record.check(layers[0])
    record.storage.expect_next(1, np.array(layers[1]), every)
    assert record.storage.transfers.expected.counters.clusters == 10, "DRAM has them"


def test_what_changed_on_flash_since_it_was_read_ahead_is_read_again(recorded):
    """Entries that only DRAM has are written when they leave it; what was read before that lacks them."""
    record = recorded(126, torch.float32, 2 << 20)
    addresses = record.create([2] * 4000)
    record.append(addresses[:100])  # now they have room
    record.check(addresses[2000:])
    grown = record.append_unread(addresses[:100], 2)[:8]
    every = np.ones((len(grown), LARGEST), dtype=bool)
    for layer in (0, 1, 0):
        record.storage.expect_next(layer, np.array(grown), every)
    assert record.storage.transfers.expected.counters.clusters == len(grown)
    record.check(addresses[2000:])  # which drives the new entries out
    assert not record.storage.holds(np.array(grown)).any()
    record.check(grown)


def test_layers_of_different_forms_and_budgets_too_small(recorded):
    record = recorded(8, torch.float32, 1 << 20)
    record.storage.open(8, torch.float32)
    with pytest.raises(UnsupportedModelError, match=r"8 numbers of torch.float32 in one and 8 of torch.float16"):
        record.storage.open(8, torch.float16)
    with pytest.raises(ConfigError, match=r"dram=1000 bytes is less than two clusters .* Set it to \d+ bytes or more"):
        recorded(8, torch.float32, 1000)


def saved_and_loaded(record: Recorded, folder: Path, **options: Any) -> ClusterStorage:
    """Save, and load into another storage that takes the place of the record's."""
    record.storage.save(folder)
    config = DynaKVConfig(cluster_size=4, max_cluster_size=LARGEST, dram=128 << 10, io_threads=2, **options)
    storage = ClusterStorage(config)
    addresses = storage.load(Saved(folder))
    record.held = {int(addresses[old]): held for old, held in record.held.items()}
    record.storage.close()
    record.storage = storage
    return storage


def test_a_save_is_taken_up_again_and_replaces_the_one_before(recorded, tmp_path):
    record = recorded(40, torch.bfloat16, 64 << 10)
    addresses = record.create([1 + i % LARGEST for i in range(500)], groups=3)
    record.free(addresses[::5])
    record.split(addresses[3::20], np.random.default_rng(0))
    files = []
    for _ in range(2):
        saved_and_loaded(record, tmp_path / "conversation")
        record.check(list(record.held))
        record.append([address for address in record.held if len(record.held[address][0]) < LARGEST][:30])
        record.check(list(record.held))
        files.append(sorted(path.name for path in (tmp_path / "conversation").iterdir()))
    assert [len(names) for names in files] == [3, 3] and files[0] != files[1]


def test_a_save_that_fails_at_any_call_leaves_the_one_before(recorded, tmp_path, monkeypatch):
    record = recorded(40, torch.float16, 64 << 10)
    record.create([3] * 100)
    record.storage.save(tmp_path)
    before = len(record.held)
    record.create([2] * 10)
    originals = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name, nth in [("fsync", 0), ("fsync", 1), ("fsync", 2), ("replace", 0)]:
        monkeypatch.setattr(os, name, Faulty(originals[name], nth, errno.ENOSPC))
        with pytest.raises(FlashError, match=r"cannot save clusters in .*No space left"):
            record.storage.save(tmp_path)
        monkeypatch.setattr(os, name, originals[name])
        config = DynaKVConfig(cluster_size=4, max_cluster_size=LARGEST, dram=64 << 10, io_threads=2)
        storage = ClusterStorage(config)
        storage.load(Saved(tmp_path))
        assert storage.pools.used == before
        storage.close()


def test_a_process_killed_while_it_saves_leaves_the_one_before(recorded, tmp_path, monkeypatch):
    record = recorded(40, torch.float16, 64 << 10)
    record.create([3] * 100)
    record.storage.save(tmp_path)
    for call in ("fsync", "replace"):
        if (child := os.fork()) == 0:
            setattr(os, call, lambda *args, **kwargs: os.kill(os.getpid(), 9))
            save(tmp_path, [b"half"], {}, {})
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
        saved_and_loaded(record, tmp_path)
        record.check(list(record.held))


@pytest.mark.parametrize("name", ["clusters.json", "*.bin", "*.safetensors"])
@pytest.mark.parametrize("harm", ["altered", "cut", "gone", "foreign"])
def test_what_was_harmed_is_refused(recorded, tmp_path, name, harm):
    record = recorded(40, torch.float16, 64 << 10)
    record.create([3] * 100)
    record.storage.save(tmp_path)
    (path,) = tmp_path.glob(name)
    content = path.read_bytes()
    half = len(content) // 2
    if harm == "gone":
        path.unlink()
    else:
        altered = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        path.write_bytes({"altered": altered, "cut": content[:half], "foreign": b'{"format": "other"}'}[harm])
    threads = threading.active_count()
    config = DynaKVConfig(cluster_size=4, max_cluster_size=LARGEST, dram=64 << 10, io_threads=2)
    storage = ClusterStorage(config)
    with pytest.raises(FlashError, match=rf"no clusters can be taken from {tmp_path}: .*\. Save them again"):
        storage.load(Saved(tmp_path))
    storage.close()
    assert threading.active_count() == threads


def test_versions_and_options_that_do_not_fit(recorded, tmp_path):
    record = recorded(40, torch.float16, 64 << 10)
    record.create([3] * 100)
    record.storage.save(tmp_path)
    other = ClusterStorage(DynaKVConfig(cluster_size=4, max_cluster_size=16))
    with pytest.raises(ConfigError, match=r"were made with 8\. Load them with that"):
        other.load(Saved(tmp_path))
    other.close()
    manifest = json.loads((tmp_path / "clusters.json").read_text())
    (tmp_path / "clusters.json").write_text(json.dumps({**manifest, "version": 9}))
    with pytest.raises(FlashError, match="it is of version 9, this is 3"):
        Saved(tmp_path)


class Faulty:
    """A call of `os` that fails from its `nth` time on."""

    def __init__(self, call: Callable[..., Any], nth: int, code: int) -> None:
        self.call, self.left, self.code = call, nth, code

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code))
        return self.call(*args)


def use_all(record: Recorded) -> None:
    """Everything that a layer does, in DRAM too small for it."""
    for _ in range(2):
        addresses = record.create([3] * 100)
        record.append(addresses[::7])
        record.storage.prefetch(np.array(addresses[:50]), record.sizes(addresses[:50]))
        record.check(addresses[20:80])


class FaultyKernel(Faulty):
    """`aio.call`, whose transfers fail from the `nth` on: when they are handed over, or when they end."""

    def __init__(self, name: str, nth: int, code: int) -> None:
        super().__init__(aio.call, nth, code)
        self.name = name

    def __call__(self, name: str, *arguments: int) -> int:
        if name != self.name:
            return self.call(name, *arguments)
        if name == "io_submit":
            return super().__call__(name, *arguments)
        ended = self.call(name, *arguments)
        for i in range(ended):
            self.left -= 1
            if self.left < 0:
                _, _, _, events, _ = arguments
                result = events + i * aio._EVENT.itemsize + aio._EVENT.fields["result"][1]
                ctypes.c_int64.from_address(result).value = -self.code
        return ended


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["preadv", "pwritev", "posix_fallocate", "io_submit", "io_getevents"])
def test_a_fault_at_any_call_is_an_error_then_and_ever_after(recorded, monkeypatch, call, code):
    for nth in (0, 1, 2, 5, 12, 30, 1000):
        with monkeypatch.context() as patch:
            if call in ("preadv", "pwritev"):
                patch.setattr(flash.FlashFile, "_fastest", lambda self, threads: ThreadEngine(threads))
            record = recorded(128, torch.float16, 96 << 10)
            if call.startswith("io_"):
                patch.setattr(aio, "call", FaultyKernel(call, nth, code))
            else:
                patch.setattr(os, call, Faulty(getattr(os, call), nth, code))
            try:
                use_all(record)
                break  # so few calls were needed
            except FlashError as error:
                assert os.strerror(code) in str(error)
            with pytest.raises(FlashError, match=r"lost when a transfer failed\. Make a new DynaKVCache"):
                use_all(record)
            record.storage.close()
    else:
        pytest.fail("so many calls cannot have been needed")
    assert nth > 0
