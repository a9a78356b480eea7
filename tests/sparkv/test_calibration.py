"""A calibration: what it measures, how it is kept, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kvsched
from kvsched import cli, hub
from kvsched.errors import ChunkError, InputError
from kvsched.sparkv import calibration as module
from kvsched.sparkv.address import fingerprint
from kvsched.sparkv.calibration import Calibration, LayerSteps, calibration_path
from kvsched.sparkv.codec import Coder
from kvsched.sparkv.forward import kv_shapes

SMALL = Calibration(1, "f" * 64, "a text", 100, (LayerSteps((0.5, 0.25), (1.0, 2.0)),))


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.platformdirs, "user_cache_dir", lambda name: str(tmp_path))


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3"])
def test_measuring_prices_every_channel_and_comes_out_the_same(tiny_model, kind: str) -> None:
    model, texts = tiny_model(kind), [torch.arange(n)[None] % 251 for n in (40, 60)]
    measured = Calibration.measure(model, texts, "numbers")
    assert measured == Calibration.measure(model, texts, "numbers")
    assert (measured.fingerprint, measured.tokens) == (fingerprint(model), 100)
    measured.check(fingerprint(model), kv_shapes(model.config))
    assert len({step for layer in measured.layers for step in layer.keys}) > 1


def test_a_calibrated_chunk_names_its_calibration_and_is_read_without_it(tiny_model) -> None:
    model = tiny_model("qwen2")
    measured = Calibration.measure(model, [torch.arange(60)[None]], "numbers")
    layers = [(torch.randn(2, 32, 16), torch.randn(2, 32, 16)) for _ in range(3)]
    header, data = Coder.of(model, "balanced", measured).encode(0, layers)
    assert header.calibration == measured.id
    offset, entry = len(header.to_bytes()), header.layers[0]
    payload = data[offset : offset + entry.length]
    read = [Coder.of(model, "balanced", other).decode(header, entry, payload) for other in (None, measured)]
    assert all(torch.equal(a, b) for a, b in zip(*read, strict=True))


def test_it_is_kept_and_found(tiny_model) -> None:
    assert Calibration.find(SMALL.fingerprint) is None
    path = SMALL.keep()
    assert Calibration.find(SMALL.fingerprint) == SMALL
    path.write_bytes(b"{}")
    assert Calibration.find(SMALL.fingerprint) is None


def test_bytes_and_id() -> None:
    back = Calibration.from_bytes(SMALL.to_bytes())
    assert back == SMALL and back.id == SMALL.id
    assert calibration_path(SMALL.id) == f"calibrations/{SMALL.id[:2]}/{SMALL.id}.json"


def test_another_models_is_refused(tiny_model) -> None:
    with pytest.raises(ChunkError, match="another model"):
        Coder.of(tiny_model("qwen2"), "balanced", SMALL)


@pytest.mark.parametrize("texts", [[], [torch.arange(5)[None]]])
def test_too_little_text_is_refused(tiny_model, texts: list[torch.Tensor]) -> None:
    with pytest.raises(InputError):
        Calibration.measure(tiny_model("qwen2"), texts, "nothing")


@given(st.data())
def test_damaged_bytes_are_refused_or_well_formed(data: st.DataObject) -> None:
    raw = bytearray(SMALL.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = Calibration.from_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    except ChunkError:
        return
    assert all(0 < step < 1e30 for layer in read.layers for step in (*layer.keys, *layer.values))


def test_calibrate_keeps_it_here_and_puts_it_into_a_store(tiny_model, monkeypatch, tmp_path: Path) -> None:
    class Words:
        def __call__(self, text: str, return_tensors: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=torch.tensor([[ord(letter) % 256 for letter in text]]))

    model = tiny_model("llama")
    monkeypatch.setattr(hub, "load_model", lambda name: (model, Words()))
    text, store = tmp_path / "text.txt", tmp_path / "store"
    text.write_text("To be, or not to be, that is the question. " * 3)
    result = CliRunner().invoke(cli.app, ["calibrate", "--text", str(text), "--store", str(store)])
    assert result.exit_code == 0, result.output
    kept = Calibration.find(fingerprint(model))
    assert kept is not None and kept.source == "text.txt"
    assert Calibration.from_bytes((store / calibration_path(kept.id)).read_bytes()) == kept


@pytest.mark.parametrize("codec", ["int8", "balanced", "small"])
def test_a_prefix_is_published_and_loaded(tiny_model, tmp_path: Path, codec: str) -> None:
    model, ids = tiny_model("gemma3"), torch.arange(80)[None] * 7 % 256
    options = {"store": str(tmp_path / "store"), "codec": codec, "chunk_tokens": 16, "planner": "stream"}
    kvsched.publish(model, ids, config=options)
    cache = kvsched.SparKVCache(model.config, options)
    report = cache.load(model, ids)
    assert (report.loaded_tokens, report.fallback) == (64, None)
