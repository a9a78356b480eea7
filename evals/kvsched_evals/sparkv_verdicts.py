"""What the rows of a `sparkv_bench` say about the targets S3, S4, S5 and S7."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from kvsched.sparkv.energy import PowerProfile

Row = dict[str, Any]
Rows = dict[str, list[Row]]
Cell = tuple[int, str, float]  # context, link, round trip

BASELINES = ("local", "stream", "token_split")
OURS = ("optimal", "progressive")
NEVER_BEHIND = 1.03
"""Time to first token over the best baseline's, and the inverse for re-planning."""


def verdicts(rows: Rows) -> dict[str, Any]:
    """Everything that the rows so far allow to say; what was not measured is left out."""
    found = {"S3": prediction(rows), "S4": surface(rows), "S5": replanning(rows), "S7": energy(rows)}
    return {target: verdict for target, verdict in found.items() if verdict}


def is_recorded(row: Row) -> bool:
    """Whether a row is of a recorded link."""
    return row["falls_to"] is not None


def prediction(rows: Rows) -> dict[str, Any] | None:
    """S3: |predicted / real - 1| of every load over a shaped link, in all and by planner.

    Recorded links are left out: nobody can predict at a load's begin what they will do.
    """
    loads = [
        (row["planner"], abs(row["report"]["predicted_seconds"] / row["report"]["seconds"] - 1))
        for done in rows.values()
        for row in done
        if not is_recorded(row) and row.get("report", {}).get("predicted_seconds")
    ]
    if not loads:
        return None
    errors: dict[str, list[float]] = {"all": [error for _, error in loads]}
    for planner, error in loads:
        errors.setdefault(planner, []).append(error)
    result: dict[str, Any] = {
        name: {"loads": len(some), "median": statistics.median(some), "p95": percentile(some, 0.95)}
        for name, some in errors.items()
    }
    return {**result, "met": result["all"]["median"] <= 0.10 and result["all"]["p95"] <= 0.20}


def surface(rows: Rows) -> dict[str, Any] | None:
    """S4: how far each of our planners is behind the best baseline at worst, and what it gains at best, over the cells
    in which all baselines were measured; medians of a cell's runs."""
    cells = times(rows)
    result = {}
    for planner in OURS:
        full = {cell: found for cell, found in cells.items() if {planner, *BASELINES} <= set(found)}
        if not full:
            continue
        behind = {cell: found[planner] / min(found[name] for name in BASELINES) for cell, found in full.items()}
        single = {cell: min(found["local"], found["stream"]) / found[planner] for cell, found in full.items()}
        split = {cell: found["token_split"] / found[planner] for cell, found in full.items()}
        result[planner] = {
            "cells": len(full),
            "worst_behind_best": _most(behind),
            "best_over_single_path": _most(single),
            "best_over_token_split": _most(split),
            "median_over_token_split": statistics.median(split.values()),
            "met": {
                "never_behind": max(behind.values()) <= NEVER_BEHIND,
                "over_single_path": max(single.values()) >= 1.6,
                "over_token_split": max(split.values()) >= 1.3,
            },
        }
    return result or None


def replanning(rows: Rows) -> dict[str, Any] | None:
    """S5: time with the first plan kept over time with re-planning, over the recorded links with a drop."""
    links: dict[str, dict[bool, list[Row]]] = {}
    for done in rows.values():
        for row in done:
            if is_recorded(row):
                links.setdefault(row["link"], {}).setdefault(row["replan"], []).append(row)
    ratios = {
        link: {
            "ratio": _ttft(found[False]) / _ttft(found[True]),
            "falls_to": found[True][0]["falls_to"],
            "kept": _ttft(found[False]),
            "replanned": _ttft(found[True]),
        }
        for link, found in links.items()
        if len(found) == 2
    }
    if not ratios:
        return None
    median = statistics.median(one["ratio"] for one in ratios.values())
    worst = min(ratios, key=lambda link: ratios[link]["ratio"])
    return {
        "median": median,
        "worst": {"ratio": ratios[worst]["ratio"], "link": worst},
        "links": ratios,
        "met": median >= 1.2 and ratios[worst]["ratio"] >= 1 / NEVER_BEHIND,
    }


def energy(rows: Rows) -> dict[str, Any] | None:
    """S7: joules of a local prefill over joules of a load in the same cell, by power profile, radio and planner.

    The seconds are this machine's, the watts the profile's: what the request would cost a device that computes as
    fast as this machine and draws what the profile says. Best, median and worst over the cells. `progressive` is left
    out: its radio is still at work after the first token.
    """
    result: dict[str, Any] = {}
    for name in PowerProfile.names():
        profile = PowerProfile.load(name)
        for radio in profile.radios:
            cells = times(rows, partial(joules, profile=profile, radio=radio))
            for planner in sorted(
                {planner for found in cells.values() for planner in found} - {"local", "progressive"}
            ):
                pairs = {
                    cell: (found["local"], found[planner])
                    for cell, found in cells.items()
                    if {planner, "local"} <= set(found)
                }
                if pairs:
                    gains = {cell: local / loaded for cell, (local, loaded) in pairs.items()}
                    result.setdefault(f"{name}, {radio}", {})[planner] = {
                        "best": _most(gains),
                        "median": statistics.median(gains.values()),
                        "worst": min(gains.values()),
                        "joules_local_and_loaded": {_name(cell): pair for cell, pair in pairs.items()},
                    }
    ours = [found["optimal"]["best"]["ratio"] for found in result.values() if "optimal" in found]
    return {**result, "met": min(ours) >= 1.5} if ours else None


def joules(row: Row, profile: PowerProfile, radio: str) -> float:
    """What one request costs by a power profile: computing, receiving, and being on until the first token."""
    if row["planner"] == "local":
        return profile.joules(radio, row["ttft"], 0.0, row["ttft"])
    report = row["report"]
    return profile.joules(radio, report["compute_seconds"], report["stream_seconds"], row["ttft"])


def times(rows: Rows, of: Callable[[Row], float] = lambda row: float(row["ttft"])) -> dict[Cell, dict[str, float]]:
    """For each cell of shaped links each planner's median of `of`; a local prefill counts for every round trip."""
    cells: dict[Cell, dict[str, float]] = {}
    for done in rows.values():
        if done and not is_recorded(done[0]):
            row = done[0]
            cell = (row["context"], row["link"], row["rtt_ms"])
            cells.setdefault(cell, {})[row["planner"]] = statistics.median(of(one) for one in done)
    local = {(context, link): found["local"] for (context, link, _), found in cells.items() if "local" in found}
    for (context, link, _), found in cells.items():
        if (context, link) in local:
            found.setdefault("local", local[context, link])
    return cells


def percentile(numbers: Iterable[float], share: float) -> float:
    """The smallest of `numbers` that at least `share` of them do not exceed."""
    ordered = sorted(numbers)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _most(ratios: dict[Cell, float]) -> dict[str, Any]:
    cell = max(ratios, key=lambda cell: ratios[cell])
    return {"ratio": ratios[cell], "cell": _name(cell)}


def _name(cell: Cell) -> str:
    return f"{cell[0]} tokens, {cell[1]} Mbit/s, {cell[2]:g} ms"


def _ttft(done: list[Row]) -> float:
    return statistics.median(row["ttft"] for row in done)
