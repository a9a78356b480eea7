"""Target S2: plans against the exact optimum on random instances, how long planning takes, and every planner's ratio.

The exact optimum comes from dynamic programming over whole Pareto fronts of (compute, stream), nothing rounded: slow
where fronts grow, so it is no planner.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm.auto import tqdm

from kvsched.sparkv.plan import PLANNERS, lower_bound, makespan, optimal

from .machine import keep

MAX_CHUNKS, MAX_LAYERS = 32, 64
TIMED = [(16, 24), (32, 32), (64, 64)]


def regular(rng: np.random.Generator, chunks: int, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """A model's grid: layers alike, attention that grows with context, sizes that differ by layer; any link."""
    context = 1 + rng.uniform(0, 0.1) * np.arange(chunks)[:, None]
    compute = np.maximum(np.arange(layers + 1) - 0.95, 0) * context
    compute[:, 1:] += 0.05
    sizes = rng.uniform(1, 2.4, layers) * rng.uniform(0.97, 1.03, (chunks, 1))
    return compute, _scaled(sizes, compute, rng)


def irregular(rng: np.random.Generator, chunks: int, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces that differ several times in both costs, where solutions on the convex hull are far off."""
    pieces = rng.random((chunks, layers)) * rng.choice([0.2, 1, 5], (chunks, 1))
    compute = np.concatenate([np.zeros((chunks, 1)), pieces.cumsum(axis=1)], axis=1)
    return compute, _scaled(rng.random((chunks, layers)), compute, rng)


def _scaled(sizes: np.ndarray, compute: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Seconds to stream pieces of `sizes`, 1/8 to 8 times as long in all as computing everything."""
    seconds = sizes * compute[:, -1].sum() / sizes.sum() * 2 ** rng.uniform(-3, 3)
    return np.concatenate([seconds[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((len(sizes), 1))], axis=1)


def exact(compute: np.ndarray, stream: np.ndarray, bound: float) -> float:
    """The smallest makespan over all staircases, given one that can be reached."""
    fronts = [np.zeros((1, 2))] * compute.shape[1]
    for t in reversed(range(len(compute))):
        shallower = np.zeros((0, 2))
        for d, front in enumerate(fronts):
            ends = np.concatenate([shallower, front + np.array([compute[t, d], stream[t, d]])])
            ends = ends[(ends <= bound * (1 + 1e-9)).all(axis=1)]
            ends = ends[np.lexsort((ends[:, 1], ends[:, 0]))]
            least_before = np.concatenate([[np.inf], np.minimum.accumulate(ends[:, 1])])[: len(ends)]
            fronts[d] = shallower = ends[ends[:, 1] < least_before]
    return float(fronts[-1].max(axis=1).min())


def spread(values: list[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum."""
    return dict(zip(("median", "p95", "max"), np.percentile(values, [50, 95, 100]).tolist(), strict=True))


def quality(make: Any, instances: int, seed: int) -> dict[str, Any]:
    """Gap of `optimal` to the exact optimum, and what every planner takes in multiples of the lower bound."""
    rng = np.random.default_rng(seed)
    gaps: list[float] = []
    seconds: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in PLANNERS}
    worse = 0
    for _ in tqdm(range(instances), desc=make.__name__, file=sys.stderr):
        compute, stream = make(rng, int(rng.integers(1, MAX_CHUNKS + 1)), int(rng.integers(1, MAX_LAYERS + 1)))
        spans = {name: makespan(compute, stream, plan(compute, stream)) for name, plan in PLANNERS.items()}
        begin = time.perf_counter()
        optimal(compute, stream)
        seconds.append(time.perf_counter() - begin)
        gaps.append(spans["optimal"] / exact(compute, stream, spans["optimal"]) - 1)
        worse += spans["optimal"] > min(spans.values())
        bound = lower_bound(compute, stream)
        for name, span in spans.items():
            ratios[name].append(span / bound)
    return {
        "instances": instances,
        "gap": spread(gaps),
        "planning_seconds": spread(seconds),
        "optimal_above_a_baseline": worse,
        "makespan_over_lower_bound": {name: spread(values) for name, values in ratios.items()},
    }


def timings(seed: int, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of one plan by grid and planner."""
    rng = np.random.default_rng(seed)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for chunks, layers in TIMED:
        seconds: dict[str, list[float]] = {name: [] for name in PLANNERS}
        for repeat in range(repeats):
            compute, stream = (regular, irregular)[repeat % 2](rng, chunks, layers)
            for name, plan in PLANNERS.items():
                begin = time.perf_counter()
                plan(compute, stream)
                seconds[name].append(time.perf_counter() - begin)
        rows[f"{chunks}x{layers}"] = {name: spread(values) for name, values in seconds.items()}
    return rows


def main(
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write everything measured to this file.")
    ] = None,
    instances: Annotated[int, typer.Option(help="Random instances, half of them regular.", min=2)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the instances.")] = 0,
) -> None:
    """Measure the planners."""
    kinds = {make.__name__: quality(make, instances // 2, seed) for make in (regular, irregular)}
    timed = timings(seed, repeats=20)
    for kind, row in kinds.items():
        gap, ratios = row["gap"], row["makespan_over_lower_bound"]
        typer.echo(f"{kind}: optimal above exact by {gap['median']:.4%} median, {gap['max']:.4%} at most")
        for name, ratio in ratios.items():
            typer.echo(f"  {name:12} {ratio['median']:.3f}x the lower bound in the median, {ratio['max']:.3f}x at most")
    for grid, planners in timed.items():
        typer.echo(
            f"{grid}: optimal {planners['optimal']['median'] * 1e3:.1f} ms, greedy "
            f"{planners['greedy']['median'] * 1e3:.1f} ms"
        )
    if json_path is not None:
        result = {
            "seed": seed,
            "quality": kinds,
            "planning_seconds": timed,
        }
        keep(json_path, "plan_bench", result)
        typer.echo(f"written to {json_path}")


if __name__ == "__main__":
    typer.run(main)
