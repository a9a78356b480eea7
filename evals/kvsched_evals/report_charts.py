"""Line charts as SVG inside a page, whose colour of text they take: they can be read in light and in dark."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

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
_LEGEND_COLUMNS = 2
_DECADES = 1e4  # between the ends of a logarithmic axis: over more of them only powers of ten are named
_MARKS = "osD^vPX*<>"
_NAMED = ("dynakv", "static", "local", "quest", "token-topk", "retroinfer", "clusterkv", "sparkv", "oracle")
# matplotlib draws with these, and the page's own take their place.
_PAGE = {"#010203": "currentColor", "#030201": "var(--grid)"}
_TEXT, _GRID = _PAGE
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvsched",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.titlesize": 12,
    "legend.fontsize": 10.5,
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
        places: on the x axis that are named; else round numbers.
        log_y: equal steps are equal factors; only numbers above 0 appear.
        points: no lines between them.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    level: tuple[str, float, float] | None = None
    places: Sequence[float] = ()
    log_y: bool = False
    points: bool = False


def styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each label is drawn, in all charts; where colours come round again the marks are hollow, then others."""
    names = sorted(set(labels), key=lambda one: (_NAMED.index(one) if one in _NAMED else len(_NAMED), one))
    drawn = {}
    for number, name in enumerate(names):
        again, kind = divmod(number, len(_COLOURS))
        colour, mark = _COLOURS[kind], _MARKS[(kind + again // 2) % len(_MARKS)]
        drawn[name] = {"color": colour, "marker": mark, "markerfacecolor": "none" if again % 2 else colour}
    return drawn


def svg(chart: Chart, style: Mapping[str, Mapping[str, Any]]) -> str:
    """The chart as an SVG element, about as wide as a phone."""
    with plt.rc_context(_STYLE):
        rows = math.ceil((len(chart.lines) + (chart.level is not None)) / _LEGEND_COLUMNS)
        figure, axes = plt.subplots(figsize=(4.6, 3.2 + 0.21 * rows), layout="constrained")
        for line in chart.lines:
            axes.errorbar(
                line.x,
                line.y,
                yerr=line.error or None,
                label=line.label,
                **style[line.label],
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
        if chart.log_y:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < _DECADES * low else (1,)))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(FixedLocator(chart.places) if chart.places else MaxNLocator(6))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.grid(linewidth=0.6)
        axes.set(xlabel=chart.x, ylabel=chart.y, title=chart.title)
        figure.legend(loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False, handlelength=1.5)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        plt.close(figure)
    drawn = file.getvalue()
    for colour, page in _PAGE.items():
        drawn = drawn.replace(colour, page)
    return drawn[drawn.index("<svg") :]
