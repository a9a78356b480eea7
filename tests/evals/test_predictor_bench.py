from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import kvsched
from kvsched_evals import predictor_bench


def test_errors_are_relative_to_what_was_measured() -> None:
    predicted, actual = np.array([[1.0, 3.0], [2.0, 2.0]]), np.array([[2.0, 2.0], [2.0, 2.0]])
    found = predictor_bench.errors(predicted, actual)
    assert (found["chunk_median"], found["prefill_mean"]) == (0.25, 0.0)


def test_predictions_are_corrected_by_the_chunks_before() -> None:
    corrected = predictor_bench.corrected(np.array([1.0, 1.0, 1.0, 1.0]), np.array([2.0, 4.0, 5.0, 7.0]))
    np.testing.assert_allclose(corrected, [1.0, 2.0, 3.0, 4.5])


def test_it_compares_both_models(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvsched, "load_model", lambda: (tiny_model("qwen2"), None))
    app = typer.Typer()
    app.command()(predictor_bench.main)
    arguments = ["--tokens", "1024", "--train", "1", "--test", "1", "--json", str(tmp_path / "predictor.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "predictor.json").read_text())
    assert set(measured["errors"]) == {"profile", "learned", "profile, corrected", "learned, corrected"}
    assert np.array(measured["chunk_seconds"]["actual"]).shape == (1, 4)
    assert measured["training_samples"] == 4 * 2
