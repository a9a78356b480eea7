"""The numeric operations against what the machine can do, straightforward torch, and dense and masked attention.

For every case the bytes that have to move and the floating-point operations are counted. The machine's bandwidth (a
copy that moves as many bytes) and rate (a matrix product) are measured beside it, and the longer of both times is the
least that a case can take. All contenders of a case take turns.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import typer
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kvsched.dynakv.choice import CLOSE
from kvsched_kernels import (
    ClusterMasses,
    Estimate,
    Pool,
    Runs,
    Tokens,
    Vectors,
    choose_clusters,
    choose_tokens,
    cluster_attention,
    cluster_worth,
    dequantize,
    lloyd_step,
    moments,
    nearest,
    token_masses,
    two_means,
    update,
)

from .machine import keep

Call = Callable[[], Any]

_CLUSTER, _RUN = 24, 4
"""Tokens in a cluster, and how many of them a query wants that wants any."""

_RATE_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows of the square matrices whose product shows the machine's rate."""


@dataclass
class Case:
    """One operation at one size.

    Args:
        moved: bytes that have to be read and written; work: floating-point operations.
        ours: the dispatched operation.
        others: what it is compared with, by name.
        silent: contenders that do not run here, and why.
    """

    name: str
    sizes: dict[str, int]
    moved: int
    work: int
    ours: Call
    others: dict[str, Call]
    silent: dict[str, str] = field(default_factory=dict)


def attention(
    device: torch.device, dtype: torch.dtype, streams: int, group: int, dim: int, context: int, share: float
) -> Case:
    """Decode attention over a share of a context, in runs that lie all over it."""
    query = _random(streams, group, dim).to(device, dtype)
    key, value = (_random(streams, context, dim).to(device, dtype) for _ in range(2))
    count = int(context * share) // _RUN
    first = torch.stack([torch.randperm(context // _RUN)[:count].sort().values for _ in range(streams)])
    first = first.to(device) * _RUN
    start = (first + context * torch.arange(streams, device=device).unsqueeze(1)).flatten()
    runs = Runs.of(
        start,
        torch.full_like(start, _RUN),
        torch.arange(streams + 1, device=device) * count,
        torch.zeros(streams, dtype=torch.long, device=device),
    )
    pool, tokens, scaling = Pool(key.flatten(0, 1), value.flatten(0, 1)), count * _RUN, dim**-0.5
    places = [row.tolist() for row in first]

    def by_hand() -> torch.Tensor:
        outputs = []
        for s, starts in enumerate(places):
            keys = torch.cat([key[s, at : at + _RUN] for at in starts])
            values = torch.cat([value[s, at : at + _RUN] for at in starts])
            outputs.append((query[s] @ keys.T * scaling).softmax(-1) @ values)
        return torch.stack(outputs)

    each = torch.arange(_RUN, device=device)
    row = (start.view(streams, count, 1) + each).flatten(1)

    def one_copy() -> torch.Tensor:
        row = (start.view(streams, count, 1) + each).flatten(1)
        return (query @ pool.key[row].mT * scaling).softmax(-1) @ pool.value[row]

    heads = query.reshape(1, streams * group, 1, dim)

    def dense() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(heads, key[None], value[None], enable_gqa=True)

    case = Case(
        "cluster attention",
        {"streams": streams, "group": group, "dim": dim, "context": context, "tokens": tokens},
        moved=2 * streams * tokens * dim * dtype.itemsize,
        work=4 * streams * group * tokens * dim,
        ours=lambda: cluster_attention(query, pool, runs, scaling)[0],
        others={"straightforward": by_hand, "one_copy": one_copy, "dense_sdpa": dense},
    )
    chosen = torch.zeros(streams, context, dtype=torch.bool, device=device)
    chosen.scatter_(1, row - context * torch.arange(streams, device=device).unsqueeze(1), True)
    _try(case, "one_copy_compiled", lambda: torch.compile(one_copy))
    _try(case, "flex_block_mask", lambda: _flex(heads, key[None], value[None], chosen, group))
    _try(case, "flashinfer", lambda: _flashinfer(query, pool, row))
    return case


def _flex(heads: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chosen: torch.Tensor, group: int) -> Call:
    """`flex_attention` that skips blocks without a chosen token; making the mask is not timed."""

    def wanted(batch: Any, head: Any, at: Any, token: Any) -> Any:
        return chosen[head // group, token]

    mask = create_block_mask(wanted, 1, heads.shape[1], 1, chosen.shape[1], device=str(chosen.device))
    compiled = torch.compile(flex_attention)
    return lambda: compiled(heads, key, value, block_mask=mask, enable_gqa=True)


def _flashinfer(query: torch.Tensor, pool: Pool, row: torch.Tensor) -> Call:
    """FlashInfer's decode over pages of one token, each stream a sequence of its own; planning is not timed."""
    if query.device.type != "cuda":
        raise RuntimeError("FlashInfer needs an NVIDIA GPU")
    if importlib.util.find_spec("flashinfer") is None:
        raise RuntimeError("FlashInfer is not installed")
    import flashinfer

    streams, tokens = row.shape
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=query.device), "NHD"
    )
    ends = torch.arange(streams + 1, dtype=torch.int32, device=query.device) * tokens
    last = torch.ones(streams, dtype=torch.int32, device=query.device)
    wrapper.plan(
        ends, row.flatten().int(), last, query.shape[1], 1, query.shape[2], 1,
        q_data_type=query.dtype, kv_data_type=pool.key.dtype,
    )  # fmt: skip
    pages = pool.key[:, None, None], pool.value[:, None, None]
    return lambda: wrapper.run(query, pages)


def _try(case: Case, name: str, make: Callable[[], Call]) -> None:
    """Add a contender that not every machine runs, if its answer is right."""
    try:
        call = make()
        torch.testing.assert_close(call().flatten().float(), case.ours().flatten().float(), atol=2e-2, rtol=2e-2)
    except Exception as error:  # whatever a compiler or a missing library raises: it is reported
        case.silent[name] = str(error).splitlines()[0][:200] or type(error).__name__
    else:
        case.others[name] = call


def estimated(device: torch.device, streams: int, group: int, dim: int, context: int) -> Iterator[Case]:
    """What the index costs a step: clusters scored and chosen by packed mean keys, and the estimate of those left."""
    clusters, query = context // _CLUSTER, _random(streams, group, dim).to(device)
    codes = [
        torch.randint(0, 256, (streams, clusters, dim * bits // 8), dtype=torch.uint8, device=device) for bits in (8, 4)
    ]
    step = torch.full((streams, 1, dim), 0.1, device=device)
    keys, values = (Vectors(data, bits, step, -step) for data, bits in zip(codes, (8, 4), strict=True))
    size = torch.full((streams, clusters), _CLUSTER, dtype=torch.uint8, device=device)
    elsewhere, scaling = torch.zeros(streams, group, device=device), dim**-0.5
    sizes = {"streams": streams, "group": group, "dim": dim, "clusters": clusters}

    def scored() -> torch.Tensor:
        score = query @ keys.read(dim).transpose(1, 2) * scaling
        together = torch.cat([score + size.unsqueeze(1).log(), elsewhere.unsqueeze(-1)], -1).logsumexp(-1, keepdim=True)
        return (score - together).exp().sum(1)

    yield Case(
        "score",
        sizes,
        moved=codes[0].nbytes + size.nbytes + 4 * size.numel(),
        work=2 * streams * group * clusters * dim,
        ours=lambda: cluster_worth(query, keys, size, scaling, elsewhere),
        others={"straightforward": scored},
    )
    worth, budget = scored(), torch.full((streams, 1), context // 20, device=device)

    def walked() -> torch.Tensor:
        chosen = torch.zeros(streams, clusters, dtype=torch.bool)
        for s in range(streams):
            left = int(budget[s])
            for cluster in worth[s].argsort(descending=True).tolist():
                if 0 < (tokens := int(size[s, cluster])) <= left:
                    chosen[s, cluster], left = True, left - tokens
                if left == 0:
                    break
        return chosen.to(device)

    yield Case(
        "choose",
        sizes,
        moved=worth.nbytes + size.nbytes * 2,
        work=0,
        ours=lambda: choose_clusters(worth, size, budget),
        others={"straightforward": walked},
    )
    chosen = choose_clusters(worth, size, budget)
    estimate = Estimate(keys, values, size, chosen, corrects=False)
    nothing = torch.zeros(0, dtype=torch.long, device=device)
    none = torch.zeros(streams, dtype=torch.long, device=device)
    runs = Runs.of(nothing, nothing, torch.zeros(streams + 1, dtype=torch.long, device=device), none)
    pool = Pool(torch.zeros(0, dim, device=device), torch.zeros(0, dim, device=device))

    def estimated_by_hand() -> torch.Tensor:
        score = query @ keys.read(dim).transpose(1, 2) * scaling + size.unsqueeze(1).log()
        return score.masked_fill(chosen.unsqueeze(1), -math.inf).softmax(-1) @ values.read(dim)

    yield Case(
        "estimate",
        sizes,
        moved=codes[0].nbytes + codes[1].nbytes + size.nbytes + chosen.nbytes,
        work=4 * streams * group * clusters * dim,
        ours=lambda: cluster_attention(query, pool, runs, scaling, estimate=estimate)[0],
        others={"straightforward": estimated_by_hand},
    )


def single_tokens(device: torch.device, streams: int, group: int, dim: int, budget: int) -> Iterator[Case]:
    """What choosing tokens costs a step that looks at `CLOSE` times the budget: residuals in 2 bits, and the choice."""
    near, sizes = CLOSE * budget // _CLUSTER, {"streams": streams, "group": group, "dim": dim, "budget": budget}
    clusters = 4 * near
    data = torch.randint(0, 256, (streams, clusters * _CLUSTER, dim // 4), dtype=torch.uint8, device=device)
    step = torch.full((streams, 1, dim), 0.02, device=device)
    residuals, query = Vectors(data, 2, step, -1.5 * step), _random(streams, group, dim).to(device)
    size = torch.full((streams, clusters), _CLUSTER, dtype=torch.uint8, device=device)
    score, elsewhere = _random(streams, group, clusters).to(device), torch.zeros(streams, group, device=device)
    best = torch.stack([torch.randperm(clusters)[:near] for _ in range(streams)]).to(device)
    of, first, tokens = best.unsqueeze(1).expand(-1, group, -1), best * _CLUSTER, torch.full_like(best, _CLUSTER)

    def ours() -> Tokens:
        return token_masses(query, ClusterMasses(score, size, elsewhere), best, residuals, first, tokens)

    def by_hand() -> torch.Tensor:
        rows = (first.unsqueeze(2) + torch.arange(_CLUSTER, device=device)).flatten(1)
        own = (query @ residuals.rows(rows).read(dim).mT).unflatten(2, (near, _CLUSTER)) + score.gather(
            2, of
        ).unsqueeze(3)
        others = score.scatter(2, of, -math.inf) + size.unsqueeze(1).log()
        together = torch.cat([own.flatten(2), others, elsewhere.unsqueeze(2)], 2).logsumexp(2)
        return (own - together[..., None, None]).exp().sum(1)

    found = ours()
    torch.testing.assert_close(found.worth, by_hand(), rtol=1e-3, atol=1e-6)
    yield Case(
        "look at tokens",
        sizes,
        moved=streams * near * _CLUSTER * dim // 4 + 4 * found.mass.numel() + 4 * found.worth.numel(),
        work=2 * streams * group * near * _CLUSTER * dim,
        ours=lambda: ours().worth,
        others={"straightforward": by_hand},
    )
    masses, room = ClusterMasses(score, size, elsewhere), torch.full((streams, 1), budget, device=device)

    def chosen_by_hand() -> torch.Tensor:
        order = found.worth.flatten(1).argsort(1, descending=True)[:, :budget]
        kept = (
            torch.zeros_like(found.worth, dtype=torch.bool).flatten(1).scatter(1, order, True).view(found.worth.shape)
        )
        left = found.mass.masked_fill(kept.unsqueeze(1), 0.0).sum(3)
        return masses.mass.scatter(2, of, left)

    yield Case(
        "choose tokens",
        sizes,
        moved=4 * found.mass.numel() + 5 * found.worth.numel(),
        work=0,
        ours=lambda: (choose_tokens(masses, found, room), masses.mass)[1],
        others={"straightforward": chosen_by_hand},
    )


def clustering(device: torch.device, streams: int, dim: int, prompt: int) -> Iterator[Case]:
    """What keeps the clusters: a step of k-means over a prompt, new tokens, and splits."""
    clusters, new, sets, most = prompt // 16, 16, 64 * streams, 16
    points, centroid = _random(streams, prompt, dim).to(device), _random(streams, clusters, dim).to(device)
    everything = torch.ones(streams, prompt, dtype=torch.bool, device=device)
    live = torch.ones(streams, clusters, dtype=torch.bool, device=device)

    def stepped() -> torch.Tensor:
        label = torch.cdist(points, centroid).argmin(-1)
        return torch.stack(
            [
                torch.stack([points[s][label[s] == c].mean(0) for c in range(clusters)])
                for s in range(streams)
            ]
        )  # fmt: skip

    sizes = {"streams": streams, "dim": dim, "points": prompt, "clusters": clusters}
    yield Case(
        "k-means step",
        sizes,
        moved=points.nbytes + 2 * centroid.nbytes + 8 * streams * prompt,
        work=2 * streams * prompt * clusters * dim,
        ours=lambda: lloyd_step(points, everything, centroid, live),
        others={"straightforward": stepped},
    )
    label = nearest(points, centroid, live)[0]
    before = moments(points, label, clusters)
    fresh = _random(streams, new, dim).to(device)

    def taken_in() -> tuple[torch.Tensor, ...]:
        mean, count, deviation = (part.clone() for part in before)
        for s in range(streams):
            for t, c in enumerate(torch.cdist(fresh[s], mean[s]).argmin(-1).tolist()):
                count[s, c] += 1
                gap = fresh[s, t] - mean[s, c]
                mean[s, c] += gap / count[s, c]
                deviation[s, c] += gap @ (fresh[s, t] - mean[s, c])
        return mean, count, deviation

    yield Case(
        "assign and update",
        {**sizes, "points": new},
        moved=3 * centroid.nbytes + fresh.nbytes + 2 * (before[1].nbytes + before[2].nbytes),
        work=2 * streams * new * clusters * dim,
        ours=lambda: update(before, fresh, nearest(fresh, before[0], live)[0]),
        others={"straightforward": taken_in},
    )
    groups, inside = _random(sets, most, dim).to(device), torch.ones(sets, most, dtype=torch.bool, device=device)

    def split_by_hand() -> torch.Tensor:
        return torch.stack([two_means(group[None], inside[:1])[0] for group in groups])

    yield Case(
        "split",
        {"sets": sets, "points": most, "dim": dim},
        moved=groups.nbytes + 2 * inside.nbytes,
        work=8 * 6 * sets * most * dim,
        ours=lambda: two_means(groups, inside),
        others={"straightforward": split_by_hand},
    )


def coding(device: torch.device, dtype: torch.dtype, heads: int, tokens: int, dim: int) -> Case:
    """Symbols of a chunk's keys, as the codec stores them, to keys in the model's type."""
    symbols = torch.randint(-127, 128, (heads, dim, tokens), device=device).to(torch.int16).transpose(1, 2)
    step, centre = torch.full((heads, 1, dim), 0.1, device=device), torch.ones(heads, 1, dim, device=device)
    angles = torch.arange(tokens, device=device)[:, None] * torch.rand(dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()

    def by_hand() -> torch.Tensor:
        numbers = (symbols.float() + centre) * step
        first, second = numbers.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(dtype)

    return Case(
        "dequantise and rotate",
        {"heads": heads, "tokens": tokens, "dim": dim},
        moved=symbols.nbytes + heads * tokens * dim * dtype.itemsize + cos.nbytes * 2,
        work=5 * heads * tokens * dim,
        ours=lambda: dequantize(symbols, step, centre, (cos, sin), dtype),
        others={"straightforward": by_hand},
    )


def cases(device: torch.device) -> Iterator[Case]:
    """The cases of a device: layers of models with 0.5 and 8 billion parameters; on a GPU with batches of them."""
    if device.type == "cpu":
        yield attention(device, torch.float32, streams=2, group=7, dim=64, context=8192, share=0.05)
        yield attention(device, torch.float32, streams=8, group=4, dim=128, context=32768, share=0.05)
        yield from estimated(device, streams=2, group=7, dim=64, context=32768)
        yield from single_tokens(device, streams=2, group=7, dim=64, budget=256)
        yield from clustering(device, streams=2, dim=64, prompt=4096)
        yield coding(device, torch.float32, heads=2, tokens=1024, dim=64)
    else:
        for share in (0.02, 0.06):
            yield attention(device, torch.float16, streams=32, group=1, dim=128, context=131072, share=share)
            yield attention(device, torch.bfloat16, streams=64, group=4, dim=128, context=131072, share=share)
        yield from estimated(device, streams=64, group=4, dim=128, context=131072)
        yield from single_tokens(device, streams=64, group=4, dim=128, budget=2048)
        yield from clustering(device, streams=8, dim=128, prompt=32768)
        yield coding(device, torch.bfloat16, heads=8, tokens=16384, dim=128)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def bandwidth(device: torch.device, moved: int) -> Call:
    """A copy that reads and writes `moved` bytes together."""
    source = torch.zeros(max(1, moved // 8), device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def rate(device: torch.device) -> tuple[Call, int]:
    """A matrix product in float32 and its floating-point operations."""
    size = _RATE_SIZE[device.type]
    left, right = torch.ones(size, size, device=device), torch.ones(size, size, device=device)
    return lambda: left @ right, 2 * size**3


def seconds(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Quartiles of the time of each call.

    The calls take turns. Each is called twice in a turn and timed the second time, so that none pays for the memory
    and the cache that the one before it has left.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            wait(device)
            begin = time.perf_counter()
            call()
            wait(device)
            taken[name].append(time.perf_counter() - begin)
    cuts = {name: statistics.quantiles(values, n=4, method="inclusive") for name, values in taken.items()}
    return {name: dict(zip(("low", "median", "high"), values, strict=True)) for name, values in cuts.items()}


def wait(device: torch.device) -> None:
    """Until everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """All cases of a device, each with the limits of the machine that were measured beside it."""
    found = []
    product, product_work = rate(device)
    for case in cases(device):
        copy = bandwidth(device, case.moved)
        times = seconds({"ours": case.ours, **case.others, "copy": copy, "matrix product": product}, rounds, device)
        per_second = {
            "bytes": case.moved / times["copy"]["median"],
            "operations": product_work / times["matrix product"]["median"],
        }
        least = max(case.moved / per_second["bytes"], case.work / per_second["operations"])
        ours = times["ours"]["median"]
        found.append(
            {
                "case": case.name,
                **case.sizes,
                "bytes": case.moved,
                "operations": case.work,
                "machine_per_second": per_second,
                "least_seconds": least,
                "share_of_limit": least / ours,
                "seconds": {name: times[name] for name in ("ours", *case.others)},
                "speed_up_over": {name: times[name]["median"] / ours for name in case.others},
                "not_run": case.silent,
            }
        )
        del case
    return found


def draw(devices: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The roofline of each device: achieved rate of every case over its operations for each byte."""
    figure, panels = plt.subplots(1, len(devices), figsize=(8 * len(devices), 5.5), squeeze=False)
    for panel, (device, rows) in zip(panels[0], devices.items(), strict=True):
        rows = [row for row in rows if row["operations"]]
        most = [statistics.median(row["machine_per_second"][kind] for row in rows) for kind in ("bytes", "operations")]
        intensity = [row["operations"] / row["bytes"] for row in rows]
        line = [min(intensity) / 2, most[1] / most[0], max(*intensity, most[1] / most[0]) * 2]
        panel.plot(
            line, [min(most[1], at * most[0]) / 1e9 for at in line], color="black", label="the machine, measured"
        )
        for row, at in zip(rows, intensity, strict=True):
            reached = {name: row["operations"] / row["seconds"][name]["median"] / 1e9 for name in row["seconds"]}
            name = f"{row['case']}, {row['context']} tokens" if "context" in row else row["case"]
            points = panel.plot(at, reached["ours"], "o", label=f"{name} ({row['share_of_limit']:.0%} of its limit)")
            panel.plot(at, reached["straightforward"], "x", color=points[0].get_color())
        panel.set(xscale="log", yscale="log", xlabel="operations for each byte", ylabel="billion operations a second")
        panel.set_title(f"{device} (crosses: straightforward torch)")
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main(
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Keep everything measured in this file, and the picture beside it.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Times that each contender is measured.", min=2)] = 15,
) -> None:
    """Measure the operations on the CPU, and on the GPU where there is one."""
    torch.manual_seed(0)
    names = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    devices = {name: measure(torch.device(name), rounds) for name in names}
    for device, rows in devices.items():
        for row in rows:
            compared = ", ".join(f"{ratio:.1f}x {name}" for name, ratio in row["speed_up_over"].items())
            typer.echo(
                f"{device} {row['case']:22} {row['seconds']['ours']['median'] * 1e3:9.3f} ms, "
                f"{row['share_of_limit']:4.0%} of the limit, {compared}"
            )
            for name, reason in row["not_run"].items():
                typer.echo(f"  {name} did not run: {reason}")
    if json_path is not None:
        keep(json_path, "kernels_bench", {"rounds": rounds, "devices": devices})
        draw(devices, json_path.with_suffix(".png"))
        typer.echo(f"written to {json_path} and {json_path.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
