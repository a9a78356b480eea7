"""The bench of DynaKV, on a trace of random vectors: what it counts and says, not how long that takes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from kvsched.trace import Trace
from kvsched_evals import dynakv_bench, dynakv_layers, dynakv_plots
from kvsched_evals.dynakv_verdicts import verdicts


@pytest.fixture
def trace(tmp_path):
    draw = torch.Generator().manual_seed(0)
    shapes = {"keys": (2, 300, 32), "values": (2, 300, 32), "queries": (4, 300, 32)}
    tensors = {
        f"layers.{layer}.{name}": torch.randn(shape, generator=draw).half()
        for layer in (0, 3)
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "trace", metadata={"model": "none", "prompt_length": "250", "scaling": "0.2"})
    return Trace.open(tmp_path / "trace")


def test_a_tiled_trace_has_no_end(trace):
    tiled = dynakv_layers.Tiled.of(trace, 2)
    keys, values, queries = tiled.part(3, range(299, 301))
    source = trace.layer(3)
    for part, whole in ((keys, source.keys), (values, source.values), (queries, source.queries)):
        assert torch.equal(part[0, :, 0], whole[:, 299].float()) and torch.equal(part[0, :, 1], whole[:, 0].float())
    assert tiled.kv_bytes(10) == 2 * 10 * 2 * (32 + 32) * 2


def test_what_steps_count(trace, tmp_path):
    tiled = dynakv_layers.Tiled.of(trace, 2)
    found = dynakv_layers.step_latency(tiled, dynakv_bench.POLICIES, [1280], tmp_path, 0.2, 64, 16)
    rows = found["1280"]["policies"]
    assert set(rows) == set(dynakv_bench.POLICIES)
    for row in rows.values():
        assert row["fastest_and_slowest"][0] <= row["seconds"] <= row["fastest_and_slowest"][1]
        assert row["bytes_over_missing"] >= 1 or row["reads"] == 0
        assert 0 < row["hit_rate"] <= 1
    assert rows["dynakv"]["bytes_read"] > 0
    if found["1280"]["page_cache_bypassed"]:
        assert found["1280"]["kernel_bytes_over_bytes_read"] > 0.9


def test_the_summary_of_a_replay(trace):
    found = dynakv_bench.quality(trace, [0], 32, 16, 1 << 20)
    ours = found["budgets"]["dynakv"]["32"]
    assert 0 < ours["worst_head"] <= ours["share_of_exact"] <= 1
    assert found["budgets"]["dynakv"]["512"]["recall"] > ours["recall"]
    assert set(found["every_layer"]) == {"dynakv", "static", "local"}
    assert len(found["every_layer"]["dynakv"]["heads"]) > len(ours["heads"]), "all layers, not those of the curves"
    assert 0 < found["on_flash"]["share_of_exact"] <= 1
    assert found["cluster_sizes"]["4.0"]["recall"] != found["cluster_sizes"]["24.0"]["recall"]


def result(factor: float) -> dict:
    """A result that is as good as the targets ask, or worse by `factor`."""
    quality = {"recall": 0.9, "share_of_exact": 0.98 / factor, "worst_head": 0.94, "index_share": 0.07}
    quality |= {"error": 1.0, "error_estimated": 0.4 * factor, "oracle_recall": 0.95}
    others = {"static": 1.5, "local": 1.4, "token-topk": 2.1, "dynakv": factor}
    step = {"layers": 1, "entries_a_read": 41 / factor, "bytes_over_missing": 1.1 * factor, "hit_rate": 0.5}
    steps = {name: {**step, "seconds": seconds, "bytes_read": 1.0} for name, seconds in others.items()}
    hits = {"cluster_aligned": 0.6 / factor, "least_recently_used": 0.5, "least_frequently_used": 0.55}
    model = {"4096": (1.05, 1.0), "8192": (1.06, 1.2), "32768": (1.1, 2.3)}
    compared = {name: quality | {"recall": 0.9 if name == "dynakv" else 0.7} for name in others}
    return {
        "quality": {
            "every_layer": compared,
            "budgets": {name: {"256": row} for name, row in compared.items()},
            "on_flash": quality,
            "cluster_sizes": {"24.0": quality},
        },
        "steps": {
            "4096": {"policies": steps, "page_cache_bypassed": True, "kernel_bytes_over_bytes_read": 1.0},
        },
        "memory": {"dram": 100, "samples": [[1024, 50, 40], [2048, 100 * factor, 90]]},
        "storage": {
            "moved": {"packed_over_pools": 1100 / factor},
            "dram": {"0.1": {"hit_rate": hits}},
            "cluster_sizes": {"3.0": step, "25.0": step | {"bytes_read_over_missing": 1.1}},
        },
        "model": {
            context: {"median_seconds": {"dynakv": a * factor, "dynamic": b}, "dynakv_over_dynamic": a * factor / b}
            for context, (a, b) in model.items()
        },
    }


@pytest.mark.parametrize(("factor", "met"), [(1.0, True), (1.3, False)])
def test_verdicts(factor, met):
    found = verdicts(result(factor))
    assert {target: verdict["met"] for target, verdict in found.items()} == dict.fromkeys(
        ["D2", "D3", "D4", "D5", "D6", "D7", "D8", "D9"], met
    )


def test_reads_from_memory_are_no_cold_cache():
    warm = result(1.0)
    warm["steps"]["4096"]["kernel_bytes_over_bytes_read"] = 0.1
    assert not verdicts(warm)["D4"]["met"]


def test_pictures_of_a_whole_and_of_a_broken_off_run(tmp_path):
    path = tmp_path / "dynakv.json"
    path.write_text(json.dumps(result(1.0)))
    names = {"dynakv-latency.png", "dynakv-reads.png", "dynakv-recall.png", "dynakv-memory.png"}
    assert {drawn.name for drawn in dynakv_plots.draw(path)} == names
    path.write_text(json.dumps({"steps": result(1.0)["steps"]}))
    assert {drawn.name for drawn in dynakv_plots.draw(path)} == {"dynakv-latency.png", "dynakv-reads.png"}
