"""Target S8: a server that fails at any byte, and stores in which any field of a manifest or of a header is false.

Whatever happens, the logits are those of a local prefill, the delay is bounded, and nothing is left behind.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FAULTS, FailsAtByte, Faulty, Request, Send, honest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kvsched
from kvsched.sparkv.codec import MAGIC
from kvsched.sparkv.manifest import chunk_path

CHUNK, TOKENS = 16, 96
IDS = torch.randint(1, 256, (1, TOKENS + 5), generator=torch.Generator().manual_seed(0))
OPTIONS = {"codec": "lossless", "chunk_tokens": CHUNK}
BOUND = 15.0
"""Seconds: the stall time-out, asked for a few times over, and what this small model takes on a busy machine."""

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=70) | st.just("e" * 64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


class Published:
    """A model, a folder with the six chunks of `IDS`, and the logits that every load has to give."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder
        kvsched.publish(model, IDS, store=folder, config=OPTIONS)
        with torch.no_grad():
            self.logits = model(IDS).logits[:, -1]
        with Faulty(folder).running() as server:
            self.expect_same_logits(server.url, "stream")
            self.bytes_sent = server.sent
        manifests = [path.read_bytes() for path in folder.rglob("manifests/*/*.json")]
        self.manifest = json.loads(max(manifests, key=len))

    def expect_same_logits(self, store: str, planner: str) -> kvsched.SparKVReport:
        begin = time.monotonic()
        cache = kvsched.SparKVCache(self.model.config, store=store, planner=planner, stall_timeout=0.3, **OPTIONS)
        cache.load(self.model, IDS)
        assert time.monotonic() - begin < BOUND
        with torch.no_grad():
            logits = self.model(IDS[:, cache.get_seq_length() :], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(logits, self.logits, atol=1e-4, rtol=0)
        return cache.report()

    def header(self, chunk: int) -> tuple[dict[str, Any], bytes]:
        """A chunk's header and the payloads behind it."""
        data = (self.folder / chunk_path(self.manifest["chunks"][chunk]["address"])).read_bytes()
        end = 8 + int.from_bytes(data[4:8], "little")
        return json.loads(data[8:end]), data[end:]


@pytest.fixture(scope="module")
def published(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published(tiny_model("llama"), tmp_path_factory.mktemp("published"))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest keeps every record that is logged, with the error in it and all that the error refers to."""
    for name in ("kvsched", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)


@pytest.mark.parametrize("planner", ["stream", "optimal"])
@pytest.mark.parametrize("fault", FAULTS)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_a_server_that_fails_at_any_byte(published: Published, fault: str, planner: str, data: st.DataObject) -> None:
    byte = data.draw(st.integers(0, published.bytes_sent - 1), "byte")
    answer = FailsAtByte(byte, fault)
    with Faulty(published.folder, answer).running() as server:
        report = published.expect_same_logits(server.url, planner)
        answer.over.set()
        server.expect_left()
    assert answer.failed or planner == "optimal"
    # What is truncated may be asked for again, and a bit that nobody reads does no harm; but a link that is dead shows.
    assert report.fallback is not None or planner == "optimal" or fault not in ("killed", "silent")


class Progressive:
    """A folder published progressively, and its keys and values as they are before and after they are refined."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.options = {"codec": "progressive", "chunk_tokens": CHUNK, "planner": "stream", "stall_timeout": 1.0}
        kvsched.publish(model, IDS, store=folder, config=self.options)
        newest = max((path.read_bytes() for path in folder.rglob("manifests/*/*.json")), key=len)
        self.paths = {"/" + chunk_path(entry["address"]) for entry in json.loads(newest)["refinements"]}
        cache, self.coarse = self.load(str(folder))
        cache.refine()
        self.fine = self.states(cache)
        self.bytes_sent = sum((folder / path[1:]).stat().st_size for path in self.paths)

    def load(self, store: str) -> tuple[kvsched.SparKVCache, list[torch.Tensor]]:
        """A loaded cache and what it holds before anything that refines it is taken over."""
        cache = kvsched.SparKVCache(self.model.config, store=store, **self.options)
        cache.load(self.model, IDS)
        return cache, self.states(cache)

    @staticmethod
    def states(cache: kvsched.SparKVCache) -> list[torch.Tensor]:
        return [state.clone() for layer in cache.layers for state in (layer.keys, layer.values)]


@pytest.fixture(scope="module")
def progressive(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Progressive:
    return Progressive(tiny_model("llama", num_hidden_layers=4), tmp_path_factory.mktemp("progressive"))


@pytest.mark.parametrize("fault", FAULTS)
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_a_server_that_fails_while_a_prefix_is_refined(
    progressive: Progressive, fault: str, data: st.DataObject
) -> None:
    """Every layer of every chunk is as coarse as it came or as fine as it was published, and the report counts them."""
    fails = FailsAtByte(data.draw(st.integers(0, progressive.bytes_sent - 1), "byte"), fault)

    def answer(request: Request, send: Send) -> None:
        (fails if request.path in progressive.paths else honest)(request, send)

    with Faulty(progressive.folder, answer).running() as server:
        begin = time.monotonic()
        cache, coarse = progressive.load(server.url)
        # A machine too busy to load within the stall time-out computes instead, and has nothing to refine there.
        assume(not any(cache.report().depths))
        assert all(map(torch.equal, coarse, progressive.coarse))
        # Nothing waits for what comes slowly, unless it is told to.
        report = cache.refine() if fault != "slow" else cache.report()
        assert time.monotonic() - begin < BOUND
        states = progressive.states(cache)
        del cache
        fails.over.set()
        server.expect_left()
    left = 0
    for index, (state, before, after) in enumerate(zip(states, progressive.coarse, progressive.fine, strict=True)):
        for chunk in range(TOKENS // CHUNK):
            span = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            is_fine = torch.equal(state[:, :, span], after[:, :, span])
            assert is_fine or torch.equal(state[:, :, span], before[:, :, span])
            left += not is_fine and index % 2 == 0
    assert fault == "slow" or (left == report.coarse and (report.fallback is None) == (left == 0))


def fields(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a JSON document stands, parents before what is in them."""
    inside = document.items() if isinstance(document, dict) else enumerate(document) if type(document) is list else ()
    for step, value in inside:
        yield (*path, step)
        yield from fields(value, (*path, step))


def changed(document: Any, path: tuple[Any, ...], value: object) -> Any:
    document = copy.deepcopy(document)
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return document


def expect_harmless(published: Published, manifest: Any, objects: dict[int, bytes]) -> None:
    """A store with another manifest, and other objects for some chunks, gives the right logits all the same."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(published.folder, folder, dirs_exist_ok=True)
        addresses = [chunk["address"] for chunk in published.manifest["chunks"]]
        for chunk, data in objects.items():
            (Path(folder) / chunk_path(addresses[chunk])).write_bytes(data)
        (Path(folder) / f"manifests/{addresses[-1][:2]}/{addresses[-1]}.json").write_text(json.dumps(manifest))
        published.expect_same_logits(folder, "stream")


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_any_field_of_a_manifest_may_be_false(published: Published, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(fields(published.manifest), key=str)), "field")
    expect_harmless(published, changed(published.manifest, path, data.draw(anything, "value")), {})


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_any_field_of_a_header_may_be_false(published: Published, data: st.DataObject) -> None:
    """The manifest vouches for the false header: its length and its digest are right."""
    chunk = data.draw(st.integers(0, TOKENS // CHUNK - 1), "chunk")
    header, payloads = published.header(chunk)
    path = data.draw(st.sampled_from(sorted(fields(header), key=str)), "field")
    text = json.dumps(changed(header, path, data.draw(anything, "value"))).encode()
    head = MAGIC + len(text).to_bytes(4, "little") + text
    manifest = copy.deepcopy(published.manifest)
    manifest["chunks"][chunk] |= {"header_bytes": len(head), "header_sha256": hashlib.sha256(head).hexdigest()}
    expect_harmless(published, manifest, {chunk: head + payloads})


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_sizes_in_manifest_and_header_may_be_false_together(published: Published, data: st.DataObject) -> None:
    """So that neither contradicts the other, and what lies behind them is all that can."""
    chunk, layer = data.draw(st.integers(0, 5), "chunk"), data.draw(st.integers(0, 1), "layer, last first")
    header, payloads = published.header(chunk)
    size = data.draw(st.integers(0, 2 * header["layers"][layer]["length"]), "length")
    header["layers"][layer]["length"] = size
    header["layers"][layer]["key_bytes"] = data.draw(st.integers(0, size), "key_bytes")
    text = json.dumps(header).encode()
    head = MAGIC + len(text).to_bytes(4, "little") + text
    manifest = copy.deepcopy(published.manifest)
    entry = manifest["chunks"][chunk]
    entry |= {"header_bytes": len(head), "header_sha256": hashlib.sha256(head).hexdigest()}
    entry["payload_bytes"][layer] = size
    expect_harmless(published, manifest, {chunk: head + payloads})
