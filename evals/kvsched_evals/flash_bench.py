"""Targets D6, D7 and D9 on the storage path alone: layouts on flash side by side, data moved, and who stays in DRAM.

A trace's prompt is clustered; its later queries retrieve clusters, layer by layer as decoding does. What DRAM of a
given share does not hold is read again and again from a file in each layout, past the page cache; the kernel's count
of bytes read is the proof. The same clusters are missing in every layout, so times compare the layouts alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from kvsched import DynaKVConfig
from kvsched.dynakv.affinity import order
from kvsched.dynakv.flash import PAGE, Buffer, FlashFile
from kvsched.dynakv.residency import (
    Access,
    ClusterAligned,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    Policy,
    Residency,
    replay,
)
from kvsched.dynakv.runs import WASTE, merge
from kvsched.dynakv.storage import ClusterStorage
from kvsched.trace import LayerTrace, Trace
from kvsched_kernels import kmeans

POLICIES: dict[str, Callable[[], Policy]] = {
    "cluster_aligned": ClusterAligned,
    "least_recently_used": LeastRecentlyUsed,
    "least_frequently_used": LeastFrequentlyUsed,
}
MEAN = 24.0
"""Tokens in a cluster, on average."""

MEANS = (3.0, 8.0, 16.0, 24.0, 40.0)
"""Others to compare with: the paper's clusters have 25 in a read."""

THREADS = 8
"""Reads in flight, where the kernel does not take all at once."""

ORDER_QUERIES = 256
"""Queries of the prompt that the order on flash comes from."""

FREE_GAPS = 3.0
"""Bytes beyond those missing that `co_retrieved_gaps` may read, as a share: what only counting reads would do."""


@dataclass
class Head:
    """One KV head: the cluster of each prompt token, and which clusters each later query retrieves.

    Args:
        label: int64 `[n]`.
        sizes: int64 `[C]`.
        chain: int64 `[C]`, co-retrieval order by the prompt's own queries.
        wanted: for each step, the clusters.
        nearest: int64 `[steps]`, the cluster that the token of each step joins.
    """

    label: np.ndarray
    sizes: np.ndarray
    chain: np.ndarray
    wanted: list[np.ndarray]
    nearest: np.ndarray


def read_head(layer: LayerTrace, head: int, prompt: int, steps: int, mean: float, budget: int, scale: float) -> Head:
    """Cluster one head's prompt, and retrieve for its prompt's last queries and for those after it."""
    group = layer.queries.shape[0] // layer.keys.shape[0]
    keys = layer.keys[head].float()
    queries = layer.queries[head * group : (head + 1) * group].float()
    first = keys[:prompt].unsqueeze(0)
    count = torch.tensor([max(1, round(prompt / mean))])
    label = kmeans(first, torch.ones(1, prompt, dtype=torch.bool), count)[0]
    sizes = torch.bincount(label, minlength=int(count))
    centroid = torch.zeros(int(count), keys.shape[1]).index_add_(0, label, keys[:prompt]) / sizes.unsqueeze(1)

    def retrieved(query: torch.Tensor) -> torch.Tensor:
        best = (query @ centroid.T * scale).softmax(-1).sum(0).argsort(1, descending=True)
        fits = sizes[best].cumsum(1) <= budget
        return torch.zeros_like(fits).scatter(1, best, fits)

    asked = retrieved(queries[:, max(0, prompt - 2 * ORDER_QUERIES) : prompt : 2])
    later = slice(prompt, prompt + steps)
    return Head(
        label.numpy(),
        sizes.numpy(),
        order(asked.numpy()),
        [row.nonzero()[:, 0].numpy() for row in retrieved(queries[:, later])],
        torch.cdist(keys[later], centroid).argmin(1).numpy(),
    )


def clustered(
    trace: Trace, numbers: Sequence[int], budget: int, prompt: int, steps: int, mean: float
) -> tuple[list[list[Head]], int]:
    """All heads of some layers by `read_head`, and the bytes of an entry."""
    heads: list[list[Head]] = []
    for number in tqdm(numbers, desc="clustering", file=sys.stderr):
        layer = trace.layer(number)
        each = range(trace.kv_heads)
        heads.append([read_head(layer, head, prompt, steps, mean, budget, trace.scaling) for head in each])
    return heads, 2 * layer.keys.shape[2] * layer.keys.dtype.itemsize


def held(layers: list[list[Head]]) -> int:
    """Entries of all heads."""
    return sum(len(head.label) for heads in layers for head in heads)


def accesses(layers: list[list[Head]], steps: int) -> list[Access]:
    """What decoding asks for, layer by layer; clusters are numbered over all heads."""
    base = np.cumsum([0, *[len(head.sizes) for heads in layers for head in heads]])
    none = np.zeros(0, dtype=np.int64)
    found = []
    for step in range(steps):
        for number, heads in enumerate(layers):
            first = sum(len(before) for before in layers[:number])
            parts = [head.wanted[step] + base[first + i] for i, head in enumerate(heads)]
            sizes = [head.sizes[head.wanted[step]] for head in heads]
            found.append(Access(number, step, np.concatenate(parts), np.concatenate(sizes), none))
    return found


def missing(asked: list[Access], capacity: int, skip: int) -> list[np.ndarray]:
    """The clusters that each access has to read, after `skip` steps that fill DRAM."""
    table, found = Residency(capacity, ClusterAligned()), []
    for access in asked:
        table.begin(access.step)
        slots, _ = table.admit(access.addresses, np.where(table.holds(access.addresses), 0, access.sizes))
        away = slots < 0
        table.enter(access.addresses[away], access.sizes[away])
        if access.step >= skip:
            found.append(access.addresses[away])
    return found


def layouts(layers: list[list[Head]]) -> dict[str, list[np.ndarray]]:
    """For each layout the places of the entries of each cluster, in entries from the start of the file."""
    heads = [head for of in layers for head in of]
    tokens = np.cumsum([0, *[len(head.label) for head in heads]])
    found: dict[str, list[np.ndarray]] = {"co_retrieved": [], "clusters": [], "tokens": []}
    for start, head in zip(tokens.tolist(), heads, strict=False):
        for name, chain in (("co_retrieved", head.chain), ("clusters", np.arange(len(head.sizes)))):
            begin = np.empty(len(chain), dtype=np.int64)
            begin[chain] = np.cumsum(head.sizes[chain]) - head.sizes[chain]
            found[name] += [start + first + np.arange(size) for first, size in zip(begin, head.sizes, strict=True)]
        by_cluster = np.argsort(head.label, kind="stable")
        found["tokens"] += [start + part for part in np.split(by_cluster, np.cumsum(head.sizes)[:-1])]
    return found


def reads_of(places: list[np.ndarray], wanted: np.ndarray, entry: int, sector: int, waste: float | None) -> Any:
    """Offsets and lengths of the reads that bring clusters, merged (`runs.merge`) or each token alone; bytes asked."""
    place = np.sort(np.concatenate([places[cluster] for cluster in wanted.tolist()]))
    if waste is None:
        first, last = place * entry // sector * sector, -(-(place * entry + entry) // sector) * sector
        return first, last - first, len(place) * entry
    begins = np.flatnonzero(np.diff(place, prepend=-2) != 1)
    runs = merge(place[begins] * entry, np.diff(begins, append=len(place)) * entry, sector, waste)
    return runs.offset, runs.length, len(place) * entry


def read_bytes() -> int:
    """Bytes that this process had the device read."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


def time_layouts(
    layers: list[list[Head]], away: list[np.ndarray], entry: int, directory: Path, threads: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Read what is missing at each access in every layout; they take turns, so that all see the same machine."""
    placed = layouts(layers)
    kinds: dict[str, tuple[list[np.ndarray], float | None]] = {name: (of, WASTE) for name, of in placed.items()}
    kinds["co_retrieved_gaps"] = placed["co_retrieved"], FREE_GAPS
    kinds["token_by_token"] = placed["tokens"], None
    file = FlashFile(directory, threads)
    try:
        total = sum(len(head.label) for of in layers for head in of) * entry
        file.reserve(-(-total // PAGE) * PAGE + PAGE)
        filled = Buffer(1 << 20)
        filled.memory[:] = np.random.default_rng(0).bytes(len(filled.memory))
        for offset in range(0, file.size, len(filled.memory)):
            file.wait(file.write([(offset, filled.memory[: min(len(filled.memory), file.size - offset)])]))
        rows: dict[str, dict[str, Any]] = {}
        plans = {}
        for name, (places, waste) in kinds.items():
            plan = [reads_of(places, wanted, entry, file.alignment, waste) for wanted in away if len(wanted)]
            plans[name] = plan
            reads, asked = sum(len(offset) for offset, _, _ in plan), sum(asked for _, _, asked in plan)
            nbytes = int(sum(length.sum() for _, length, _ in plan))
            rows[name] = {
                "reads": reads,
                "bytes_read": nbytes,
                "bytes_read_over_missing": nbytes / asked,
                "entries_a_read": asked / entry / reads,
                "seconds": [],
                "kernel_bytes_over_bytes_read": [],
            }
        room = Buffer(max(int(length.sum()) for plan in plans.values() for _, length, _ in plan) // PAGE * PAGE + PAGE)
        for _ in tqdm(range(repeats), desc="layouts", file=sys.stderr):
            for name, plan in plans.items():
                before, begin = read_bytes(), time.perf_counter()
                for offset, length, _ in plan:
                    at = np.cumsum(length) - length
                    file.wait(
                        file.read(
                            [
                                (o, room.memory[a : a + n])
                                for o, a, n in zip(offset.tolist(), at.tolist(), length.tolist(), strict=True)
                            ]
                        )
                    )
                rows[name]["seconds"].append(time.perf_counter() - begin)
                rows[name]["kernel_bytes_over_bytes_read"].append((read_bytes() - before) / rows[name]["bytes_read"])
        for row in rows.values():
            row["median_seconds"] = float(np.median(row["seconds"]))
            row["time_over_co_retrieved"] = row["median_seconds"] / rows["co_retrieved"]["median_seconds"]
        return {"direct": {"alignment": file.alignment, "page_cache_bypassed": file.direct}, **rows}
    finally:
        file.close()


def granularity(
    trace: Trace, numbers: Sequence[int], budget: int, prompt: int, steps: int, share: float, sector: int
) -> dict[str, dict[str, float]]:
    """What reads bring in co-retrieval order, by the mean tokens of a cluster, with `share` of the clusters in DRAM."""
    found = {}
    for mean in tqdm(MEANS, desc="cluster sizes", file=sys.stderr):
        heads, entry = clustered(trace, numbers, budget, prompt, steps, mean)
        asked = accesses(heads, steps)
        capacity = max(int(share * held(heads)), int(max(access.sizes.sum() for access in asked)))
        places, away = layouts(heads)["co_retrieved"], missing(asked, capacity, steps // 4)
        plan = [reads_of(places, wanted, entry, sector, WASTE) for wanted in away if len(wanted)]
        reads, nbytes = sum(len(offset) for offset, _, _ in plan), sum(nbytes for _, _, nbytes in plan)
        found[str(mean)] = {
            "reads_a_layer_and_step": reads / len(away),
            "entries_a_read": nbytes / entry / max(1, reads),
            "bytes_read_over_missing": float(sum(length.sum() for _, length, _ in plan) / max(1, nbytes)),
        }
    return found


def moved(heads: list[Head], steps: int, entry: int, directory: Path) -> dict[str, float]:
    """Bytes written again by appends and splits, in dual-head pools and where clusters are kept packed."""
    largest = 2 * max(int(head.sizes.max()) for head in heads)
    storage = ClusterStorage(
        DynaKVConfig(directory=directory, cluster_size=2, max_cluster_size=largest, dram=64 * largest * (entry + 10))
    )
    packed = 0
    try:
        storage.open(entry // 2, torch.float16)
        for number, head in enumerate(heads):
            sizes = head.sizes.astype(np.int64)
            storage.begin()
            entries = torch.zeros(int(sizes.sum()), entry // 2, dtype=torch.float16)
            addresses = storage.create(entries, sizes, None, np.full(len(sizes), number), growing=True)
            own = [[[int(a), int(s)]] for a, s in zip(addresses, sizes, strict=True)]
            total = int(sizes.sum())
            before = np.cumsum(sizes) - sizes
            for step in range(steps):
                cluster = int(head.nearest[step])
                part = own[cluster][-1]
                storage.begin(step)
                slots = storage.fetch(np.array([part[0]]), np.array([part[1]]))
                storage.append(slots, np.array([part[1]]), torch.ones(1, entry // 2, dtype=torch.float16))
                part[1] += 1
                # Kept packed, everything behind the cluster makes way.
                packed += (total - int(before[cluster])) * entry
                total += 1
                if part[1] == largest:
                    half = largest // 2
                    made = storage.split(slots, np.arange(largest)[None], np.array([[half, half]]))
                    part[1] = half
                    own[cluster].append([int(made[0]), half])
            storage.gather(addresses, np.array([parts[0][1] for parts in own]))
        storage.spend("everything", 1 << 60)
        storage.begin()
        return {
            "appends": steps * len(heads),
            "pools_bytes": storage.transfers.bytes_moved,
            "packed_bytes": packed,
            "packed_over_pools": packed / max(1, storage.transfers.bytes_moved),
        }
    finally:
        storage.close()


def storage(
    trace: Trace,
    numbers: Sequence[int],
    directory: Path,
    budget: int,
    prompt: int = 8192,
    steps: int = 256,
    shares: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
    repeats: int = 5,
) -> dict[str, Any]:
    """Layouts, data moved and replacement on a recorded decode.

    Args:
        numbers: layers of the trace.
        directory: on the device to measure.
        budget: tokens retrieved for each KV head.
        prompt: tokens that are clustered; steps: tokens decoded after them.
        shares: of the clusters that DRAM holds.
        repeats: of each timing.
    """
    prompt = min(prompt, trace.tokens - steps)
    heads, entry = clustered(trace, numbers, budget, prompt, steps, MEAN)
    asked = accesses(heads, steps)
    total = held(heads)
    skip = steps // 4
    found: dict[str, Any] = {}
    for share in shares:
        capacity = max(int(share * total), int(max(access.sizes.sum() for access in asked)))
        rates = {name: replay(asked, capacity, policy, skip) for name, policy in POLICIES.items()}
        hit = {name: rate.clusters_found / rate.clusters for name, rate in rates.items()}
        away = missing(asked, capacity, skip)
        measured = time_layouts(heads, away, entry, directory, THREADS, repeats)
        found[str(share)] = {"capacity_entries": capacity, "hit_rate": hit, "layouts": measured}
    sector = measured["direct"]["alignment"]
    return {
        "prompt": prompt,
        "steps": steps,
        "clusters": sum(len(head.sizes) for of in heads for head in of),
        "entry_bytes": entry,
        "dram": found,
        "cluster_sizes": granularity(trace, numbers, budget, prompt, steps, shares[0], sector),
        "moved": moved([head for of in heads for head in of], steps, entry, directory),
    }
