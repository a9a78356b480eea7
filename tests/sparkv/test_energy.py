from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvsched import SparKVConfig
from kvsched.errors import ConfigError
from kvsched.sparkv import plan
from kvsched.sparkv.energy import EnergyMeter, PowerProfile, objective_of

ROOT = Path(__file__).parents[2]
WATTS = {"device": "A phone", "idle": 1.0, "compute": 5.0, "radios": {"wifi": 0.5}}
SOURCES = {"idle": "a", "compute": "b", "wifi": "c"}
PHONE = PowerProfile("A phone", idle=1.0, compute=5.0, radios={"wifi": 0.5, "lte": 2.0}, sources={})
seconds = st.floats(0, 1e3)


@pytest.mark.parametrize("name", PowerProfile.names())
def test_every_profile_that_comes_along_is_plausible(name: str) -> None:
    profile = PowerProfile.load(name)
    assert profile == PowerProfile.load(ROOT / "configs" / "devices" / f"{name}.yaml")
    assert 0 < profile.idle < profile.compute + profile.idle < 1000
    assert all(0 < watts < profile.compute for watts in profile.radios.values())
    assert all("https://" in source or ".yaml" in source for source in profile.sources.values())


def test_there_are_profiles_for_phones_a_board_a_laptop_and_a_server() -> None:
    assert PowerProfile.names() == ["a100-80gb", "jetson-orin-nano", "msi-x460", "oneplus-9r", "pixel-2-xl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": {"idle": "a", "compute": "b"}}, "no source for wifi"),
        ({"idle": -1.0}, "idle"),
        ({"compute": float("inf")}, "compute"),
        ({"radios": {}}, "radios"),
        ({"radio": {"wifi": 1}}, "radio"),
    ],
)
def test_a_profile_that_cannot_be_right_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "phone.yaml"
    file.write_text(yaml.safe_dump({**WATTS, "sources": SOURCES}))
    assert PowerProfile.load(file).idle == 1.0
    file.write_text(yaml.safe_dump({**WATTS, "sources": SOURCES, **change}))
    with pytest.raises(ConfigError, match=message):
        PowerProfile.load(file)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"a: [", b"- 1"])
def test_what_is_no_profile_is_refused_and_names_are_offered(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="oneplus-9r"):
        PowerProfile.load(tmp_path / "bad.yaml")


def test_joules_are_watts_by_seconds() -> None:
    assert PHONE.joules("lte", compute_seconds=2, stream_seconds=3, total_seconds=4) == 5 * 2 + 2 * 3 + 1 * 4


def test_a_radio_the_device_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no radio '5g': choose one of wifi, lte"):
        PHONE.radio("5g")


@given(seconds, seconds, st.floats(0, 1))
def test_the_objective_mixes_time_and_joules(compute: float, stream: float, weight: float) -> None:
    time = max(compute, stream)
    energy = PHONE.joules("wifi", compute, stream, time) / (PHONE.compute + PHONE.idle)
    cost = PHONE.objective("wifi", weight)(np.array(compute), np.array(stream))
    assert cost == pytest.approx((1 - weight) * time + weight * energy)


@given(seconds, st.floats(0, 1))
def test_a_local_prefill_costs_its_time_at_any_weight(compute: float, weight: float) -> None:
    assert PHONE.objective("wifi", weight)(np.array(compute), np.array(0.0)) == pytest.approx(compute)


def test_a_phone_saves_energy_by_streaming_more() -> None:
    compute = np.arange(25.0) * np.ones((8, 1))
    stream = compute[:, ::-1] * 1.2
    profile = PowerProfile.load("oneplus-9r")
    spent = []
    for weight in (0.0, 0.5, 1.0):
        depths = plan.optimal(compute, stream, profile.objective("wifi", weight))
        computed, streamed = map(float, plan.totals(compute, stream, depths))
        spent.append(profile.joules("wifi", computed, streamed, max(computed, streamed)))
    assert spent[0] > spent[2] and spent[0] >= spent[1] >= spent[2]


def test_the_configuration_names_device_radio_and_weight() -> None:
    assert objective_of(SparKVConfig()) == plan.TIME
    assert objective_of(SparKVConfig(device="oneplus-9r")) == plan.TIME
    lte = SparKVConfig(device="oneplus-9r", radio="lte", energy_weight=1.0)
    assert objective_of(lte) == PowerProfile.load("oneplus-9r").objective("lte", 1.0)


@pytest.mark.parametrize("options", [{"energy_weight": 0.5}, {"energy_weight": 1.5, "device": "oneplus-9r"}])
def test_a_weight_without_a_device_or_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="energy_weight"):
        SparKVConfig(**options)


def zone(folder: Path, name: str, kind: str, microjoules: int, limit: int = 1_000_000) -> Path:
    path = folder / name
    path.mkdir()
    (path / "name").write_text(f"{kind}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{limit}\n")
    return path / "energy_uj"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


@pytest.mark.usefixtures("no_gpu")
def test_processors_are_read_once_each_and_across_a_wrap(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl").mkdir()
    packages = [zone(tmp_path, f"intel-rapl:{n}", f"package-{n}", 900_000) for n in range(2)]
    cores = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    platform = zone(tmp_path, "intel-rapl:2", "psys", 0)
    with EnergyMeter(tmp_path) as meter:
        packages[0].write_text("950000")
        packages[1].write_text("100000")  # started again at 1 J
        cores.write_text("500000")
        platform.write_text("500000")
    assert meter.joules == pytest.approx(0.05 + 0.2)


@pytest.mark.usefixtures("no_gpu")
def test_a_machine_without_counters_measures_nothing(tmp_path: Path) -> None:
    unreadable = tmp_path / "intel-rapl:0"
    unreadable.mkdir()  # reading energy_uj fails, as it does without permission
    with EnergyMeter(tmp_path) as meter:
        assert meter.joules is None
    assert meter.joules is None


def test_gpus_are_read_where_they_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    millijoules = {0: 1000, 1: 5000}

    def energy(handle: int) -> int:
        if handle not in millijoules:
            raise NVMLError("not supported")
        return millijoules[handle]

    fake = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with EnergyMeter(tmp_path) as meter:
        millijoules.update({0: 3500, 1: 5500})
    assert meter.joules == pytest.approx(3.0)
