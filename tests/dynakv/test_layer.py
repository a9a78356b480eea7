"""One layer against a plain record of what it was given: every token in exactly one place, back bit for bit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvsched import DynaKVConfig
from kvsched.dynakv.dense import WAITING
from kvsched.dynakv.layer import DynaKVLayer
from kvsched.dynakv.padding import real_tokens
from kvsched.dynakv.storage import ClusterStorage
from kvsched.errors import ConfigError, InputError, UnsupportedModelError

HEADS, DIM = 2, 8
SLOT = 4096
OPTIONS = {"sinks": 4, "recent": 8, "cluster_size": 2.5, "max_cluster_size": 6, "budget": 24, "io_threads": 2}


class Recorded:
    """A layer, and beside it what it was given: entries `[rows, HEADS, n, 2 * DIM]`, which are real `[rows, n]`."""

    def __init__(self, storage: ClusterStorage, options: DynaKVConfig, rows: int, seed: int) -> None:
        self.layer = DynaKVLayer(options, storage, number=seed)  # each layer of a test has a seed of its own
        self.draw = torch.Generator().manual_seed(seed)
        self.entries = torch.zeros(rows, HEADS, 0, 2 * DIM)
        self.real = torch.zeros(rows, 0, dtype=torch.bool)

    def feed(self, new: int, padding: list[int] | None = None) -> torch.Tensor:
        """Give `new` tokens, the first `padding[row]` of them padding, and ask for attention."""
        rows = len(self.real)
        fresh = torch.randn(rows, HEADS, new, 2 * DIM, generator=self.draw)
        # Keys drift, as in a long decode: later ones lie elsewhere.
        fresh[..., :DIM] += self.entries.shape[2] * 0.05
        real = torch.ones(rows, new, dtype=torch.bool)
        for row, count in enumerate(padding or []):
            real[row, : min(count, new - 1)] = False
        self.entries, self.real = torch.cat([self.entries, fresh], 2), torch.cat([self.real, real], 1)
        key, value = self.layer.update(fresh[..., :DIM], fresh[..., DIM:])
        query = torch.randn(rows, 2 * HEADS, new, DIM, generator=self.draw)
        seen = self.entries.shape[2]
        causal = torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
        mask = (causal & self.real[:, None, :]).unsqueeze(1)
        first = []
        output, _ = self.layer.attention(
            lambda *args, **kwargs: (first.append(args[2:4]), None), None, query, key, value, mask
        )
        if first:
            assert torch.equal(torch.cat(first[0], -1), self.entries)
        elif new > 1 or self.layer.config.tokens_for(seen) >= seen:
            self.expect_exact(query, mask, output)
        return output

    def expect_exact(self, query: torch.Tensor, mask: torch.Tensor, output: torch.Tensor) -> None:
        keys, values = self.entries.double().repeat_interleave(2, dim=1).split(DIM, dim=-1)
        score = (query.double() @ keys.mT * DIM**-0.5).masked_fill(~mask, float("-inf"))
        expected = (score.softmax(-1).nan_to_num() @ values).transpose(1, 2)
        real = self.real[:, -query.shape[2] :]
        torch.testing.assert_close(output[real].double(), expected[real], atol=1e-5, rtol=0)

    def real_entries(self) -> torch.Tensor:
        return self.real.unsqueeze(1).expand(-1, HEADS, -1)

    def select(self, rows: torch.Tensor) -> None:
        self.entries, self.real = self.entries[rows], self.real[rows]

    def read_back(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens that the layer holds: entries as `self.entries`, and which are present, `[rows, HEADS, n]`."""
        dense, clusters = self.layer.dense, self.layer.clusters
        entries = torch.zeros_like(self.entries).flatten(0, 1)
        present = torch.zeros(entries.shape[:2], dtype=torch.bool)
        for held, position in (
            (dense.entries[:, dense.used], dense.position[:, dense.used]),
            clusters.gather(*clusters.index.clusters()),
        ):
            stream, column = (position >= 0).nonzero(as_tuple=True)
            entries[stream, position[stream, column]] = held[stream, column]
            present[stream, position[stream, column]] = True
        return entries.view_as(self.entries), present.view(len(self.real), HEADS, -1)

    def check(self) -> list[int]:
        """Compare everything; returns the addresses of the layer's clusters."""
        layer = self.layer
        assert layer.get_seq_length() == self.entries.shape[2]
        if not layer.is_initialized:
            return []
        dense = layer.dense.position[:, layer.dense.used]
        stream, cluster = layer.clusters.index.clusters()
        places: list[list[int]] = [row[row >= 0].tolist() for row in dense]
        for s, c in zip(stream.tolist(), cluster.tolist(), strict=True):
            size = int(layer.clusters.index.size[s, c])
            assert 1 <= size <= layer.config.max_cluster_size
        _, position = layer.clusters.gather(stream, cluster)
        for held, row in zip(places, position.tolist(), strict=True):
            held += [at for at in row if at >= 0]
        sinks, window = layer.config.sinks, dense.shape[1] - layer.dense.recent
        for s, held in enumerate(places):
            real = self.real[s // HEADS].nonzero().flatten().tolist()
            assert sorted(held) == real
            left_window = len(real) - int((dense[s, window:] >= 0).sum())
            assert [at for at in dense[s, :sinks].tolist() if at >= 0] == real[: min(sinks, left_window)]
        assert ((dense[:, layer.dense.waiting] >= 0).sum(1) <= WAITING).all()

        entries, present = self.read_back()
        assert torch.equal(present, self.real_entries())
        assert torch.equal(entries[present], self.entries[present])
        if layer.policy.intake == "split":
            for s, c in zip(stream.tolist(), cluster.tolist(), strict=True):
                _, position = layer.clusters.gather(torch.tensor([s]), torch.tensor([c]))
                own = self.entries[s // HEADS, s % HEADS, position[s], :DIM].double()
                deviation = (own - own.mean(0)).square().sum()
                # From a mean that stays while tokens join a cluster on flash: never too small, but for rounding.
                assert layer.clusters.index.deviation[s, c] >= deviation * (1 - 4e-2) - 1e-3
        return layer.clusters.index.address[stream, cluster].tolist()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
@pytest.mark.parametrize("policy", ["dynakv", "static", "local", "quest", "token-topk"])
def test_every_token_in_one_place_and_back_bit_for_bit(policy, data):
    options = DynaKVConfig(dram=150 * SLOT, policy=policy, **OPTIONS)
    storage = ClusterStorage(options)
    try:
        rows = data.draw(st.integers(1, 2))
        layers = [Recorded(storage, options, rows, seed) for seed in (1, 2)]
        padding = data.draw(st.lists(st.integers(0, 120), min_size=rows, max_size=rows))
        prompt = data.draw(st.integers(1, 160))
        for each in layers:
            each.feed(prompt, padding)
        steps = ["decode", "decode", "many", "crop", "deep crop", "reorder", "repeat", "select", "reset"]
        for step in data.draw(st.lists(st.sampled_from(steps), min_size=1, max_size=8)):
            amount = data.draw(st.integers(1, 40))
            rows, seen = len(layers[0].real), layers[0].layer.get_seq_length()
            order = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)))
            for each in layers:
                if step == "decode" and seen:
                    for _ in range(amount):
                        each.feed(1)
                elif step == "many" or (step == "decode" and not seen):
                    each.feed(amount, padding[: len(each.real)])
                elif step in ("crop", "deep crop") and seen:
                    count = min(seen, amount // 10 + 1 if step == "crop" else 2 * amount)
                    each.layer.crop(-count)
                    each.entries, each.real = each.entries[:, :, : seen - count], each.real[:, : seen - count]
                elif step == "reorder" and seen:
                    each.layer.reorder_cache(order)
                    each.select(order)
                elif step == "repeat" and seen and rows == 1:
                    each.layer.batch_repeat_interleave(2)
                    each.select(torch.tensor([0, 0]))
                elif step == "select" and seen and rows == 2:
                    each.layer.batch_select_indices(order[:1])
                    each.select(order[:1])
                elif step == "reset":
                    each.layer.reset()
                    each.entries, each.real = each.entries[:, :, :0], each.real[:, :0]
            addresses = [address for each in layers for address in each.check()]
            assert len(set(addresses)) == storage.pools.used
        for each in layers:
            each.layer.reset()
        assert storage.pools.used == storage.table.used == 0, "a cluster has more owners than streams that hold it"
    finally:
        storage.close()


@pytest.fixture
def new_storage() -> Iterator[Callable[[DynaKVConfig], ClusterStorage]]:
    """Makes storages and closes them, also when a test fails."""
    made = []

    def make(options: DynaKVConfig) -> ClusterStorage:
        made.append(ClusterStorage(options))
        return made[-1]

    yield make
    for storage in made:
        storage.close()


def decoded(
    new_storage: Callable[[DynaKVConfig], ClusterStorage], options: DynaKVConfig, steps: int = 400
) -> tuple[Recorded, Recorded, ClusterStorage]:
    """Two layers that share a storage, after a prompt of 100 tokens and `steps` more."""
    storage = new_storage(options)
    layers = Recorded(storage, options, 1, 1), Recorded(storage, options, 1, 2)
    for each in layers:
        each.feed(100)
    for _ in range(steps):
        for each in layers:
            each.feed(1)
    return *layers, storage


def test_a_long_decode_splits_evicts_waits_and_loses_nothing(new_storage):
    first, second, storage = decoded(new_storage, DynaKVConfig(dram=16 * SLOT, **OPTIONS))
    assert first.layer.clusters.splits.sum() > 20
    assert (first.layer.dense.position[:, first.layer.dense.waiting] >= 0).any()
    assert storage.flash.counters.bytes_written > 0
    assert storage.flash.counters.reads > 100
    first.check()
    second.check()


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8", "fp8"])
def test_narrower_storage_rounds_once(new_storage, storage):
    layer, _, _ = decoded(new_storage, DynaKVConfig(dram=12 * SLOT, storage=storage, **OPTIONS), steps=60)
    got, packing = layer.read_back()[0], layer.layer.clusters.packing
    where = torch.arange(layer.entries.shape[2]).expand(HEADS, -1), torch.arange(HEADS).unsqueeze(1)
    rounded = packing.unpack(packing.pack(layer.entries[0], *where), *where).unsqueeze(0)
    same, exact = (got == rounded).all(-1), (got == layer.entries).all(-1)
    assert (same | exact).all()
    assert same.sum() > same.numel() // 2 and exact.any() and not exact.all()


def test_a_budget_of_dram_that_is_too_small_says_what_would_do(new_storage):
    with pytest.raises(ConfigError, match=r"dram=5000 bytes .* Set it to \d+ bytes or more") as caught:
        decoded(new_storage, DynaKVConfig(dram=5000, **OPTIONS), steps=0)
    enough = int(re.search(r"Set it to (\d+)", str(caught.value))[1])
    first, _, _ = decoded(new_storage, DynaKVConfig(dram=enough, **OPTIONS), steps=0)
    first.check()


def test_the_fullest_cluster_is_loaded_when_too_many_wait(new_storage):
    # Without a budget nothing is retrieved, so only this brings clusters into so small an arena.
    first, _, storage = decoded(new_storage, DynaKVConfig(dram=16 * SLOT, **{**OPTIONS, "budget": 0}), steps=250)
    assert storage.flash.counters.reads > 0
    first.check()


def test_a_step_reads_only_what_gains_enough(new_storage, monkeypatch):
    first, _, _ = decoded(new_storage, DynaKVConfig(dram=26 * SLOT, **OPTIONS), steps=40)
    clusters, policy, asked = first.layer.clusters, first.layer.policy, []
    read_ahead = clusters.read_ahead
    monkeypatch.setattr(clusters, "read_ahead", lambda *those: (asked.append(those), read_ahead(*those)))
    policy.patience = 1.0  # all of the attention
    for _ in range(10):
        first.feed(1)
    assert not asked
    policy.patience = 0.0
    for _ in range(10):
        first.feed(1)
    assert len(asked) > 5
    first.check()


def test_a_budget_for_all_tokens_reads_them_however_little_they_gain(new_storage):
    options = DynaKVConfig(dram=16 * SLOT, **{**OPTIONS, "budget": 1000})
    record = Recorded(storage := new_storage(options), options, 1, 1)
    record.feed(500)
    record.layer.policy.patience = 1.0
    for _ in range(20):
        record.feed(1)  # which compares with attention over all
    assert storage.flash.counters.reads > 0


def test_slots_are_numbered_anew_when_few_are_left(new_storage):
    options = DynaKVConfig(dram=64 * SLOT, **OPTIONS)
    record = Recorded(storage := new_storage(options), options, 1, 1)
    record.feed(600)
    rows = storage.arena.nbytes
    storage.spend("others", storage._dram - storage.arena_bytes // 2)
    for _ in range(3):
        record.feed(1)
    assert storage.arena.nbytes < rows / 2
    record.check()


def test_copies_of_a_row_share_clusters_until_they_change_and_go_their_own_ways(new_storage):
    first, _, storage = decoded(new_storage, DynaKVConfig(dram=16 * SLOT, **OPTIONS), steps=20)
    held, counters = storage.pools.used, dataclasses.replace(storage.flash.counters)
    first.layer.batch_repeat_interleave(3)
    first.select(torch.tensor([0, 0, 0]))
    assert storage.pools.used == held and storage.flash.counters == counters, "copies cost nothing"
    assert len(set(first.check())) == len(first.check()) / 3
    for _ in range(60):
        first.feed(1)
    assert len(first.check()) / 3 < len(set(first.check())) < len(first.check())
    first.layer.reorder_cache(torch.tensor([2, 0, 2]))
    first.select(torch.tensor([2, 0, 2]))
    for _ in range(60):
        first.feed(1)
    first.check()
    used = storage.pools.used
    first.layer.reset()
    assert storage.pools.used < used / 2


def test_cropping_inside_the_recent_window_reads_nothing(new_storage):
    layer, _, storage = decoded(new_storage, DynaKVConfig(dram=16 * SLOT, **OPTIONS), steps=20)
    admitted = storage.table.hits + storage.table.misses
    layer.layer.crop(-5)
    assert storage.table.hits + storage.table.misses == admitted
    assert layer.layer.get_seq_length() == 115


def test_attention_that_passes_the_layer_by_is_noticed(new_storage):
    storage = new_storage(DynaKVConfig(**OPTIONS))
    layer = DynaKVLayer(DynaKVConfig(**OPTIONS), storage)
    states = torch.randn(1, HEADS, 30, DIM)
    layer.update(states, states)
    with pytest.raises(UnsupportedModelError, match=r"kvsched.enable\(\)"):
        layer.update(states[:, :, :1], states[:, :, :1])


def test_tokens_reach_clusters_that_only_this_step_has_in_dram(new_storage):
    first, _, _ = decoded(new_storage, DynaKVConfig(dram=16 * SLOT, **OPTIONS), steps=60)
    waiting = (first.layer.dense.position[:, first.layer.dense.waiting] >= 0).sum()
    left_window_since_prompt = HEADS * (60 // 16) * 16
    assert waiting < left_window_since_prompt
    assert first.layer.clusters.splits.sum() > 0


def test_keys_shared_by_two_layers_are_taken_in_once(new_storage):
    options = DynaKVConfig(dram=16 * SLOT, **{**OPTIONS, "budget": 1000})
    storage = new_storage(options)
    record = Recorded(storage, options, 1, 1)
    record.feed(60)
    for step in range(30):
        states = torch.randn(1, HEADS, 1, 2 * DIM)
        key, value = record.layer.update(states[..., :DIM], states[..., DIM:])
        query = torch.randn(1, 2 * HEADS, 1, DIM)
        answers = [record.layer.attention(None, None, query, key, value, None)[0] for _ in range(2)]
        torch.testing.assert_close(*answers)  # the first may have brought tokens that waited into clusters
        assert record.layer.get_seq_length() == 61 + step


def test_reading_padding_off_a_mask():
    left = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    sdpa = (causal & left.bool()[:, None, :])[:, None]
    eager = torch.where(sdpa, 0.0, torch.finfo(torch.float32).min)
    for mask in (left, sdpa, eager, torch.where(sdpa, 0.0, float("-inf"))):
        assert torch.equal(real_tokens(mask, 2, 5), left.bool())
        assert torch.equal(real_tokens(mask, 2, 4), left[:, 1:].bool())
    assert real_tokens(sdpa[1:], 3, 5).shape == (3, 5)
    assert real_tokens(sdpa[:, :, :2, :2], 2, 2).tolist() == [[False, False], [True, True]]
    right = (causal & left.flip(1).bool()[:, None, :])[:, None]
    for mask in (left.flip(1), right):
        with pytest.raises(InputError, match="padding_side"):
            real_tokens(mask, 2, 5)
    with pytest.raises(UnsupportedModelError, match="sdpa"):
        real_tokens(object(), 2, 5)
