"""Both paths together: whatever the plan does and whatever breaks, the keys and values are those of one prefill."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvsched.config import SparKVConfig
from kvsched.sparkv import address, loader, stream
from kvsched.sparkv.address import chain, fingerprint
from kvsched.sparkv.cost import Slowdown
from kvsched.sparkv.energy import PowerProfile
from kvsched.sparkv.loader import Loader, LoadResult
from kvsched.sparkv.manifest import chunk_path, find
from kvsched.sparkv.publish import publish
from kvsched.sparkv.serve import running
from kvsched.sparkv.store import Store
from kvsched_evals.link import shaped_link

CHUNK, CHUNKS = 32, 8
TOKENS = CHUNK * CHUNKS


@pytest.fixture(params=["qwen2", "gemma3"])
def prefix(request: pytest.FixtureRequest, tiny_model, tmp_path: Path) -> Iterator[Prefix]:
    yield Prefix(tiny_model(request.param), tmp_path)


class Prefix:
    """A published prefix of a tiny model, and what its keys and values have to be."""

    def __init__(self, model, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
        publish(model, self.ids, store=folder, config={"codec": "lossless", "chunk_tokens": CHUNK})
        self.addresses = chain(fingerprint(model), "lossless", CHUNK, self.ids[0])
        self.expected = DynamicCache()
        with torch.no_grad():
            model(self.ids, past_key_values=self.expected)

    def loader(self, uri: str | Path | None = None, goodput: float | None = None, **options: object) -> Loader:
        store = Store(uri or self.folder)
        config = SparKVConfig(codec="lossless", chunk_tokens=CHUNK, **options)  # type: ignore[arg-type]
        manifest = store.wait(find(store, address.Prefix.of(self.model, config, self.ids[0])))
        assert manifest is not None
        return Loader(self.model, self.ids, manifest, store, config, goodput)

    def load(self, uri: str | Path | None = None, **options: object) -> LoadResult:
        return self.run(self.loader(uri, **options))

    def run(self, one: Loader, layers: list[int] | None = None) -> LoadResult:
        with one.streaming():
            one.compute()
            for layer in layers or range(one.grid.layers):
                one.complete(layer)
        result = one.result()
        for loaded, layer in zip(result.cache.layers, self.expected.layers, strict=True):
            torch.testing.assert_close(loaded.keys, layer.keys, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(loaded.values, layer.values, atol=1e-5, rtol=1e-5)
        return result

    def chunk_file(self, chunk: int) -> Path:
        return self.folder / chunk_path(self.addresses[chunk])


def test_everything_streamed(prefix: Prefix) -> None:
    result = prefix.load(planner="stream")
    assert set(result.depths) == {0} and result.fallback is None
    assert [arrival.seconds for arrival in result.timeline] == sorted(arrival.seconds for arrival in result.timeline)
    places = {(arrival.chunk, arrival.layer) for arrival in result.timeline if arrival.route == "streamed"}
    assert places == {(chunk, layer) for chunk in range(CHUNKS) for layer in range(len(result.cache.layers))}
    assert result.bytes_streamed == sum(prefix.chunk_file(chunk).stat().st_size for chunk in range(CHUNKS))


def test_a_load_tells_how_slow_the_device_is_and_the_next_begins_with_it(prefix: Prefix) -> None:
    config = SparKVConfig(codec="lossless", chunk_tokens=CHUNK, planner="stream")
    first = prefix.loader(planner="stream")
    begun = Loader(prefix.model, prefix.ids, first.manifest, first.store, config, slowdown=Slowdown(3.0, 1.5))
    assert first.compute_rate.factor == 1 and begun.compute_rate.factor == 3
    assert prefix.run(begun).slowdown == (3.0, 1.5), "nothing was computed, and nothing passed"


def test_a_pass_is_timed_between_the_layers_it_asks_for(prefix: Prefix) -> None:
    one = prefix.loader()
    one.query_seconds = 1.0 * one.grid.layers
    one._turns = [(0.0, 5.0), (7.0, 7.0), (11.0, 20.0)]
    assert one.result().slowdown.passing == (1.0 + 3.0) / 2


def test_requests_ask_for_enough_layers_to_keep_a_distant_link_busy(prefix: Prefix) -> None:
    streamer = prefix.loader(goodput=1e3).streamer
    assert streamer.fewest_layers() == 1
    streamer = prefix.loader(goodput=1e9).streamer
    streamer.rate.answered(0.25)
    payloads = [size for chunk in streamer.manifest.chunks for size in chunk.payload_bytes]
    _, most = stream._REQUESTS
    assert streamer.fewest_layers() * most * sum(payloads) / len(payloads) >= 0.25 * 1e9


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_plans_gives_the_same_keys(prefix: Prefix, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Plans are redrawn at every layer boundary, so depths change under both running paths."""
    rng = np.random.default_rng(seed)

    def anything(compute: np.ndarray, stream: np.ndarray, *_: object) -> np.ndarray:
        depths = np.sort(rng.integers(0, compute.shape[1], len(compute)))[::-1]
        allowed = np.isfinite(compute)
        highest = allowed.shape[1] - 1 - allowed[:, ::-1].argmax(axis=1)
        return np.maximum(np.minimum(np.minimum.accumulate(highest), depths), allowed.argmax(axis=1))

    monkeypatch.setitem(loader.PLANNERS, "optimal", anything)
    monkeypatch.setattr(loader, "_REPLAN_SECONDS", 0.0)
    monkeypatch.setattr(loader, "_MIN_GAIN", -1e9)
    one = prefix.loader(goodput=1e6)  # an unknown link would have brought everything before the first plan
    one.query_seconds = float(rng.choice([0, 1]))
    prefix.run(one, layers=rng.permutation(one.grid.layers).tolist())
    assert one.result().fallback is None and one.plans >= 2


def test_the_plan_computes_more_the_slower_the_link(prefix: Prefix, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = prefix.model.config.num_hidden_layers
    profile = loader.DeviceProfile(CHUNK, tuple(np.linspace(0, 0.1, layers + 1)), (0.0,) * (layers + 1), 0.0, 0.0)
    monkeypatch.setattr(loader.DeviceProfile, "of", lambda model, tokens: profile)
    computed = []
    for goodput in (1e3, 1e5, 1e6, 1e9):
        one = prefix.loader(goodput=goodput)
        one._plan(0, 0)
        computed.append(int(one.progress.target.sum()))
    assert computed[0] == CHUNKS * layers and computed[-1] <= CHUNKS
    assert sorted(computed, reverse=True) == computed and computed[1] > computed[2]


def test_the_plan_waits_for_no_layer_that_is_still_to_come(prefix: Prefix) -> None:
    """A chunk behind one that was stopped at depth 2 and is not streamed yet can be computed to depth 3 at most."""
    one = prefix.loader(goodput=1.0)
    one.progress.computed[0] = 2
    one._plan(1, 0)
    assert one.progress.target[1:].max() == 3
    one.progress.arrived[0, 2:] = True
    one._plan(1, 0)
    assert one.progress.target[1:].max() == prefix.model.config.num_hidden_layers


@pytest.mark.parametrize("damage", ["altered", "truncated", "emptied", "removed", "swapped"])
@pytest.mark.parametrize("planner", ["stream", "optimal"])
def test_a_damaged_chunk_is_refused_and_computed(prefix: Prefix, damage: str, planner: str) -> None:
    file = prefix.chunk_file(CHUNKS - 1)
    data = bytearray(file.read_bytes())
    if damage == "altered":
        data[len(data) // 2] ^= 1
    elif damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "emptied":
        data = bytearray()
    elif damage == "swapped":
        data = bytearray(prefix.chunk_file(0).read_bytes())
    file.write_bytes(data)
    if damage == "removed":
        file.unlink()
    result = prefix.load(planner=planner)
    assert result.fallback is not None
    assert result.depths[-1] > 0


def test_every_chunk_damaged_is_a_local_prefill(prefix: Prefix) -> None:
    for chunk in range(CHUNKS):
        prefix.chunk_file(chunk).write_bytes(b"noise")
    assert set(prefix.load(planner="stream").depths) == {prefix.model.config.num_hidden_layers}


def test_a_stalled_link_is_given_up_after_its_timeout(prefix: Prefix) -> None:
    with running(prefix.folder) as server:
        link = shaped_link(server, mbit=2, rtt_ms=2)
        with link as url:
            one = prefix.loader(url, planner="stream", stall_timeout=0.5)
            stall = threading.Timer(0.1, lambda: setattr(link, "mbit", 0))
            stall.start()
            result = prefix.run(one)
            stall.join()
    assert result.fallback is not None and "not one byte" in result.fallback
    assert result.seconds < 10 and max(result.depths) > 0


def test_a_link_that_breaks_is_given_up(prefix: Prefix) -> None:
    with running(prefix.folder) as server, contextlib.ExitStack() as link:
        url = link.enter_context(shaped_link(server, mbit=2, rtt_ms=2))
        one = prefix.loader(url, planner="stream", stall_timeout=2.0)
        cut = threading.Timer(0.1, link.close)
        cut.start()
        result = prefix.run(one)
        cut.join()
    assert result.fallback is not None and max(result.depths) > 0


def test_an_exception_while_computing_leaves_no_thread(prefix: Prefix, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loader.PrefixCache, "compute", interrupted)
    with running(prefix.folder) as server, shaped_link(server, mbit=1, rtt_ms=2) as url:
        with pytest.raises(KeyboardInterrupt):
            prefix.load(url)
        assert not [thread for thread in threading.enumerate() if thread.name == "kvsched-stream"]


def test_plans_minimise_what_the_configuration_asks_for(prefix: Prefix) -> None:
    expected = PowerProfile.load("oneplus-9r").objective("lte", 0.7)
    assert prefix.loader(device="oneplus-9r", radio="lte", energy_weight=0.7).objective == expected
