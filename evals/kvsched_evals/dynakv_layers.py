"""DynaKV's layers on a recorded run that is tiled to any length: what a step of the cache costs, and what it holds.

Nothing of a model runs here but the layers that hold its keys, so a step is the cache path alone: clusters are scored,
fetched from flash past the page cache, attended to and adapted. Tokens behind the prompt arrive as decoding brings
them, in chunks of as many as may wait, each of which retrieves clusters.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm

from kvsched import DynaKVConfig
from kvsched.dynakv.dense import BATCH, WAITING
from kvsched.dynakv.layer import DynaKVLayer
from kvsched.dynakv.policies import policy_named
from kvsched.dynakv.storage import ClusterStorage
from kvsched.trace import LayerTrace, Trace

PROMPT = 1024
"""Tokens that are clustered as a prompt; the rest of a context is decoded."""

WARM = 16
"""Steps before the first that is measured."""


@dataclass(frozen=True)
class Tiled:
    """Layers of a trace, without end: token n is token n modulo the trace's length."""

    layers: dict[int, LayerTrace]
    scaling: float

    @classmethod
    def of(cls, trace: Trace, count: int) -> Tiled:
        """`count` layers of `trace`, evenly spaced."""
        numbers = [trace.layers[i] for i in np.linspace(0, len(trace.layers) - 1, count).round().astype(int)]
        return cls({number: trace.layer(number) for number in numbers}, trace.scaling)

    def part(self, number: int, tokens: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and queries `[1, H, n, D]` of a layer, float32."""
        layer = self.layers[number]
        at = torch.arange(tokens.start, tokens.stop) % layer.keys.shape[1]
        keys, values, queries = (x[None, :, at].float() for x in (layer.keys, layer.values, layer.queries))
        return keys, values, queries

    def kv_bytes(self, tokens: int) -> int:
        """Of keys and values of all layers, as they are stored."""
        return sum(2 * layer.keys[:, 0].nbytes * tokens for layer in self.layers.values())


class Decoded:
    """Layers of one policy that decode a trace.

    Args:
        policy: name of the policy.
        dram: bytes for all layers.
    """

    def __init__(self, trace: Tiled, policy: str, directory: Path, dram: int, budget: int) -> None:
        config = DynaKVConfig(
            policy=policy, directory=directory, dram=dram, budget=budget, storage="float16", prefill="retrieval"
        )
        dense = policy_named(policy).dense_layers
        self.trace, self.storage, self.seen = trace, ClusterStorage(config), 0
        self.layers = {n: DynaKVLayer(config, self.storage, n) for n in trace.layers if n >= dense}

    def feed(self, count: int) -> float:
        """Give the next `count` tokens to all layers, one layer after the other; the seconds that they took."""
        tokens = range(self.seen, self.seen + count)
        seconds = 0.0
        for number, layer in self.layers.items():
            keys, values, queries = self.trace.part(number, tokens)
            begin = time.perf_counter()
            marked, values = layer.update(keys, values)
            layer.attention(_unanswered, torch.nn.Identity(), queries, marked, values, None, scaling=self.trace.scaling)
            seconds += time.perf_counter() - begin
        self.seen += count
        return seconds

    def fill(self, context: int) -> None:
        """Decode up to `context` tokens, a whole number of chunks."""
        if self.seen == 0:
            self.feed(min(PROMPT, context))
        while self.seen < context:
            self.feed(min(WAITING, context - self.seen))

    @property
    def dram(self) -> int:
        """Bytes that the cache says it holds."""
        layers = sum(layer.index_bytes + layer.dense_bytes for layer in self.layers.values())
        return self.storage.arena_bytes + self.storage.table_bytes + layers


def dram_bytes(share: float, trace: Tiled, context: int) -> int:
    """`share` of the bytes of keys and values, and a mebibyte at least."""
    return max(1 << 20, int(share * trace.kv_bytes(context)))


def _unanswered(module: Any, query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    return query, None  # the answer to a prompt is nobody's concern here


def read_bytes() -> int:
    """Bytes that this process had the device read."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


@torch.no_grad()
def step_latency(
    trace: Tiled,
    policies: Sequence[str],
    contexts: Sequence[int],
    directory: Path,
    share: float,
    budget: int,
    steps: int,
) -> dict[str, dict[str, Any]]:
    """Latency of a step, and what it reads, by context and policy; all policies take turns at every step.

    Args:
        share: of the keys' and values' bytes that DRAM may hold at each context. `token-topk` is given room for all
            keys on top, without which it is no method at all.
    """
    found: dict[str, dict[str, Any]] = {}
    for context in contexts:
        dram = dict.fromkeys(policies, dram_bytes(share, trace, context))
        if "token-topk" in dram:  # it holds all keys, for which this budget is not made
            dram["token-topk"] += trace.kv_bytes(context) // 2
        decoded = {policy: Decoded(trace, policy, directory, dram[policy], budget) for policy in policies}
        try:
            for one in tqdm(decoded.values(), desc=f"filling {context}", file=sys.stderr):
                one.fill(context)
                for _ in range(WARM):
                    one.feed(1)
            before = {policy: _counts(one) for policy, one in decoded.items()}
            kernel, asked = read_bytes(), sum(count["bytes_read"] for count in before.values())
            times: dict[str, list[float]] = {policy: [] for policy in policies}
            for _ in tqdm(range(steps), desc=f"decoding at {context}", file=sys.stderr):
                for policy, one in decoded.items():
                    times[policy].append(one.feed(1))
            after = {policy: _counts(one) for policy, one in decoded.items()}
            kernel, asked = read_bytes() - kernel, sum(count["bytes_read"] for count in after.values()) - asked
            found[str(context)] = {
                "dram": dram,
                "page_cache_bypassed": all(one.storage.flash.direct for one in decoded.values()),
                "kernel_bytes_over_bytes_read": kernel / max(1, asked),
                "policies": {
                    policy: _row(times[policy], before[policy], after[policy], len(one.layers))
                    for policy, one in decoded.items()
                },
            }
        finally:
            for one in decoded.values():
                one.storage.close()
    return found


def _counts(one: Decoded) -> dict[str, float]:
    counters, table, transfers = one.storage.flash.counters, one.storage.table, one.storage.transfers
    ahead = transfers.asked.counters, transfers.expected.counters
    return {
        "bytes_read": counters.bytes_read,
        "reads": counters.reads,
        "entries_read": transfers.entries_read,
        "asked_bytes": transfers.entries_read * one.storage.entry_bytes,
        "read_seconds": transfers.read_seconds,
        "hits": table.hits,
        "misses": table.misses,
        "bytes_moved": transfers.bytes_moved,
        "read_ahead": sum(count.clusters for count in ahead),
        "read_ahead_used": sum(count.used for count in ahead),
        "read_ahead_waited": sum(count.waited for count in ahead),
    }


def _row(times: list[float], before: dict[str, float], after: dict[str, float], layers: int) -> dict[str, Any]:
    """Of one policy, for a step over all its layers. A window of `BATCH` steps takes tokens into clusters once."""
    spent = {name: after[name] - before[name] for name in after}
    steps = len(times)
    windows = [statistics.fmean(times[i : i + BATCH]) for i in range(0, steps, BATCH)]
    return {
        "layers": layers,
        "seconds": statistics.median(windows),
        "fastest_and_slowest": [min(windows), max(windows)],
        "median_of_single_steps": statistics.median(times),
        "bytes_read": spent["bytes_read"] / steps,
        "reads": spent["reads"] / steps,
        "entries_a_read": spent["entries_read"] / max(1, spent["reads"]),
        "bytes_over_missing": spent["bytes_read"] / max(1, spent["asked_bytes"]),
        "read_seconds": spent["read_seconds"] / steps,
        "hit_rate": spent["hits"] / max(1, spent["hits"] + spent["misses"]),
        "bytes_moved": spent["bytes_moved"] / steps,
        # Clusters a step that were on their way before they were fetched, those that then were, and what was waited.
        **{name: spent[name] / steps for name in spent if name.startswith("read_ahead")},
    }


def memory(trace_path: Path, count: int, contexts: Sequence[int], directory: Path, dram: int, budget: int) -> Any:
    """Resident memory of a process of its own while DynaKV decodes up to the longest context, every 512 tokens."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident, (trace_path, count, max(contexts), directory, dram, budget))


@torch.no_grad()
def _resident(trace_path: Path, count: int, context: int, directory: Path, dram: int, budget: int) -> dict[str, Any]:
    trace, process = Tiled.of(Trace.open(trace_path), count), psutil.Process()
    # What libraries set aside at their first use is no part of the cache.
    first = Decoded(trace, "dynakv", directory, dram, budget)
    first.fill(2 * PROMPT)
    first.storage.close()
    del first
    gc.collect()
    base = process.memory_info().rss
    one = Decoded(trace, "dynakv", directory, dram, budget)
    try:
        samples = []
        for tokens in range(PROMPT, context + 1, 512):
            one.fill(tokens)
            samples.append([tokens, process.memory_info().rss - base, one.dram])
    finally:
        one.storage.close()
    return {"dram": dram, "columns": ["tokens", "rss_above_start", "counted"], "samples": samples}
