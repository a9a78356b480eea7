"""Pictures of a `dynakv_bench` result: latency, what is read, recall, and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES: dict[str, dict[str, Any]] = {
    "dynakv": {"color": "tab:blue", "marker": "o", "linewidth": 2.5},
    "static": {"color": "tab:orange", "marker": "v"},
    "local": {"color": "tab:green", "marker": "s"},
    "token-topk": {"color": "tab:red", "marker": "x"},
    "dynamic": {"color": "black", "marker": "D", "linestyle": "--"},
}


def draw(result: Path) -> list[Path]:
    """Draw what the JSON file `result` holds, beside it; the paths written."""
    measured = json.loads(result.read_text())
    written = []
    for name, figure in (("latency", latency), ("reads", reads), ("recall", recall), ("memory", memory)):
        if (drawn := figure(measured)) is not None:
            written.append(result.with_name(f"{result.stem}-{name}.png"))
            drawn.savefig(written[-1], dpi=120, bbox_inches="tight")
            plt.close(drawn)
    return written


def latency(measured: dict[str, Any]) -> Any:
    """Milliseconds a step against context: of a layer with KV on flash, and of the whole model with all in DRAM."""
    if "steps" not in measured:
        return None
    figure, (path, whole) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    _lines(path, measured["steps"], lambda row: 1e3 * row["seconds"] / row["layers"])
    path.set(ylabel="ms a step and layer", title="cache path, KV on flash")
    for context, row in measured.get("model", {}).items():
        for name, seconds in row["median_seconds"].items():
            whole.plot(int(context), 1e3 * seconds, **STYLES[name], label=name)
    whole.set(xlabel="context, tokens", ylabel="ms a step, median", title="model, all in DRAM", xscale="log")
    labels = dict(zip(*reversed(whole.get_legend_handles_labels()), strict=True))
    whole.legend(labels.values(), labels.keys())
    whole.grid(alpha=0.3)
    return figure


def reads(measured: dict[str, Any]) -> Any:
    """Bytes read a step, entries a read, and hit rate against context."""
    if "steps" not in measured:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    _lines(axes[0], measured["steps"], lambda row: row["bytes_read"] / row["layers"] / 1e3)
    axes[0].set(ylabel="KB read a step and layer")
    _lines(axes[1], measured["steps"], lambda row: row["entries_a_read"])
    axes[1].set(ylabel="entries a read")
    _lines(axes[2], measured["steps"], lambda row: row["hit_rate"])
    axes[2].set(ylabel="clusters found in DRAM, share")
    return figure


def recall(measured: dict[str, Any]) -> Any:
    """Attention mass recalled against budget by policy, and against the size of DynaKV's index."""
    if "quality" not in measured:
        return None
    figure, (budgets, sizes) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for policy, rows in measured["quality"]["budgets"].items():
        budgets.plot([int(b) for b in rows], [row["recall"] for row in rows.values()], **STYLES[policy], label=policy)
    exact = measured["quality"]["budgets"]["dynakv"]
    budgets.plot([int(b) for b in exact], [row["oracle_recall"] for row in exact.values()], "k--", label="exact top-k")
    budgets.set(xlabel="budget, tokens", ylabel="attention mass recalled", xscale="log")
    budgets.legend()
    rows = measured["quality"]["cluster_sizes"].values()
    sizes.plot([100 * row["index_share"] for row in rows], [row["share_of_exact"] for row in rows], **STYLES["dynakv"])
    sizes.set(xlabel="index, % of the KV bytes", ylabel="recall, share of exact top-k")
    for axis in (budgets, sizes):
        axis.grid(alpha=0.3)
    return figure


def memory(measured: dict[str, Any]) -> Any:
    """DRAM over the tokens decoded."""
    if "memory" not in measured:
        return None
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    tokens, rss, counted = zip(*measured["memory"]["samples"], strict=True)
    axis.plot(tokens, [size / 2**20 for size in rss], label="process, above its start")
    axis.plot(tokens, [size / 2**20 for size in counted], label="counted by the cache")
    axis.axhline(measured["memory"]["dram"] / 2**20, color="black", linestyle=":", label="budget")
    axis.set(xlabel="tokens", ylabel="MiB", ylim=(0, None))
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


def _lines(axis: Any, steps: dict[str, Any], value: Any) -> None:
    for policy, style in STYLES.items():
        points = [(int(c), value(row["policies"][policy])) for c, row in steps.items() if policy in row["policies"]]
        if points:
            axis.plot(*zip(*points, strict=True), **style, label=policy)
    axis.set(xlabel="context, tokens", xscale="log")
    axis.legend()
    axis.grid(alpha=0.3)
