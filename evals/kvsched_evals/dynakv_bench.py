"""`make bench-dynakv`: DynaKV against the ways it is compared with, on a recorded run and on the real model (D2-D9).

Each section is written when it is finished, and one that was measured with the same settings is not measured again, so
a long run can be broken off and taken up. `quality` replays the trace and compares every step with exact attention;
`steps` times the cache path with KV on flash, all policies taking turns; `storage` measures layouts, data moved and
replacement; `memory` follows one process; `model` times whole steps of the model, everything in DRAM.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

import kvsched
from kvsched import DynaKVConfig
from kvsched.replay import Outcome, Row, replay
from kvsched.trace import Trace, record

from .dynakv_layers import Tiled, dram_bytes, memory, step_latency
from .dynakv_plots import draw
from .dynakv_verdicts import verdicts
from .flash_bench import storage
from .machine import keep

POLICIES = ("dynakv", "static", "local", "token-topk")
BUDGETS = (64, 128, 256, 512)
CLUSTER_SIZES = (4.0, 8.0, 16.0, 24.0, 40.0)
TRACE_TOKENS, TRACE_PROMPT = 9216, 1024
TRACE = Path(tempfile.gettempdir()) / "kvsched-dynakv-trace.safetensors"
OUT = Path("evals/results/dynakv.json")


def recorded(path: Path) -> Trace:
    """The trace at `path`; without it, Python's language reference read by the default model, kept there."""
    if not path.exists():
        model, tokenizer = kvsched.load_model()
        text = "".join(topics[name] for name in sorted(topics, key=lambda name: -len(topics[name])))
        record(model, tokenizer(text, return_tensors="pt").input_ids[0, :TRACE_TOKENS], TRACE_PROMPT, path)
    return Trace.open(path)


def quality(trace: Trace, layers: Sequence[int], budget: int, every: int, dram: int) -> dict[str, Any]:
    """Recall and error of each policy over all layers, and over some of them at several budgets and sizes of the index.

    DRAM holds everything, but for `on_flash`: there it has `dram` bytes for each layer.
    """

    def outcome(policy: str, of: Sequence[int] = layers, **options: Any) -> dict[str, Any]:
        return _summary(replay(trace, DynaKVConfig(policy=policy, **{"dram": "2GiB"} | options), of, every))

    compared = [policy for policy in POLICIES if policy != "token-topk"]
    budgets = sorted({*BUDGETS, budget})
    return {
        "layers": list(layers),
        "every_layer": {policy: outcome(policy, trace.layers, budget=budget) for policy in compared},
        "budgets": {policy: {str(tokens): outcome(policy, budget=tokens) for tokens in budgets} for policy in compared},
        "on_flash": outcome("dynakv", trace.layers, budget=budget, dram=dram * len(trace.layers)),
        "cluster_sizes": {
            str(size): outcome("dynakv", budget=budget, cluster_size=size, max_cluster_size=int(2 * size))
            for size in CLUSTER_SIZES
        },
    }


def _summary(outcome: Outcome) -> dict[str, Any]:
    heads: dict[str, list[Row]] = {}
    for row in outcome.rows:
        heads.setdefault(f"{row.layer}.{row.head}", []).append(row)
    mean = {
        name: statistics.fmean(getattr(row, name) for row in outcome.rows)
        for name in ("recall", "oracle_recall", "error", "error_estimated", "tokens")
    }
    share = {name: sum(r.recall for r in own) / sum(r.oracle_recall for r in own) for name, own in heads.items()}
    return {
        **mean,
        "share_of_exact": mean["recall"] / mean["oracle_recall"],
        "worst_head": min(share.values()),
        "heads": share,
        "index_share": outcome.index_bytes / outcome.kv_bytes,
    }


@torch.no_grad()
def model_steps(trace: Trace, contexts: Sequence[int], directory: Path, steps: int) -> dict[str, Any]:
    """Whole steps of the model at each context, everything in DRAM: DynaKV and DynamicCache take turns.

    The caches are filled from the trace, so no context has to be computed.
    """
    model, _ = kvsched.load_model()
    tiled = Tiled.of(trace, len(trace.layers))
    found = {}
    for context in contexts:
        caches: dict[str, Cache] = {
            "dynamic": DynamicCache(config=model.config),
            "dynakv": kvsched.DynaKVCache(
                model.config, directory=directory, dram=4 * tiled.kv_bytes(context) + (64 << 20)
            ),
        }
        for number in tqdm(trace.layers, desc=f"filling {context}", file=sys.stderr):
            keys, values, queries = tiled.part(number, range(context))
            caches["dynamic"].layers[number].update(keys, values)
            layer = caches["dynakv"].layers[number]
            marked, values = layer.update(keys, values)
            layer.attention(lambda module, query, *_, **__: (query, None), None, queries, marked, values, None)
        times: dict[str, list[float]] = {name: [] for name in caches}
        for _ in tqdm(range(steps), desc=f"decoding at {context}", file=sys.stderr):
            for name, cache in caches.items():
                times[name].append(_step(model, cache))
        caches["dynakv"].close()
        medians = {name: statistics.median(of[1:]) for name, of in times.items()}
        found[str(context)] = {
            "median_seconds": medians,
            "mean_seconds": {name: statistics.fmean(of[1:]) for name, of in times.items()},
            "quartiles": {name: statistics.quantiles(of[1:], n=4)[::2] for name, of in times.items()},
            "dynakv_over_dynamic": medians["dynakv"] / medians["dynamic"],
        }
    return found


def _step(model: PreTrainedModel, cache: Cache) -> float:
    begin = time.perf_counter()
    model(torch.tensor([[1]]), past_key_values=cache)
    return time.perf_counter() - begin


def main(
    trace: Annotated[Path, typer.Option(help="A trace; recorded there if the file is missing.")] = TRACE,
    json_path: Annotated[Path, typer.Option("--json", help="Results; finished sections in it are kept.")] = OUT,
    directory: Annotated[Path, typer.Option(help="On the device to measure.")] = Path(),
    contexts: Annotated[str, typer.Option(help="Tokens.")] = "4096,8192,16384,32768",
    layers: Annotated[int, typer.Option(help="Of the trace, evenly spaced, for all but `model`.", min=1)] = 6,
    budget: Annotated[int, typer.Option(help="Tokens of each KV head.", min=1)] = 256,
    dram: Annotated[float, typer.Option(help="Share of keys and values that DRAM may hold in `steps`.")] = 0.25,
    steps: Annotated[int, typer.Option(help="Tokens decoded for each timing: whole windows of 16.", min=16)] = 64,
    every: Annotated[int, typer.Option(help="Steps of `quality` from one that is measured to the next.", min=1)] = 64,
) -> None:
    """Measure DynaKV's targets and write results, verdicts and pictures."""
    source = recorded(trace)
    tiled, each = Tiled.of(source, layers), sorted(int(context) for context in contexts.split(","))
    room = max(16 << 20, dram_bytes(dram, tiled, each[-1]))
    sections: dict[str, Callable[[], Any]] = {
        "steps": lambda: step_latency(tiled, POLICIES, each, directory, dram, budget, steps),
        "storage": lambda: storage(source, list(tiled.layers), directory, budget),
        "memory": lambda: memory(trace, layers, each, directory, room, budget),
        "model": lambda: model_steps(source, each, directory, steps // 2),
        "quality": lambda: quality(
            source, list(tiled.layers), budget, every, dram_bytes(dram, tiled, source.tokens) // layers
        ),
    }
    settings = {
        "trace": {"model": Path(source.model).name, "tokens": source.tokens, "layers": list(tiled.layers)},
        **{"contexts": each, "budget": budget, "dram_share": dram, "steps": steps, "every": every},
    }
    before = json.loads(json_path.read_text()) if json_path.exists() else {}
    result = {name: before[name] for name in sections if name in before} if before.get("settings") == settings else {}
    for name, measure in sections.items():
        if name not in result:
            result[name] = measure()
            keep(json_path, "dynakv_bench", {"settings": settings, "verdicts": verdicts(result), **result})
    keep(json_path, "dynakv_bench", {"settings": settings, "verdicts": verdicts(result), **result})
    for target, verdict in verdicts(result).items():
        typer.echo(f"{target}  {'met' if verdict['met'] else 'missed':7} {verdict['measured']}")
    for picture in draw(json_path):
        typer.echo(f"drawn {picture}")


if __name__ == "__main__":
    typer.run(main)
