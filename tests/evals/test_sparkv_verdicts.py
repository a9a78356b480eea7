from __future__ import annotations

from typing import Any

import pytest

from kvsched.sparkv.energy import PowerProfile
from kvsched_evals import sparkv_verdicts as verdicts

Rows = dict[str, list[dict[str, Any]]]


def rows(*cases: dict[str, Any]) -> Rows:
    """One run for each case; what a case does not say is the same for all."""
    common = {"context": 2048, "link": "4", "rtt_ms": 10.0, "planner": "optimal", "replan": True, "falls_to": None}
    return {str(index): [{**common, **case}] for index, case in enumerate(cases)}


def load(predicted: float | None, seconds: float, **more: Any) -> dict[str, Any]:
    return {"ttft": seconds, "report": {"predicted_seconds": predicted, "seconds": seconds}, **more}


def test_nothing_measured_says_nothing() -> None:
    assert verdicts.verdicts({}) == {}


def test_prediction_counts_every_load_over_a_shaped_link() -> None:
    found = verdicts.prediction(
        rows(
            load(11.0, 10.0),
            load(8.0, 10.0, planner="stream"),
            load(None, 10.0),
            load(30.0, 10.0, link="log@3", falls_to=0.3),
            {"planner": "local", "ttft": 10.0},
        )
    )
    assert found is not None and found["all"] == {"loads": 2, "median": pytest.approx(0.15), "p95": pytest.approx(0.2)}
    assert found["stream"]["median"] == pytest.approx(0.2) and not found["met"]
    assert verdicts.prediction(rows(load(10.5, 10.0)))["met"]


def cell(link: str, **ttft: float) -> list[dict[str, Any]]:
    return [{"link": link, "planner": planner, "ttft": seconds} for planner, seconds in ttft.items()]


def test_the_surface_names_the_worst_and_the_best_cells() -> None:
    found = verdicts.surface(
        rows(
            *cell("1", local=10.0, stream=40.0, token_split=9.0, optimal=9.9),
            *cell("4", local=10.0, stream=12.0, token_split=8.0, optimal=5.0, progressive=4.0),
            *cell("64", local=10.0, stream=2.0, optimal=1.0),
        )
    )
    assert found is not None
    optimal = found["optimal"]
    assert optimal["cells"] == 2, "a cell without all baselines does not count"
    assert optimal["worst_behind_best"] == {"ratio": pytest.approx(1.1), "cell": "2048 tokens, 1 Mbit/s, 10 ms"}
    assert optimal["best_over_single_path"]["ratio"] == 2.0
    assert optimal["best_over_token_split"] == {"ratio": 1.6, "cell": "2048 tokens, 4 Mbit/s, 10 ms"}
    assert optimal["met"] == {"never_behind": False, "over_single_path": True, "over_token_split": True}
    assert found["progressive"]["best_over_single_path"]["ratio"] == 2.5


def test_a_local_prefill_counts_for_every_round_trip() -> None:
    measured = rows(
        *cell("4", local=10.0, stream=12.0, token_split=8.0, optimal=5.0),
        *({**case, "rtt_ms": 50.0} for case in cell("4", stream=14.0, token_split=9.0, optimal=4.0)),
        *({**case, "rtt_ms": 50.0} for case in cell("8", stream=7.0, token_split=7.0, optimal=6.0)),
    )
    found = verdicts.surface(measured)["optimal"]
    assert found["cells"] == 2 and found["best_over_single_path"] == {
        "ratio": 2.5,
        "cell": "2048 tokens, 4 Mbit/s, 50 ms",
    }


def test_the_surface_is_of_medians() -> None:
    measured = rows(*cell("4", local=10.0, stream=12.0, token_split=8.0, optimal=5.0))
    for ttft in (5.2, 50.0):
        measured["3"].append({**measured["3"][0], "ttft": ttft})
    assert verdicts.surface(measured)["optimal"]["best_over_single_path"]["ratio"] == pytest.approx(10 / 5.2)


def recorded(link: str, replanned: float, kept: float) -> list[dict[str, Any]]:
    return [
        {"link": link, "falls_to": 0.4, "replan": replan, "ttft": ttft}
        for replan, ttft in ((True, replanned), (False, kept))
    ]


def test_replanning_is_the_median_over_the_links_and_the_worst() -> None:
    measured = rows(*recorded("a@1", 10, 15), *recorded("b@1", 10, 13), *recorded("c@1", 10, 9.6))
    measured["half"] = rows(*recorded("d@1", 10, 99))["0"]  # still to be measured without re-planning
    found = verdicts.replanning(measured)
    assert found is not None and found["median"] == 1.3 and set(found["links"]) == {"a@1", "b@1", "c@1"}
    assert found["worst"] == {"ratio": 0.96, "link": "c@1"} and not found["met"]
    assert verdicts.replanning(rows(*recorded("a@1", 10, 15)))["met"]


def test_energy_is_reckoned_by_every_profile_and_radio() -> None:
    report = {"compute_seconds": 3.5, "stream_seconds": 3.5, "predicted_seconds": None, "seconds": 4.0}
    local = {"planner": "local", "ttft": 10.0}
    loaded = {"planner": "optimal", "ttft": 4.0, "report": report}
    found = verdicts.energy(rows(local, loaded, {**loaded, "planner": "progressive"}))
    assert found is not None
    profiles = {name: PowerProfile.load(name) for name in PowerProfile.names()}
    assert set(found) == {"met"} | {f"{name}, {radio}" for name, one in profiles.items() for radio in one.radios}
    phone = profiles["oneplus-9r"]
    expected = (phone.compute + phone.idle) * 10 / (phone.compute * 3.5 + phone.radios["lte"] * 3.5 + phone.idle * 4)
    one = found["oneplus-9r, lte"]["optimal"]
    assert one["best"]["ratio"] == one["median"] == one["worst"] == pytest.approx(expected)
    assert found["met"] and set(found["oneplus-9r, lte"]) == {"optimal"}


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2), (0.95, 4), (0.0, 1), (0.25, 1), (0.26, 2)])
def test_a_percentile_is_one_of_the_numbers(share: float, expected: int) -> None:
    assert verdicts.percentile([3, 1, 4, 2], share) == expected
