"""Pictures of a `sparkv_bench` result: the surface of all links and contexts, and the timeline of one load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("local prefill", {"color": "black", "linestyle": "--"}),
    "stream": ("stream all", {"color": "tab:orange", "marker": "v"}),
    "token_split": ("token split (Strong Hybrid)", {"color": "tab:green", "marker": "s"}),
    "layer_split": ("layer split", {"color": "tab:brown", "marker": "D"}),
    "greedy": ("greedy (paper)", {"color": "tab:purple", "marker": "^"}),
    "optimal": ("kvsched", {"color": "tab:blue", "marker": "o", "linewidth": 2.5}),
    "progressive": ("kvsched, progressive", {"color": "tab:red", "marker": "o", "linewidth": 2.5}),
}
ROUTES = {"computed": "tab:blue", "streamed": "tab:orange"}


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
    """Time to first token against the link's rate: a panel for each context and round trip, a line for each planner.

    A shade spans the slowest and the fastest run of each case.
    """
    cases = [case for case in measured["cases"].values() if "@" not in case["link"]]
    cells = sorted({(case["context"], case["rtt_ms"]) for case in cases if case["planner"] != "local"})
    if not cells:
        return None
    columns = min(2, len(cells))
    rows = -(-len(cells) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False, sharex=True)
    rates = sorted({float(case["link"]) for case in cases})
    lines: dict[str, Any] = {}
    for panel in axes.flat[len(cells) :]:
        panel.axis("off")
    for panel, (context, rtt) in zip(axes.flat, cells, strict=False):
        here = [
            case
            for case in cases
            if case["context"] == context and (case["rtt_ms"] == rtt or case["planner"] == "local")
        ]
        for planner, (label, style) in LINES.items():
            points = sorted(
                (float(one["link"]), one["ttft"], *one["spread"]) for one in here if one["planner"] == planner
            )
            if points:
                mbit, median, fastest, slowest = zip(*points, strict=True)
                (lines[label],) = panel.plot(mbit, median, markersize=4, **style)
                panel.fill_between(mbit, fastest, slowest, color=style["color"], alpha=0.15, linewidth=0)
        panel.set(xscale="log", yscale="log", title=f"{context} tokens, {rtt:g} ms round trip")
        panel.set(xlabel="link, Mbit/s", ylabel="time to first token, s")
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
        panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        panel.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        panel.minorticks_off()
        panel.tick_params(labelbottom=True)
        panel.grid(alpha=0.3)
    shown = [(lines[label], label) for label, _ in LINES.values() if label in lines]
    handles, labels = zip(*shown, strict=True)
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=min(len(labels), 4))
    figure.tight_layout()
    return figure


def timeline(measured: dict[str, Any]) -> Any:
    """What was computed and streamed when, in the load of each of our planners that both paths shared most evenly.

    Left, when each layer of each chunk came into place; right, by which route.
    """
    loads = list(measured["timelines"].values())
    if not loads:
        return None
    figure, axes = plt.subplots(
        len(loads), 2, figsize=(11, 4.2 * len(loads)), squeeze=False, width_ratios=(1.7, 1), layout="constrained"
    )
    for load, (when, where) in zip(loads, axes, strict=True):
        arrivals = [line.split() for line in load["arrivals"]]
        seconds = np.array([float(arrival[0]) for arrival in arrivals])
        chunk, layer = (np.array([int(arrival[at]) for arrival in arrivals]) for at in (1, 2))
        routes = np.array([arrival[3] for arrival in arrivals])
        layers = 1 + layer.max()
        staircase = np.full((layers, 1 + chunk.max()), np.nan)
        for index, (route, colour) in enumerate(ROUTES.items()):
            of = routes == route
            when.scatter(seconds[of], chunk[of] + layer[of] / layers, s=7, color=colour, linewidths=0, label=route)
            staircase[layer[of], chunk[of]] = index
        when.axvline(load["ttft"], color="black", linestyle=":", label="first token")
        when.set(xlabel="seconds since the load began", ylabel="token chunk, its layers from bottom to top")
        link = f"{load['link']} Mbit/s, {load['rtt_ms']:g} ms round trip"
        when.set_title(f"{LINES[load['planner']][0]}: {load['context']} tokens, {link}")
        when.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1))
        when.grid(alpha=0.3)
        when.legend(loc="center left", framealpha=1)
        where.imshow(
            staircase,
            origin="lower",
            aspect="auto",
            cmap=matplotlib.colors.ListedColormap(list(ROUTES.values())),
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        where.set(xlabel="token chunk", ylabel="layer", title="by which route it came")
        where.legend(
            handles=[
                Line2D([], [], marker="s", linestyle="", color=colour, label=route) for route, colour in ROUTES.items()
            ],
            loc="upper right",
        )
    return figure
