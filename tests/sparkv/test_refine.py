"""Progressive loading: coarse first, and in the end exactly what `balanced` gives, whatever is done with the cache."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Cache

import kvsched
from kvsched.sparkv import cache as sparkv_cache
from kvsched.sparkv import loader
from kvsched.sparkv.address import refinement_address
from kvsched.sparkv.manifest import Manifest, chunk_path
from kvsched.sparkv.serve import running
from kvsched.sparkv.store import Store
from kvsched_evals.link import shaped_link

CHUNK, CHUNKS = 32, 4
TOKENS = CHUNK * CHUNKS
OPTIONS = {"codec": "progressive", "chunk_tokens": CHUNK, "planner": "stream"}


@pytest.fixture(params=["qwen2", "gemma3"])
def prefix(request: pytest.FixtureRequest, tiny_model, tmp_path: Path) -> Iterator[Prefix]:
    yield Prefix(tiny_model(request.param, num_hidden_layers=4), tmp_path)


class Prefix:
    """A prefix published twice, as `balanced` and as `progressive`."""

    def __init__(self, model, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.ids = torch.randint(0, 256, (1, TOKENS + 8), generator=torch.Generator().manual_seed(1))
        for codec in ("balanced", "progressive"):
            kvsched.publish(model, self.ids[:, :TOKENS], folder, {"codec": codec, "chunk_tokens": CHUNK})
        self.balanced = self.load(codec="balanced")

    def load(self, uri: str | Path | None = None, **options: object) -> kvsched.SparKVCache:
        cache = kvsched.SparKVCache(self.model.config, store=str(uri or self.folder), **{**OPTIONS, **options})
        cache.load(self.model, self.ids)
        return cache

    def manifest(self) -> Manifest:
        found = [Manifest.parse(path.read_bytes()) for path in self.folder.glob("manifests/*/*.json")]
        (whole,) = [one for one in found if one.codec == "progressive" and len(one.chunks) == CHUNKS]
        return whole


def assert_equal(cache: Cache, expected: Cache, tokens: int = TOKENS) -> None:
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        kept = slice(None) if layer.is_sliding else slice(0, tokens)
        assert torch.equal(layer.keys[:, :, kept], other.keys[:, :, kept].expand_as(layer.keys[:, :, kept]))
        assert torch.equal(layer.values[:, :, kept], other.values[:, :, kept].expand_as(layer.values[:, :, kept]))


def test_coarse_at_first_then_what_balanced_gives(prefix: Prefix) -> None:
    with running(prefix.folder) as server, shaped_link(server, mbit=20, rtt_ms=20) as url:
        cache = prefix.load(url)
        before = cache.report()
        assert before.coarse == CHUNKS * 2 and before.fallback is None  # of four layers two are never coarse
        assert not all(
            torch.equal(layer.keys, other.keys)
            for layer, other in zip(cache.layers, prefix.balanced.layers, strict=True)
        )
        after = cache.refine()
    assert after.coarse == 0 and after.bytes_refined > 0 and after.fallback is None
    assert after.bytes_streamed == before.bytes_streamed < prefix.balanced.report().bytes_streamed
    assert_equal(cache, prefix.balanced)


def test_generate_decodes_while_it_becomes_finer(prefix: Prefix) -> None:
    with running(prefix.folder) as server:
        output = prefix.model.generate(
            prefix.ids,
            cache_implementation="sparkv",
            cache_config={**OPTIONS, "store": server},
            max_new_tokens=40,
            do_sample=False,
            num_beams=2,
            return_dict_in_generate=True,
        )
        cache = output.past_key_values
        assert cache.refine().coarse == 0
    for layer, other in zip(cache.layers, prefix.balanced.layers, strict=True):
        if not layer.is_sliding:
            assert torch.equal(layer.keys[:, :, :TOKENS], other.keys.expand(2, -1, -1, -1))


def test_what_was_cropped_and_filled_anew_is_left_alone(tiny_model, tmp_path: Path) -> None:
    prefix = Prefix(tiny_model("qwen2", num_hidden_layers=4), tmp_path)  # sliding layers cannot be cropped
    with running(prefix.folder) as server, shaped_link(server, mbit=20, rtt_ms=20) as url:
        cache = prefix.load(url)
        cache.crop(-20)
        for index, layer in enumerate(cache.layers):
            other = torch.full_like(layer.keys[:, :, :20], 7.0)
            cache.update(other, other, index)
        assert cache.refine().coarse == 0
    assert_equal(cache, prefix.balanced, TOKENS - 20)
    assert all(bool((layer.keys[:, :, TOKENS - 20 :] == 7).all()) for layer in cache.layers)


def test_what_was_computed_stays_exact(prefix: Prefix, monkeypatch: pytest.MonkeyPatch) -> None:
    # A link that is known is planned with at once, and this plan stands whatever it promises.
    monkeypatch.setitem(sparkv_cache._last_goodput, Store(str(prefix.folder)).uri, 1e6)
    monkeypatch.setitem(loader.PLANNERS, "layer_split", lambda compute, *_: np.full(len(compute), 3))
    monkeypatch.setattr(loader, "_MIN_GAIN", -1e9)
    with torch.no_grad():
        exact = prefix.model(prefix.ids[:, :TOKENS]).past_key_values
    cache = prefix.load(planner="layer_split")
    assert cache.refine().depths == (3,) * CHUNKS
    for index, (layer, computed) in enumerate(zip(cache.layers, exact.layers, strict=True)):
        kept = slice(-computed.keys.shape[2], None)
        if index < 3:
            torch.testing.assert_close(layer.keys[:, :, kept], computed.keys)
        elif not layer.is_sliding:
            assert torch.equal(layer.keys, prefix.balanced.layers[index].keys)


def test_prompts_side_by_side_are_refined_before_the_first_token(tiny_model, tmp_path: Path) -> None:
    prefix = Prefix(tiny_model("qwen2", num_hidden_layers=4), tmp_path)
    ids = torch.cat([prefix.ids, prefix.ids.flip(1)])
    cache = kvsched.SparKVCache(prefix.model.config, store=str(prefix.folder), **OPTIONS)
    report = cache.load(prefix.model, ids)
    assert report.coarse == 0 and report.bytes_refined > 0
    for layer, other in zip(cache.layers, prefix.balanced.layers, strict=True):
        assert torch.equal(layer.keys[:1], other.keys)


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing", "foreign"])
def test_damaged_refinements_leave_the_base_and_say_so(prefix: Prefix, damage: str) -> None:
    entries = prefix.manifest().refinements
    assert entries is not None
    paths = [prefix.folder / chunk_path(entry.address) for entry in entries]
    data = bytearray(paths[1].read_bytes())
    if damage == "altered":
        data[-3] ^= 1
    elif damage == "truncated":
        data = data[:-3]
    elif damage == "foreign":
        data = bytearray(paths[2].read_bytes())
    paths[1].write_bytes(data)
    if damage == "missing":
        paths[1].unlink()
    cache = prefix.load()
    report = cache.refine()
    assert report.fallback is not None and "stay coarse" in report.fallback and 0 < report.coarse <= 2 * CHUNKS
    for layer, other in zip(cache.layers, prefix.balanced.layers, strict=True):
        assert layer.keys.shape == other.keys.shape and bool(layer.keys.isfinite().all())


def test_a_link_that_dies_while_refining(prefix: Prefix) -> None:
    with running(prefix.folder) as server:
        link = shaped_link(server, mbit=20, rtt_ms=20)
        with link as url:
            cache = prefix.load(url, stall_timeout=0.5)
            link.mbit = 0
            report = cache.refine()
    assert report.coarse > 0 and report.fallback is not None and "stay coarse" in report.fallback


def test_a_cache_that_goes_away_takes_its_stream_along(prefix: Prefix) -> None:
    with running(prefix.folder) as server, shaped_link(server, mbit=0.1, rtt_ms=20) as url:
        cache = prefix.load(url)
        assert any(thread.name == "kvsched-stream" for thread in threading.enumerate())
        del cache
        gc.collect()
        assert not any(thread.name == "kvsched-stream" for thread in threading.enumerate())
        cache = prefix.load(url)
        cache.reset()
        assert not any(thread.name == "kvsched-stream" for thread in threading.enumerate())
        assert cache.get_seq_length() == 0


def test_an_unrefined_base_of_somebody_else_is_replaced(prefix: Prefix) -> None:
    """Another machine rounded differently and went away between its two objects."""
    manifest = prefix.manifest()
    assert manifest.refinements is not None
    base = prefix.folder / chunk_path(manifest.chunks[0].address)
    other = prefix.folder / chunk_path(manifest.chunks[1].address)
    foreign = base.read_bytes().replace(b'"position":0', b'"position":0 ', 1)
    head = foreign[:4] + (int.from_bytes(foreign[4:8], "little") + 1).to_bytes(4, "little") + foreign[8:]
    base.write_bytes(head)
    for path in prefix.folder.glob("manifests/*/*.json"):
        path.unlink()
    report = kvsched.publish(prefix.model, prefix.ids[:, :TOKENS], prefix.folder, OPTIONS)
    assert report.bytes_written > 0 and other.exists()
    cache = prefix.load()
    assert cache.refine().fallback is None
    assert_equal(cache, prefix.balanced)


def test_refinements_are_published_once_and_collected_with_their_chunks(prefix: Prefix) -> None:
    again = kvsched.publish(prefix.model, prefix.ids[:, :TOKENS], prefix.folder, OPTIONS)
    assert (again.chunks_written, again.bytes_written) == (0, 0)
    for path in prefix.folder.glob("manifests/*/*.json"):
        path.unlink()
    objects = {path: path.stat().st_mtime_ns for path in prefix.folder.glob("chunks/*/*.kv")}
    assert len(objects) == 3 * CHUNKS
    kvsched.publish(prefix.model, prefix.ids[:, :TOKENS], prefix.folder, OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in prefix.folder.glob("chunks/*/*.kv")} == objects


def test_the_address_of_a_refinement_depends_on_every_byte_of_its_base() -> None:
    assert refinement_address("a" * 64, "b" * 64) != refinement_address("a" * 64, "c" * 64)
