from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from transformers import DynamicCache

from kvsched_evals import sparkv_bench as bench
from kvsched_evals.sparkv_plots import draw


def log_file(folder: Path, rates: list[float]) -> Path:
    path = folder / "log.json"
    path.write_text(json.dumps([{"duration_ms": 50, "bandwidth_kbps": rate * 1e3, "latency_ms": 20} for rate in rates]))
    return path


def test_a_recorded_link_is_read_in_seconds_and_mbit(tmp_path: Path) -> None:
    assert bench.read_log(log_file(tmp_path, [8, 4.5])) == [(0.05, 8.0), (0.05, 4.5)]


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"duration_ms": 1}]', "no json"])
def test_a_file_that_is_no_recorded_link_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "log.json").write_text(text)
    if text == "{}":
        assert bench.read_log(tmp_path / "log.json") == []
        return
    with pytest.raises(typer.BadParameter, match=r"log\.json"):
        bench.read_log(tmp_path / "log.json")


def test_a_log_is_taken_up_just_before_its_steepest_drop() -> None:
    steps = [(1.0, rate) for rate in [20.0] * 20 + [15.0] * 20 + [3.0] * 20]
    assert bench.steepest_drop(steps) == 37
    assert bench.steepest_drop([(1.0, 20.0)] * 60) is None
    assert bench.steepest_drop([(1.0, 20.0)] * 5) is None


@pytest.fixture
def measured(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[bench.Bench, list[bench.Case]]:
    """A whole run on a tiny model: local, shaped and recorded links, real sockets, the pictures' file."""
    monkeypatch.setattr(bench, "CHUNK_TOKENS", 32)
    monkeypatch.setattr(bench, "QUERY_TOKENS", 8)
    log_file(tmp_path, [50.0] * 20 + [2.0] * 20)
    ids = torch.randint(1, 256, (1, 128), generator=torch.Generator().manual_seed(0))
    cases = [
        bench.Case(128, "none", 0.0, "local"),
        *(bench.Case(128, "8", 2.0, planner) for planner in ("stream", "token_split", "optimal")),
        *(bench.Case(128, "log@5", 2.0, "optimal", replan) for replan in (True, False)),
    ]
    run = bench.Bench(tiny_model("qwen2"), ids, "lossless", tmp_path, tmp_path / "out.json")
    run.run(cases, repeats=2)
    return run, cases


def test_a_run_measures_every_case_and_keeps_the_tokens(measured) -> None:
    run, cases = measured
    result = json.loads(run.out.read_text())
    assert set(result["rows"]) == {case.key for case in cases}
    assert {row["token"] for rows in result["rows"].values() for row in rows} == {
        result["rows"][cases[0].key][0]["token"]
    }
    for case in result["summary"]["cases"].values():
        assert case["runs"] == 2 and case["spread"][0] <= case["ttft"] <= case["spread"][1]
    assert all(row["report"]["loaded_tokens"] == 128 for case in cases[1:] for row in result["rows"][case.key])
    frozen = result["rows"][cases[-1].key]
    assert all(row["report"]["plans"] == 1 for row in frozen)


def test_finished_cases_are_not_run_again(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    run, cases = measured
    again = bench.Bench(run.model, run.ids, run.codec, run.logs, run.out)
    monkeypatch.setattr(again, "_request", lambda *_: pytest.fail("a finished case was run again"))
    again.run(cases, repeats=2)
    assert again.rows == json.loads(run.out.read_text())["rows"]


def test_results_of_other_settings_are_not_mixed(measured) -> None:
    run, _ = measured
    with pytest.raises(typer.BadParameter, match="other settings"):
        bench.Bench(run.model, run.ids.flip(1), run.codec, run.logs, run.out)


def test_both_pictures_are_drawn(measured) -> None:
    run, _ = measured
    surface, timeline = draw(run.out)
    assert surface.stat().st_size > 10_000 and timeline.stat().st_size > 10_000


def test_the_local_case_is_transformers_own_prefill(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    run, cases = measured
    used = []
    monkeypatch.setattr(bench, "DynamicCache", lambda **kwargs: used.append(1) or DynamicCache(**kwargs))
    run._request(cases[0], "http://127.0.0.1:9")
    assert used == [1]
