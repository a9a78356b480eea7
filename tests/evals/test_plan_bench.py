"""The planners' measurement, on a few instances; its committed numbers meet target S2."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from kvsched.sparkv.plan import PLANNERS
from kvsched_evals.plan_bench import main

RESULTS = Path(__file__).parents[2] / "evals" / "results" / "plan.json"


def test_it_measures_every_planner(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--instances", "4", "--json", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "plan.json").read_text())
    for row in measured["quality"].values():
        assert row["instances"] == 2
        assert row["gap"]["max"] + 1e-9 >= 0 and row["optimal_above_a_baseline"] == 0
        assert set(row["makespan_over_lower_bound"]) == set(PLANNERS)
    assert {"16x24", "32x32", "64x64"} == set(measured["planning_seconds"])


def test_the_committed_numbers_meet_the_target() -> None:
    measured = json.loads(RESULTS.read_text())
    assert sum(row["instances"] for row in measured["quality"].values()) >= 1000
    for row in measured["quality"].values():
        assert row["gap"]["max"] <= 0.005 and row["optimal_above_a_baseline"] == 0
    assert measured["planning_seconds"]["32x32"]["optimal"]["median"] <= 0.05
    assert measured["planning_seconds"]["64x64"]["optimal"]["median"] <= 0.2
