"""The kernels' measurement on small cases: every operation is there, right, and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from kvsched_evals import kernels_bench

CPU = torch.device("cpu")


def small_cases(device):
    yield kernels_bench.attention(device, torch.float32, streams=2, group=2, dim=16, context=256, share=0.25)
    yield from kernels_bench.estimated(device, streams=2, group=2, dim=16, context=256)
    yield from kernels_bench.single_tokens(device, streams=2, group=2, dim=16, budget=24)
    yield from kernels_bench.clustering(device, streams=1, dim=16, prompt=64)
    yield kernels_bench.coding(device, torch.float32, heads=2, tokens=32, dim=16)


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no compiler here\nand a page of what it said")

    monkeypatch.setattr(kernels_bench, "_flex", refuse)
    monkeypatch.setattr(torch, "compile", refuse)


def test_contenders_give_the_same_answer():
    torch.manual_seed(0)
    for case in small_cases(CPU):
        got, wanted = case.ours(), case.others["straightforward"]()
        if case.name == "k-means step":
            got = got[1]
        for one, other in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, wanted)), strict=True):
            torch.testing.assert_close(one.float(), other.float(), atol=1e-4, rtol=1e-4)


def test_everything_that_moves_and_is_computed_is_counted():
    counted = {case.name: (case.moved, case.work) for case in small_cases(CPU)}
    # 2 streams x 64 tokens x keys and values of 16 float32; a product and a sum for each of 2 heads, twice
    assert counted["cluster attention"] == (2 * 64 * 2 * 16 * 4, 2 * 2 * 64 * 16 * 2 * 2)
    # 10 clusters: mean keys of 16 x 8 bits, a size and a worth each
    assert counted["score"] == (2 * 10 * (16 + 1 + 4), 2 * 2 * 10 * 16 * 2)
    # 6 clusters of 24 tokens: residuals of 16 x 2 bits, and a mass for each head and a worth
    assert counted["look at tokens"] == (2 * 144 * (4 + 2 * 4 + 4), 2 * 2 * 144 * 16 * 2)


def test_it_measures_keeps_and_draws(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels_bench, "cases", small_cases)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(kernels_bench.main)
    done = CliRunner().invoke(app, ["--rounds", "2", "--json", str(tmp_path / "kernels.json")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
    rows = json.loads((tmp_path / "kernels.json").read_text())["devices"]["cpu"]
    assert rows[0]["not_run"] == {
        "one_copy_compiled": "no compiler here",
        "flex_block_mask": "no compiler here",
        "flashinfer": "FlashInfer needs an NVIDIA GPU",
    }
    for row in rows:
        assert row["speed_up_over"]["straightforward"] > 0
        assert row["share_of_limit"] == pytest.approx(row["least_seconds"] / row["seconds"]["ours"]["median"])
