"""Tables of layers that take turns in DRAM, against a plain record, and what happens when the device fails."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvsched import DynaKVCache
from kvsched.dynakv.flash import FlashFile
from kvsched.dynakv.index_file import IndexFile
from kvsched.errors import FlashError

LAYERS = 4


class Index:
    """What an `IndexFile` asks of an index."""

    def __init__(self, tables: list[torch.Tensor]) -> None:
        self.tables, self.changed = tables, True

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.tables)

    def hand_out(self) -> tuple[list[torch.Tensor], bool]:
        tables, self.tables = self.tables, []
        return tables, self.changed

    def take_back(self, tables: list[torch.Tensor]) -> None:
        self.tables, self.changed = tables, False


def drawn(draw: torch.Generator, rows: int) -> list[torch.Tensor]:
    """Tables of the kinds that an index has; without rows there is nothing in them."""
    return [
        torch.randint(0, 256, (2, rows, 24), generator=draw, dtype=torch.uint8),
        torch.randn(2, rows, 7, generator=draw).half(),
        torch.randn(2, 3 * rows, 5, generator=draw),
    ]


@pytest.fixture
def new_file(tmp_path) -> Iterator[Callable[..., IndexFile]]:
    made = []

    def new(most: int = -1) -> IndexFile:
        made.append(IndexFile(partial(FlashFile, tmp_path, 2), most))
        return made[-1]

    yield new
    for file in made:
        file.close()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_layer_gets_back_what_it_put(new_file, data):
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    file, indexes, held = new_file(), {}, {}
    for _ in range(data.draw(st.integers(1, 6))):
        for layer in data.draw(st.permutations(range(LAYERS))) if data.draw(st.booleans()) else range(LAYERS):
            new = layer not in indexes
            index = indexes.setdefault(layer, Index([]))
            file.take(layer, index)
            for table, own in zip(index.tables, held.get(layer, []), strict=True):
                assert torch.equal(table, own) and table.dtype == own.dtype
            step = data.draw(st.sampled_from(["keep", "write", "grow", "forget"]))
            if new or step == "grow":
                rows = data.draw(st.sampled_from([0, 1, 40, 900]))
                # The rest moves around a table that stays.
                kept = index.tables[:1] if index.tables and index.tables[0].shape[1] == rows else []
                index.tables, index.changed = kept + drawn(draw, rows)[len(kept) :], True
            elif step == "write":
                index.changed = True
                for table in index.tables:
                    table.copy_(torch.randint(0, 9, table.shape, generator=draw))
            held[layer] = [table.clone() for table in index.tables]
            file.put(layer, index)
            assert index.tables == []
            if step == "forget":
                file.forget(layer)
                del held[layer], indexes[layer]


def test_indexes_stay_in_dram_while_they_have_room(new_file):
    draw = torch.Generator().manual_seed(0)
    indexes = [Index(drawn(draw, 100)) for _ in range(LAYERS)]
    file = new_file(most=indexes[0].nbytes * 3)
    for layer, index in enumerate(indexes):
        file.take(layer, index)
        file.put(layer, index)
        assert file.used == (layer == 3) == (index.tables == [])
    assert len(indexes[0].tables) == 3, "it goes when its turn comes"
    file.take(0, indexes[0])
    file.put(0, indexes[0])
    assert indexes[0].tables == []


def test_the_next_layer_is_read_while_this_one_computes(new_file):
    draw, file = torch.Generator().manual_seed(0), new_file()
    indexes = [Index(drawn(draw, 500)) for _ in range(LAYERS)]
    size = indexes[0].nbytes
    for time in range(3):
        for layer, index in enumerate(indexes):
            reads = file.counters.reads
            file.take(layer, index)
            if time == 2:
                assert file.counters.reads == reads + 1, "one for the layer after it, none for itself"
            file.put(layer, index)
    assert file.nbytes < 3 * size
    assert file.counters.writes == LAYERS, "nothing changed after the first time"


@pytest.mark.parametrize("transfer", ["pwritev", "preadv"])
def test_what_a_failed_transfer_lost_is_refused_ever_after(new_file, monkeypatch, transfer):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("kvsched.dynakv.flash.KernelEngine", lambda: (_ for _ in ()).throw(OSError()))
    draw, file = torch.Generator().manual_seed(0), new_file()
    indexes = [Index(drawn(draw, 500)) for _ in range(LAYERS)]
    for layer, index in enumerate(indexes):
        file.put(layer, index)
    file.take(LAYERS - 1, indexes[-1])
    with monkeypatch.context() as broken:
        broken.setattr(f"kvsched.dynakv.engine.os.{transfer}", fail)
        with pytest.raises(FlashError, match="Input/output error"):
            for layer, index in enumerate(indexes):
                file.take(layer, index)
                index.changed = True
                file.put(layer, index)
    for way in (file.take, file.put):
        with pytest.raises(FlashError, match=r"the index was lost .* Make a new DynaKVCache"):
            way(0, indexes[0])
    with pytest.raises(FlashError, match="the index was lost"):
        file.take(LAYERS, Index([]))  # it may have been the one that could not be put


@torch.no_grad()
def test_an_index_larger_than_its_share_of_dram_lives_on_flash(tiny_model, tmp_path):
    """Clusters of one token have an index as large as what they hold."""
    model, ids = tiny_model("qwen2", num_hidden_layers=6), torch.randint(3, 256, (1, 1100))
    options = {"directory": tmp_path, "cluster_size": 1.0, "max_cluster_size": 4, "dram": "800kB", "budget": 10_000}
    exact, cache = DynamicCache(config=model.config), DynaKVCache(model.config, options)
    for one in (exact, cache):
        model(ids[:, :1040], past_key_values=one)
        one.crop(-100)
        for token in ids[:, 940:943].split(1, dim=1):
            model(token, past_key_values=one)
    report = cache.report()
    assert report.index_bytes_read > 0
    assert report.dram_bytes < 800_000
    cache.save(tmp_path / "saved")
    cache.close()
    again = DynaKVCache.load(tmp_path / "saved", model.config, directory=tmp_path)
    answers = [model(ids[:, 943:944], past_key_values=one).logits for one in (exact, again)]
    again.close()
    torch.testing.assert_close(*answers, atol=1e-4, rtol=0)


@torch.no_grad()
def test_where_the_index_lies_changes_nothing(tiny_model, monkeypatch):
    """Two rows, one of them padded, in beams that come and go, with a budget for some tokens only."""
    model = tiny_model("qwen2", num_hidden_layers=3)
    ids = torch.randint(3, 256, (2, 400), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    options = {"budget": 32, "sinks": 4, "recent": 12, "cluster_size": 4, "max_cluster_size": 8, "dram": "64MiB"}
    answers = []
    for share in (0.5, 0.0):
        monkeypatch.setattr("kvsched.dynakv.storage.INDEX_SHARE", share)
        for way in ({}, {"num_beams": 3}):
            answers.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=40,
                    cache_implementation="dynakv",
                    cache_config=options,
                    return_dict_in_generate=True,
                    **way,
                )
            )
    for here, there in zip(answers[:2], answers[2:], strict=True):
        assert torch.equal(here.sequences, there.sequences)
        assert here.past_key_values.report().index_bytes_read == 0 < there.past_key_values.report().index_bytes_read
