from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import typer

from kvsched.sparkv.serve import running
from kvsched_evals.recorded import Recording


def recording(*rates: float, seconds: float = 1.0) -> Recording:
    return Recording(np.full(len(rates), seconds), np.array(rates))


def test_a_recorded_link_is_read_in_seconds_and_mbit(tmp_path: Path) -> None:
    steps = [{"duration_ms": 50, "bandwidth_kbps": rate, "latency_ms": 20} for rate in (8000, 4500)]
    (tmp_path / "log.json").write_text(json.dumps(steps))
    found = Recording.read(tmp_path / "log.json")
    assert found.seconds.tolist() == [0.05, 0.05] and found.mbit.tolist() == [8.0, 4.5]


@pytest.mark.parametrize(
    "text", ["{}", "[]", "[1]", '[{"duration_ms": 1}]', "no json", '[{"duration_ms": 1, "bandwidth_kbps": -1}]']
)
def test_a_file_that_is_no_recorded_link_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "log.json").write_text(text)
    with pytest.raises(typer.BadParameter, match=r"log\.json"):
        Recording.read(tmp_path / "log.json")


def test_means_weigh_steps_by_their_length() -> None:
    log = Recording(np.array([1.0, 3.0]), np.array([8.0, 4.0]))
    assert log.mean(0, 4) == pytest.approx(5.0)
    assert log.mean(0.5, 1.5) == pytest.approx(6.0)
    assert log.mean(-2, 0) == pytest.approx(8.0) and log.mean(4, 6) == pytest.approx(4.0)
    assert log.known(1) == pytest.approx(8.0)


def test_a_load_is_begun_a_quarter_of_its_time_before_the_steepest_drop() -> None:
    log = recording(*[20.0] * 30, *[15.0] * 30, *[2.0] * 30)
    # At 15 Mbit/s both paths together take 16 s, so the load begins 4 s before the drop.
    assert log.before_drop(compute_seconds=32.0, megabits=480.0) == (56, pytest.approx(2 / 15))
    assert recording(*[20.0] * 90).before_drop(32.0, 480.0) is None
    for fallen in (9.0, 0.0):  # a load that begins later finds the drop behind it, however deep it is for a while
        log = recording(*[20.0] * 40, fallen, *[0.1] * 3, *[20.0] * 60)
        found = log.before_drop(8.0, 160.0)  # four seconds
        assert found is not None and found[0] < 40
    assert recording(*[20.0] * 5, 1.0).before_drop(32.0, 480.0) is None, "the log is shorter than the load"


def test_a_drop_of_a_link_that_hardly_matters_is_passed_over() -> None:
    log = recording(*[1.0] * 60, *[0.1] * 60)
    assert log.before_drop(compute_seconds=32.0, megabits=480.0) is None
    assert log.before_drop(compute_seconds=32.0, megabits=48.0) is not None


def test_a_replayed_link_follows_the_log_and_keeps_its_last_rate(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100_000))  # 0.8 Mbit
    log = recording(0.1, 0.8, 1000.0, seconds=0.4)
    with running(tmp_path) as server, log.replayed(1, server, rtt_ms=0.0) as url:
        begin = time.monotonic()
        with urllib.request.urlopen(f"{url}/file", timeout=30) as response:
            assert len(response.read()) == 100_000
        assert 0.35 < time.monotonic() - begin < 0.9


def test_no_plan_gains_more_than_one_that_knows_the_log() -> None:
    chunks = np.full(4, 8.0)  # 32 s to compute, 480 megabits to stream
    steady = recording(*[15.0] * 90)
    assert steady.possible_gain(0, chunks, 480.0) == pytest.approx(1.0, abs=0.01)
    # The plan for 15 Mbit/s computes half and streams half in 16 s. The link stops after 8 s with 120 megabits owed,
    # which take another 8 s to compute, or wait for it to come back after 40 s.
    stops = recording(*[15.0] * 48, *[0.0] * 40, *[15.0] * 90)
    assert stops.possible_gain(40, chunks, 480.0) == pytest.approx(56 / 24, rel=0.01)
