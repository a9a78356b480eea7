from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsched.errors import ChunkError
from kvsched.sparkv.manifest import ChunkEntry, Manifest

NAMES = ["a" * 64, "b" * 64]
MANIFEST = Manifest("f" * 64, "lossless", 32, tuple(ChunkEntry(name, 100, "c" * 64, (10, 20, 30)) for name in NAMES))


def read(
    data: bytes, fingerprint: str = "f" * 64, codec: str = "lossless", names: list[str] = NAMES, layers: int = 3
) -> Manifest:
    return Manifest.from_bytes(data, fingerprint, codec, names, layers)


def test_round_trip() -> None:
    assert read(MANIFEST.to_bytes()) == MANIFEST


def test_payload_spans_run_from_the_last_layer_down() -> None:
    entry = MANIFEST.chunks[0]
    assert entry.payload_span(3, 0) == (100, 160)
    assert entry.payload_span(3, 2) == (100, 110)
    assert entry.payload_span(2, 0) == (110, 160)
    assert entry.payload_span(1, 1) == (130, 130)


@pytest.mark.parametrize(
    "expected",
    [{"fingerprint": "e" * 64}, {"codec": "other"}, {"names": NAMES[:1]}, {"names": NAMES[::-1]}, {"layers": 4}],
    ids=["model", "codec", "fewer chunks", "order", "layers"],
)
def test_a_manifest_of_something_else_is_refused(expected: dict) -> None:
    with pytest.raises(ChunkError):
        read(MANIFEST.to_bytes(), **expected)


@pytest.mark.parametrize("size", [-1, 1 << 41, True, 1.5])
def test_absurd_sizes_are_refused(size: object) -> None:
    entry = dataclasses.replace(MANIFEST.chunks[0], payload_bytes=(size, 20, 30))
    data = MANIFEST.to_bytes().replace(b"[10,20,30]", f"[{str(size).lower()},20,30]".encode(), 1)
    assert entry.payload_bytes[0] == size and data != MANIFEST.to_bytes()
    with pytest.raises(ChunkError):
        read(data)


@given(st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    """Whatever bytes come, the result is a refusal or a manifest of these very chunks."""
    text = bytearray(MANIFEST.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        manifest = read(bytes(text[: data.draw(st.integers(0, len(text)))]))
    except ChunkError:
        return
    assert [chunk.address for chunk in manifest.chunks] == NAMES
