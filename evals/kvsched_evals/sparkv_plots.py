"""Pictures of a `sparkv_bench` result: the surface of all links and contexts, and the timeline of one load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {
    "local": "local prefill",
    "stream": "stream all",
    "token_split": "token split (Strong Hybrid)",
    "layer_split": "layer split",
    "greedy": "greedy (paper)",
    "optimal": "kvsched",
}


def draw(result: Path) -> list[Path]:
    """Draw both pictures beside the JSON file `result`; the paths written."""
    measured = json.loads(result.read_text())
    written = []
    for name, figure in (("surface", surface(measured)), ("timeline", timeline(measured))):
        if figure is not None:
            written.append(result.with_name(f"{result.stem}-{name}.png"))
            figure.savefig(written[-1], dpi=120, bbox_inches="tight")
            plt.close(figure)
    return written


def surface(measured: dict[str, Any]) -> Any:
    """Time to first token against the link's rate, a panel for each context and round trip, a line for each planner."""
    cases = [case for case in measured["summary"]["cases"].values() if "@" not in case["link"]]
    shaped = [case for case in cases if case["link"] != "none"]
    if not shaped:
        return None
    contexts, rtts = (sorted({case[name] for case in shaped}) for name in ("context", "rtt_ms"))
    figure, axes = plt.subplots(
        len(contexts), len(rtts), figsize=(4.5 * len(rtts), 3.5 * len(contexts)), squeeze=False, sharex=True
    )
    for row, context in enumerate(contexts):
        for column, rtt in enumerate(rtts):
            panel = axes[row][column]
            for case in cases:
                if case["planner"] == "local" and case["context"] == context:
                    panel.axhline(case["ttft"], color="gray", linestyle="--", label=NAMES["local"])
            here = [case for case in shaped if (case["context"], case["rtt_ms"]) == (context, rtt)]
            for planner in [name for name in NAMES if any(case["planner"] == name for case in here)]:
                line = sorted((float(case["link"]), case["ttft"]) for case in here if case["planner"] == planner)
                panel.plot(*zip(*line, strict=True), marker="o", label=NAMES[planner])
            panel.set(xscale="log", yscale="log", title=f"{context} tokens, {rtt:g} ms round trip")
            panel.set(xlabel="link, Mbit/s", ylabel="time to first token, s")
            panel.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    return figure


def timeline(measured: dict[str, Any]) -> Any:
    """Which layer of which chunk came into place when, in the load that divided its work most evenly."""
    loads = [
        (row, row["report"])
        for done in measured["rows"].values()
        for row in done
        if row["planner"] == "optimal" and row.get("report", {}).get("timeline")
    ]
    if not loads:
        return None

    def evenness(load: tuple[dict[str, Any], dict[str, Any]]) -> float:
        routes = [arrival[3] for arrival in load[1]["timeline"]]
        return min(routes.count("computed"), routes.count("streamed")) / len(routes)

    row, report = max(loads, key=evenness)
    figure, panel = plt.subplots(figsize=(7, 4))
    layers = 1 + max(arrival[2] for arrival in report["timeline"])
    for route, colour in (("computed", "tab:blue"), ("streamed", "tab:orange")):
        arrivals = [arrival for arrival in report["timeline"] if arrival[3] == route]
        places = [arrival[1] + arrival[2] / layers for arrival in arrivals]
        panel.scatter([arrival[0] for arrival in arrivals], places, s=6, color=colour, label=route)
    panel.set(xlabel="seconds", ylabel="token chunk (and layer within it)")
    panel.set_title(f"{row['context']} tokens, link {row['link']} Mbit/s: {row['ttft']:.1f} s to the first token")
    panel.legend()
    panel.grid(alpha=0.3)
    return figure
