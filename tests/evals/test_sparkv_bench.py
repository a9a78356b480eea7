from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from transformers import DynamicCache

from kvsched_evals import rounds
from kvsched_evals import sparkv_bench as bench
from kvsched_evals.sparkv_plots import draw


def test_planners_stand_side_by_side_and_take_turns_at_being_first() -> None:
    planners = ["local", "stream", "optimal"]
    order = bench.schedule([64, 128], [2, 1], ["1", "8"], [10.0], planners)
    cells = [order[at : at + 3] for at in range(0, len(order), 3)]
    assert [(cell[0].context, cell[0].link) for cell in cells] == [
        *[(64, "1"), (64, "8")] * 2,
        *[(128, "1"), (128, "8")],
    ]
    for cell in cells:
        assert len({(case.context, case.link, case.rtt_ms) for case in cell}) == 1
        assert sorted(case.planner for case in cell) == sorted(planners)
    firsts = [cell[0].planner for cell in cells]
    assert firsts == ["local", "stream", "stream", "optimal", "local", "stream"]


def test_a_local_prefill_is_measured_once_for_all_round_trips() -> None:
    order = bench.schedule([64], [1], ["1", "8"], [10.0, 50.0], ["local", "stream"])
    assert [(case.link, case.rtt_ms) for case in order if case.planner == "local"] == [("1", 10.0), ("8", 10.0)]
    assert len([case for case in order if case.planner == "stream"]) == 4


@pytest.mark.parametrize(("given", "expected"), [("3", [3, 3]), ("3,1", [3, 1])])
def test_repeats_are_one_number_or_one_for_each_context(given: str, expected: list[int]) -> None:
    assert bench.per_context(given, [64, 128]) == expected
    with pytest.raises(typer.BadParameter, match="one for each of 2"):
        bench.per_context("1,2,3", [64, 128])


def test_progressive_is_the_optimal_planner_with_that_codec() -> None:
    assert bench.Case(64, "1", 0.0, "progressive").planned("balanced") == ("optimal", "progressive")
    assert bench.Case(64, "1", 0.0, "stream").planned("balanced") == ("stream", "balanced")


@pytest.fixture(scope="module")
def measured(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[bench.Bench, list[bench.Case]]]:
    """A whole run on a tiny model: local, shaped and recorded links, real sockets, the pictures' file."""
    monkeypatch, tmp_path = pytest.MonkeyPatch(), tmp_path_factory.mktemp("measured")
    monkeypatch.setattr(bench, "CHUNK_TOKENS", 32)
    monkeypatch.setattr(bench, "QUERY_TOKENS", 8)
    monkeypatch.setattr(rounds, "QUIET_SECONDS", 0.3)
    steps = [{"duration_ms": 50, "bandwidth_kbps": rate * 1e3} for rate in [50.0] * 20 + [2.0] * 20]
    (tmp_path / "log.json").write_text(json.dumps(steps))
    ids = torch.randint(1, 256, (1, 128), generator=torch.Generator().manual_seed(0))
    run = bench.Bench(tiny_model("qwen2"), ids, "lossless", tmp_path, tmp_path / "out.json")
    order = bench.schedule([128], [2], ["8"], [2.0], ["local", "stream", "token_split", "optimal", "progressive"])
    order += [bench.Case(128, "log@18", 2.0, "optimal", replan, 0.2) for replan in (True, False)] * 2
    run.run(order)
    yield run, order
    monkeypatch.undo()


def test_a_run_measures_every_case_and_keeps_the_tokens(measured) -> None:
    run, order = measured
    result = json.loads(run.out.read_text())
    assert set(result["rows"]) == {case.key for case in order}
    lossless = [rows for case, rows in result["rows"].items() if "progressive" not in case]
    assert len({row["token"] for rows in lossless for row in rows}) == 1
    for case in result["cases"].values():
        assert case["runs"] == 2 and case["spread"][0] <= case["ttft"] <= case["spread"][1]
    loads = {case: result["rows"][case.key] for case in order if case.planner != "local"}
    assert all(row["report"]["loaded_tokens"] == 128 for rows in loads.values() for row in rows)
    assert all(row["report"]["plans"] == 1 for case, rows in loads.items() if not case.replan for row in rows)
    # Of a recorded link a rate is known, so that the first plan, which is kept, is made with it.
    assert all(
        row["report"]["predicted_seconds"] for case, rows in loads.items() if case.falls_to is not None for row in rows
    )


def test_a_run_ends_with_verdicts_and_counted_round_trips(measured) -> None:
    run, _ = measured
    verdicts = json.loads(run.out.read_text())["verdicts"]
    assert {"S4", "S5", "S7", "S9"} <= set(verdicts)
    assert verdicts["S4"]["optimal"]["cells"] == 1 and list(verdicts["S5"]["links"]) == ["log@18"]
    # Four boundaries are asked for at once, then the deepest one's manifest.
    assert verdicts["S9"] == {
        "hit": {"chunks": 4, "round_trips": 2, "requests": 5},
        "miss": {"chunks": 4, "round_trips": 1, "requests": 4},
        "met": True,
    }


def test_finished_cases_are_not_run_again(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    run, order = measured
    again = bench.Bench(run.model, run.ids, run.codec, run.logs, run.out)
    for method in ("_request", "_count_round_trips"):
        monkeypatch.setattr(again, method, lambda *_: pytest.fail("what was finished was run again"))
    again.run(order)
    assert again.rows == json.loads(run.out.read_text())["rows"]
    monkeypatch.setattr(again, "_request", lambda case, _: {**run.rows[case.key][0], "ttft": 9.0})
    again.run([*order, order[0]])
    assert [row["ttft"] for row in again.rows[order[0].key]][2:] == [9.0]


def test_results_of_other_settings_are_not_mixed(measured) -> None:
    run, _ = measured
    with pytest.raises(typer.BadParameter, match="other settings"):
        bench.Bench(run.model, run.ids.flip(1), run.codec, run.logs, run.out)


def test_both_pictures_are_drawn(measured) -> None:
    run, _ = measured
    surface, timeline = draw(run.out)
    assert surface.stat().st_size > 10_000 and timeline.stat().st_size > 10_000


def test_the_local_case_is_transformers_own_prefill(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    run, order = measured
    used = []
    monkeypatch.setattr(bench, "DynamicCache", lambda **kwargs: used.append(1) or DynamicCache(**kwargs))
    run._request(next(case for case in order if case.planner == "local"), "http://127.0.0.1:9")
    assert used == [1]


def test_recorded_cases_come_in_pairs_where_a_log_has_a_drop(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CHUNK_TOKENS", 32)
    for name, rates in (("falls", [8.0] * 60 + [1.0] * 60), ("steady", [8.0] * 120)):
        steps = [{"duration_ms": 1000, "bandwidth_kbps": rate * 1e3} for rate in rates]
        (tmp_path / f"{name}.json").write_text(json.dumps(steps))
    ids = torch.randint(1, 256, (1, 128), generator=torch.Generator().manual_seed(0))
    run = bench.Bench(tiny_model("qwen2"), ids, "balanced", tmp_path, tmp_path / "out.json")
    monkeypatch.setattr(run, "_compute_seconds", lambda context: np.full(4, 4.0))
    monkeypatch.setattr(bench.kvsched, "publish", lambda *_, **__: type("Report", (), {"bytes_written": 16_000_000}))
    first, second = run.recorded(128)
    assert (first.replan, second.replan) == (True, False) and first.link == second.link
    assert first.link.startswith("falls@") and 50 <= int(first.link.split("@")[1]) < 60
    assert first.falls_to == 0.125
    assert list(run.possible) == [first.link] and run.possible[first.link] > 1.5
