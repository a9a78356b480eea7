from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from kvsched.trace import record
from kvsched_evals import storage_bench
from kvsched_evals.storage_bench import AS_THEY_COME, FORMS

ROOT = Path(__file__).parents[2]


def test_every_form_is_measured(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2", num_hidden_layers=1)
    model.model.layers[0].self_attn.k_proj.bias.data[5::16] = 60.0  # as in the real model
    model.config.save_pretrained(tmp_path)
    ids = torch.randint(3, 256, (200,), generator=torch.Generator().manual_seed(0))
    record(model, ids, 100, tmp_path / "trace.safetensors")
    monkeypatch.setattr(storage_bench, "fetch_model", lambda name: tmp_path)
    for name, value in {"KEYS": 100, "FIRST": 50}.items():
        monkeypatch.setattr(storage_bench, name, value)
    app = typer.Typer()
    app.command()(storage_bench.main)
    result = CliRunner().invoke(app, [str(tmp_path / "trace.safetensors"), "--json", str(tmp_path / "storage.json")])
    assert result.exit_code == 0, result.output
    layers = json.loads((tmp_path / "storage.json").read_text())["layers"]
    assert storage_bench.table(layers) in result.output
    (rows,) = layers.values()
    assert list(rows) == list(FORMS)
    assert rows["int8"]["bytes"] == 2 * (32 + 4) and rows["float16"]["bytes"] == 2 * 64
    for name in ("int8", "fp8"):
        assert max(rows[name]["kl"]) < min(rows[f"{name}{AS_THEY_COME}"]["kl"])


def test_the_documented_table_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "evals" / "results" / "storage.json").read_text())
    assert storage_bench.table(measured["layers"]) in (ROOT / "docs" / "storage.md").read_text()
