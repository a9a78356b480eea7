"""Which of DynaKV's targets a `dynakv_bench` result meets, with the figures. Sections not yet measured are left out."""

from __future__ import annotations

import statistics
from typing import Any

OVER = {"static": 1.47, "local": 1.31, "token-topk": 2.0}
"""D4: how many times DynaKV's step each policy's should take."""


def verdicts(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each target whether it is `met`, what was `measured` as a sentence, and the `figures`."""
    found: dict[str, dict[str, Any]] = {}
    if "quality" in result:
        found |= _quality(result["quality"])
    if "steps" in result:
        found |= _steps(result["steps"])
    if "memory" in result:
        found["D5"] = _memory(result["memory"])
    if "storage" in result:
        found |= _storage(result["storage"])
    if "model" in result:
        found["D8"] = _model(result["model"])
    if "storage" in result and "D6" in found:
        sizes = result["storage"]["cluster_sizes"]
        found["D6"]["figures"]["cluster_sizes"] = sizes
        longest = max(sizes, key=float)
        found["D6"]["measured"] += (
            f"; clusters of {float(longest):.0f} would have {sizes[longest]['entries_a_read']:.1f} entries a read and "
            f"{sizes[longest]['bytes_read_over_missing']:.2f}x the bytes"
        )
    return dict(sorted(found.items()))


def _verdict(met: bool, measured: str, **figures: Any) -> dict[str, Any]:
    return {"met": met, "measured": measured, "figures": figures}


def _quality(quality: dict[str, Any]) -> dict[str, dict[str, Any]]:
    of = quality["every_layer"]
    ours, static, local = of["dynakv"], of["static"], of["local"]
    over_static, over_local = (ours["recall"] / other["recall"] for other in (static, local))
    share, worst, index = ours["share_of_exact"], ours["worst_head"], ours["index_share"]
    error = ours["error_estimated"] / ours["error"]
    flash = quality["on_flash"]["share_of_exact"]
    return {
        "D2": _verdict(
            min(share, flash) >= 0.97 and over_static >= 1.25 and over_local >= 1 and worst >= 0.93 and index <= 0.08,
            f"{share:.3f} of exact top-k ({flash:.3f} from flash), worst head {worst:.3f}, {over_static:.2f}x static, "
            f"{over_local:.3f}x local, index {index:.1%} of the KV bytes",
        ),
        "D3": _verdict(error <= 0.5, f"the estimate leaves {error:.2f} of the error", error_with_over_without=error),
    }


def _steps(steps: dict[str, Any]) -> dict[str, dict[str, Any]]:
    ratios: dict[str, dict[str, float]] = {}
    for context, row in steps.items():
        seconds = {name: one["seconds"] / one["layers"] for name, one in row["policies"].items()}
        ratios[context] = {name: seconds[name] / seconds["dynakv"] for name in OVER}
    worst = {name: min(ratio[name] for ratio in ratios.values()) for name in OVER}
    ours = [row["policies"]["dynakv"] for row in steps.values()]
    entries, over = min(one["entries_a_read"] for one in ours), max(one["bytes_over_missing"] for one in ours)
    kernel = [row["kernel_bytes_over_bytes_read"] for row in steps.values()]
    cold = all(row["page_cache_bypassed"] for row in steps.values()) and min(kernel) >= 0.99
    return {
        "D4": _verdict(
            cold and all(worst[name] >= OVER[name] for name in OVER),
            "a step of the cache path, by each other policy over DynaKV's: "
            + "; ".join(f"{c}: " + ", ".join(f"{n} {r:.2f}x" for n, r in ratio.items()) for c, ratio in ratios.items()),
            cold_page_cache=cold,
            ratios=ratios,
        ),
        "D6": _verdict(
            entries >= 40 and over <= 1.15,
            f"at least {entries:.1f} entries a read, at most {over:.2f}x the bytes missing",
        ),
    }


def _memory(memory: dict[str, Any]) -> dict[str, Any]:
    most = max(rss for _, rss, _ in memory["samples"]) / memory["dram"]
    return _verdict(most <= 1.05, f"resident memory grew to {most:.2f}x the DRAM budget", rss_over_budget=most)


def _storage(storage: dict[str, Any]) -> dict[str, dict[str, Any]]:
    moved = storage["moved"]["packed_over_pools"]
    margins = {}
    for share, row in storage["dram"].items():
        ours, *others = (
            row["hit_rate"][name] for name in ("cluster_aligned", "least_recently_used", "least_frequently_used")
        )
        margins[share] = ours - max(others)
    least = min(margins.values())
    return {
        "D7": _verdict(moved >= 1000, f"packing clusters moves {moved:.0f}x the bytes"),
        "D9": _verdict(least > 0, f"hit rate above LRU and LFU by {least:.3f} or more", margins=margins),
    }


def _model(model: dict[str, Any]) -> dict[str, Any]:
    ratio = {int(context): row["dynakv_over_dynamic"] for context, row in model.items()}
    seconds = {int(context): row["median_seconds"]["dynakv"] for context, row in model.items()}
    growth = seconds[max(seconds)] / seconds[min(seconds)]
    bounds = {4096: 1.1, 8192: 1.0, 16384: 1.0, 32768: 0.5}
    met = all(ratio[context] <= bounds[context] for context in ratio if context in bounds)
    return _verdict(
        met and max(seconds) >= 32768 and growth <= 1.25,
        "DynaKV's step over DynamicCache's: "
        + ", ".join(f"{value:.2f} at {context}" for context, value in ratio.items())
        + f"; longest context over shortest {growth:.2f}x",
        mean_of_ratios=statistics.fmean(ratio.values()),
    )
