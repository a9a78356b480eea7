"""Joules: what a load costs a device by its power profile, and what the machine's own counters measured."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ..config import SparKVConfig
from ..errors import ConfigError
from .plan import TIME, Objective

DEVICES = Path(__file__).parent / "devices"

Watts = Annotated[float, Field(ge=0, le=1e5, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class PowerProfile:
    """What a device draws, in watts: idle, and on top of that while it computes and while it receives.

    Args:
        device: what it is.
        idle: with nothing to do, screen on where it has one.
        compute: above idle, while it prefills.
        radios: above idle, while it receives, by the name of the radio ("wifi", "lte").
        sources: for `idle`, `compute` and each radio, where the figure was published and how it was worked out.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # a misspelt figure must not count as none

    device: Text
    idle: Watts
    compute: Watts
    radios: Annotated[dict[str, Watts], Field(min_length=1)]
    sources: dict[str, Text]

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> PowerProfile:
        """A profile by the name of one that comes with kvsched (`PowerProfile.names()`), or by the path of a YAML file.

        Raises:
            ConfigError: there is none, or it is invalid, or a figure's source is not stated.
        """
        path = DEVICES / f"{name}.yaml" if name in cls.names() else Path(name)
        try:
            profile = _PROFILE.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(
                f"cannot read a power profile from {path}: {error}. Give a YAML file, or one of {cls.names()}."
            ) from error
        unsourced = {"idle", "compute", *profile.radios} - set(profile.sources)
        if unsourced:
            raise ConfigError(f"{path} states no source for {', '.join(sorted(unsourced))}.")
        return profile

    @staticmethod
    def names() -> list[str]:
        """Names of the profiles that come with kvsched."""
        return sorted(path.stem for path in DEVICES.glob("*.yaml"))

    def radio(self, name: str) -> float:
        """Watts above idle of the radio `name`.

        Raises:
            ConfigError: the device has none of that name.
        """
        if name not in self.radios:
            raise ConfigError(f"{self.device} has no radio {name!r}: choose one of {', '.join(self.radios)}.")
        return self.radios[name]

    def joules(self, radio: str, compute_seconds: float, stream_seconds: float, total_seconds: float) -> float:
        """Energy of a load that computed and received for so many of its `total_seconds`."""
        return self.compute * compute_seconds + self.radio(radio) * stream_seconds + self.idle * total_seconds

    def objective(self, radio: str, energy_weight: float) -> Objective:
        """Time where `energy_weight` is 0, energy where it is 1, and a weighted sum of both between.

        The cost is in seconds: a joule counts as the time in which the device would have used it computing, so that
        time and energy of a local prefill weigh the same.
        """
        share = energy_weight / ((self.compute + self.idle) or 1.0)
        return Objective(self.compute * share, self.radio(radio) * share, 1 - energy_weight + self.idle * share)


_PROFILE = TypeAdapter(PowerProfile)


def objective_of(config: SparKVConfig) -> Objective:
    """What `config` asks the planner to minimise.

    Raises:
        ConfigError: its device has no valid profile, or not that radio.
    """
    if config.device is None:
        return TIME
    return PowerProfile.load(config.device).objective(config.radio, config.energy_weight)


class EnergyMeter:
    """Joules that the machine's own counters saw in a `with` block: processors (RAPL) and NVIDIA GPUs (NVML).

    Everything that runs on them is counted, other people's work included. A processor's counter starts again at a limit
    (minutes to hours away): one such wrap is seen, a second in the same block is not.

    ```python
    with EnergyMeter() as meter:
        model.generate(...)
    print(meter.joules)
    ```

    Args:
        powercap: Linux' folder of power zones; reading them takes root on most systems.

    Attributes:
        joules: measured by the block; `None` before its end, and where the machine has no counter that may be read.
    """

    def __init__(self, powercap: Path = Path("/sys/class/powercap")) -> None:
        self.powercap = powercap
        self.joules: float | None = None
        self._counters: list[_Counter] = []
        self._before: list[float] = []

    def __enter__(self) -> EnergyMeter:
        self.joules = None
        self._counters = [*_processors(self.powercap), *_gpus()]
        self._before = [counter.read() for counter in self._counters]
        return self

    def __exit__(self, *exception: object) -> None:
        used = [
            (counter.read() - before) % counter.limit
            for counter, before in zip(self._counters, self._before, strict=True)
        ]
        self.joules = sum(used) if used else None


@dataclass(frozen=True)
class _Counter:
    """Joules since some moment in the past, starting again at `limit`."""

    read: Callable[[], float]
    limit: float


def _processors(powercap: Path) -> list[_Counter]:
    """RAPL's package zones; their subzones (cores, memory) are part of them."""
    counters = []
    for zone in sorted(powercap.glob("*-rapl:*")):
        try:
            (zone / "energy_uj").read_text()
            is_package = (zone / "name").read_text().startswith("package")
            limit = _microjoules(zone / "max_energy_range_uj")
        except OSError:
            continue  # not a zone, or not ours to read
        if is_package:
            counters.append(_Counter(partial(_microjoules, zone / "energy_uj"), limit))
    return counters


def _microjoules(file: Path) -> float:
    return int(file.read_text()) * 1e-6


def _gpus() -> list[_Counter]:
    """Every NVIDIA GPU of the machine, where nvidia-ml-py (`pip install 'kvsched[energy]'`) and a driver are there."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, no device: then there is nothing to read
        return []
    counters = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)

        def read(handle: Any = handle) -> float:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1e-3

        with contextlib.suppress(pynvml.NVMLError):  # cards before Volta do not count
            read()
            counters.append(_Counter(read, math.inf))
    return counters
