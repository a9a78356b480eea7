from __future__ import annotations

import json
import random
from pathlib import Path
from string import ascii_letters
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

import kvsched
from kvsched_evals import progressive_bench


def test_it_follows_every_codec_until_nothing_is_coarse(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenizer(text: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([[byte % 256 for byte in text.encode()]]))

    monkeypatch.setattr(kvsched, "load_model", lambda: (tiny_model("qwen2", num_hidden_layers=4), tokenizer))
    monkeypatch.setattr(
        progressive_bench, "texts", lambda: dict.fromkeys("ab", "".join(random.Random(1).choices(ascii_letters, k=800)))
    )
    app = typer.Typer()
    app.command()(progressive_bench.main)
    out = tmp_path / "progressive.json"
    arguments = ["--json", str(out), "--mbits", "50", "--context", "512", "--tokens", "6"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    measured = json.loads(out.read_text())
    assert set(measured["results"]) == {"50/balanced", "50/small", "50/progressive"}
    for name, runs in measured["runs"].items():
        for run in runs:
            assert len(run["kl"]) == 6 and min(run["kl"]) > -1e-4 and run["fallback"] is None
            assert (run["bytes_refined"] > 0) == (name == "50/progressive")
            assert run["seconds"] == sorted(run["seconds"])
    sizes = {name: row["bytes_streamed"] for name, row in measured["results"].items()}
    assert sizes["50/progressive"] < sizes["50/balanced"]
