from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsched.errors import ChunkError, StoreError
from kvsched.sparkv.address import Prefix, refinement_address
from kvsched.sparkv.manifest import MAX_MANIFEST, ChunkEntry, Manifest, find, manifest_path
from kvsched.sparkv.store import Store

NAMES, KEY = ("a" * 64, "b" * 64), b"k" * 32
PREFIX = Prefix("f" * 64, "lossless", 32, NAMES, (1000, 2000, 3000))
SIGNED = dataclasses.replace(PREFIX, key=KEY)
MANIFEST = Manifest("f" * 64, "lossless", 32, tuple(ChunkEntry(name, 100, "c" * 64, (10, 20, 30)) for name in NAMES))
PROGRESSIVE = dataclasses.replace(PREFIX, codec="progressive")
REFINED = dataclasses.replace(
    MANIFEST,
    codec="progressive",
    refinements=tuple(
        ChunkEntry(refinement_address(chunk.address, chunk.header_sha256), 100, "d" * 64, (1, 0, 3))
        for chunk in MANIFEST.chunks
    ),
)
FIELDS = [
    ["fingerprint"],
    ["codec"],
    ["chunk_tokens"],
    ["chunks"],
    ["chunks", 1],
    ["chunks", 0, "address"],
    ["chunks", 0, "header_bytes"],
    ["chunks", 1, "header_sha256"],
    ["chunks", 1, "payload_bytes"],
    ["chunks", 1, "payload_bytes", 2],
    ["refinements"],
    ["refinements", 0],
    ["refinements", 1, "address"],
    ["refinements", 0, "header_bytes"],
    ["refinements", 1, "header_sha256"],
    ["refinements", 1, "payload_bytes"],
    ["refinements", 0, "payload_bytes", 1],
    ["signature"],
]
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=70) | st.just("e" * 64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


def test_round_trip() -> None:
    assert Manifest.from_bytes(MANIFEST.to_bytes(), PREFIX) == MANIFEST
    assert Manifest.from_bytes(REFINED.to_bytes(), PROGRESSIVE) == REFINED


def test_payload_spans_run_from_the_last_layer_down() -> None:
    entry = MANIFEST.chunks[0]
    assert entry.payload_span(3, 0) == (100, 160)
    assert entry.payload_span(3, 2) == (100, 110)
    assert entry.payload_span(2, 0) == (110, 160)
    assert entry.payload_span(1, 1) == (130, 130)


@pytest.mark.parametrize(
    "expected",
    [
        {"fingerprint": "e" * 64},
        {"codec": "other"},
        {"chunk_tokens": 64},
        {"addresses": NAMES[:1]},
        {"addresses": NAMES[::-1]},
        {"payload_limits": (1000,) * 4},
        {"payload_limits": (29, 2000, 3000)},
        {"payload_limits": (1000, 2000, 9)},
        {"key": KEY},
    ],
    ids=["model", "codec", "chunk size", "fewer chunks", "order", "layers", "first layer", "last layer", "unsigned"],
)
def test_a_manifest_of_something_else_is_refused(expected: dict) -> None:
    with pytest.raises(ChunkError):
        Manifest.from_bytes(MANIFEST.to_bytes(), dataclasses.replace(PREFIX, **expected))


def test_a_signed_manifest_is_read_by_its_tenant_alone() -> None:
    signed = MANIFEST.to_bytes(KEY)
    assert Manifest.from_bytes(signed, SIGNED).chunks == MANIFEST.chunks
    with pytest.raises(ChunkError, match="not signed by this tenant"):
        Manifest.from_bytes(signed, dataclasses.replace(PREFIX, key=b"o" * 32))
    with pytest.raises(ChunkError, match="not signed by this tenant"):
        Manifest.from_bytes(signed.replace(b"[10,20,30]", b"[10,20,31]"), SIGNED)


@settings(deadline=None)
@given(st.sampled_from(FIELDS), anything)
def test_every_field_is_checked_and_none_of_a_signed_manifest_can_be_changed(path: list, value: object) -> None:
    """Whatever stands in a field, the result is a refusal, or a manifest of these very chunks in possible sizes."""
    for prefix in (PROGRESSIVE, dataclasses.replace(PROGRESSIVE, key=KEY)):
        document = json.loads(REFINED.to_bytes(prefix.key))
        *parents, last = path
        inner = document
        for step in parents:
            inner = inner[step]
        before = json.dumps(document)
        inner[last] = value
        try:
            manifest = Manifest.from_bytes(json.dumps(document).encode(), prefix)
        except ChunkError:
            continue
        assert tuple(chunk.address for chunk in manifest.chunks) == NAMES and manifest.chunk_tokens == 32
        refined = [refinement_address(chunk.address, chunk.header_sha256) for chunk in manifest.chunks]
        assert [refinement.address for refinement in manifest.refinements or ()] == refined
        for chunk in manifest.objects:
            assert 8 <= chunk.header_bytes <= 1 << 20
            assert all(size <= limit for size, limit in zip(chunk.payload_bytes, (3000, 2000, 1000), strict=True))
        if prefix.key:
            assert json.dumps(document) == before


@given(st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    """Whatever bytes come, the result is a refusal or a manifest of these very chunks."""
    text = bytearray(MANIFEST.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        manifest = Manifest.from_bytes(bytes(text[: data.draw(st.integers(0, len(text)))]), PREFIX)
    except ChunkError:
        return
    assert tuple(chunk.address for chunk in manifest.chunks) == NAMES


def test_a_huge_manifest_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / manifest_path(NAMES[1])
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(StoreError, match=rf"{100 << 20} bytes: {MAX_MANIFEST} are allowed"):
        Store.wait(find(Store(tmp_path), PREFIX))


class Asked(Store):
    """A store of manifests that notes what it is asked for in each round."""

    def __init__(self, folder: Path, prefix: Prefix, published: int) -> None:
        super().__init__(folder)
        self.prefix, self.published, self.rounds = prefix, published, []
        self.there = {manifest_path(address) for address in prefix.addresses[:published]}

    async def exists(self, paths) -> list[bool]:
        self.rounds.append(list(paths))
        return [path in self.there for path in self.rounds[-1]]

    async def get(self, path: str, limit: int) -> bytes:
        assert path == manifest_path(self.prefix.addresses[self.published - 1])
        entries = tuple(ChunkEntry(name, 100, "c" * 64, (1,)) for name in self.prefix.addresses[: self.published])
        return Manifest("f" * 64, "lossless", 32, entries).to_bytes()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_longest_prefix_is_found_in_a_round_for_each_factor_of_64(tmp_path_factory, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 64) | st.integers(65, 5000))
    published = data.draw(st.integers(0, count))
    prefix = Prefix("f" * 64, "lossless", 32, tuple(f"{index:064x}" for index in range(count)), (9,))
    store = Asked(tmp_path_factory.getbasetemp(), prefix, published)
    manifest = Store.wait(find(store, prefix))
    assert (0 if manifest is None else len(manifest.chunks)) == published
    assert max(map(len, store.rounds), default=0) <= 64
    assert len(store.rounds) <= (1 if count <= 64 else 2 if count <= 4096 else 3)
