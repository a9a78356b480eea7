"""Line charts as SVG inside a page, whose colour of text they take: they can be read in light and in dark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullFormatter

# Colours that stand out from white as well as from near-black, and marks for those who cannot tell them apart.
_COLOURS = (
    "#2f7de1",
    "#e8862a",
    "#2b9f68",
    "#a068d8",
    "#dc4e48",
    "#a97b49",
    "#d0609a",
    "#1fa0ae",
    "#8f952b",
    "#858b95",
)
_MARKS = "osD^vPX*<>"
_NAMED = ("dynakv", "static", "local", "quest", "token-topk", "retroinfer", "clusterkv", "sparkv", "oracle")
# matplotlib draws with these, and the page's own take their place.
_PAGE = {"#010203": "currentColor", "#030201": "var(--grid)"}
_TEXT, _GRID = _PAGE
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvsched",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "legend.fontsize": 9,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.titlecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Line:
    """Points that belong together; `error` is the half height of a bar at each."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over one axis, and a level that they are compared with.

    Args:
        level: name, height and half height of a dashed line all across.
        log_x, log_y: axes on which equal steps are equal factors; only numbers above 0 appear there.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    level: tuple[str, float, float] | None = None
    log_x: bool = False
    log_y: bool = False
    points: bool = field(default=False, kw_only=True)


def styles(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a mark for each label, the same in all charts that are drawn with the result."""
    names = sorted(set(labels), key=lambda one: (_NAMED.index(one) if one in _NAMED else len(_NAMED), one))
    return {one: (_COLOURS[i % len(_COLOURS)], _MARKS[i % len(_MARKS)]) for i, one in enumerate(names)}


def svg(chart: Chart, style: Mapping[str, tuple[str, str]]) -> str:
    """The chart as an SVG element, about as wide as a phone."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(4.6, 3.6), layout="constrained")
        for line in chart.lines:
            colour, mark = style[line.label]
            axes.errorbar(
                line.x,
                line.y,
                yerr=line.error or None,
                label=line.label,
                color=colour,
                marker=mark,
                markersize=5 if len(line.x) < 20 else 0,
                linestyle="" if chart.points else "-",
                linewidth=1.8,
                elinewidth=1,
                capsize=2,
            )
        if chart.level is not None:
            name, height, half = chart.level
            axes.axhline(height, color=_TEXT, linestyle="--", linewidth=1.2, label=name)
            axes.axhspan(height - half, height + half, color=_GRID, alpha=0.5, linewidth=0)
        if chart.log_x:
            axes.set_xscale("log")
        if chart.log_y:
            axes.set_yscale("log")
        for axis, logarithmic in ((axes.xaxis, chart.log_x), (axes.yaxis, chart.log_y)):
            if logarithmic:
                axis.set_major_formatter(FormatStrFormatter("%g"))
                axis.set_minor_formatter(NullFormatter())
            else:
                axis.set_major_locator(MaxNLocator(6))
        axes.grid(linewidth=0.6)
        axes.set(xlabel=chart.x, ylabel=chart.y, title=chart.title)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=1.6, columnspacing=1.2)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    drawn = file.getvalue()
    for colour, page in _PAGE.items():
        drawn = drawn.replace(colour, page)
    return drawn[drawn.index("<svg") :]
