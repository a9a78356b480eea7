"""The bench of the storage path, on a trace of random vectors: what it counts, not how long that takes."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save_file

from kvsched.dynakv.flash import FlashFile
from kvsched.trace import Trace
from kvsched_evals import flash_bench


def test_what_it_counts(tmp_path):
    draw = torch.Generator().manual_seed(0)
    shapes = {"keys": (2, 300, 32), "values": (2, 300, 32), "queries": (4, 300, 32)}
    tensors = {
        f"layers.{layer}.{name}": torch.randn(shape, generator=draw).half()
        for layer in (0, 3)
        for name, shape in shapes.items()
    }
    metadata = {"model": "none", "prompt_length": "200", "scaling": "0.2"}
    save_file(tensors, tmp_path / "trace.safetensors", metadata=metadata)
    trace = Trace.open(tmp_path / "trace.safetensors")
    result = flash_bench.storage(trace, trace.layers, tmp_path, 32, prompt=256, steps=20, shares=(0.3,), repeats=1)
    assert result["entry_bytes"] == 128
    layouts = result["dram"]["0.3"]["layouts"]
    direct = layouts.pop("direct")
    assert layouts["token_by_token"]["entries_a_read"] == 1
    assert layouts["tokens"]["reads"] > layouts["clusters"]["reads"]
    file = FlashFile(tmp_path, 1)
    assert direct == {"alignment": file.alignment, "page_cache_bypassed": file.direct}
    file.close()
    assert all(row["bytes_read_over_missing"] >= 1 for row in layouts.values())
    assert result["moved"]["packed_over_pools"] > 1
    sizes = result["cluster_sizes"]
    assert sizes["8.0"]["entries_a_read"] > 2 * sizes["3.0"]["entries_a_read"]


def test_every_layout_has_each_entry_once_and_orders_clusters_as_it_says():
    label = np.array([1, 0, 1, 2, 0, 0])
    head = flash_bench.Head(label, np.bincount(label), np.array([2, 0, 1]), [], np.array([]))
    found = flash_bench.layouts([[head, head]])
    for places in found.values():
        assert sorted(np.concatenate(places).tolist()) == list(range(12))
    assert [part.tolist() for part in found["tokens"][:3]] == [[1, 4, 5], [0, 2], [3]]
    assert [part.tolist() for part in found["clusters"][:3]] == [[0, 1, 2], [3, 4], [5]]
    assert [part.tolist() for part in found["co_retrieved"][3:]] == [[7, 8, 9], [10, 11], [6]]
