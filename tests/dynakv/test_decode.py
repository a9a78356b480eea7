"""One decoding step: which tokens it finds among clusters that are laid out by hand."""

from __future__ import annotations

import torch

from kvsched import DynaKVConfig
from kvsched.dynakv.decode import Decoder
from kvsched.dynakv.dense import DenseTokens
from kvsched.dynakv.entries import EntryForm, packing_of
from kvsched.dynakv.policies import DynaKV
from kvsched.dynakv.storage import ClusterStorage
from kvsched.dynakv.stored import StoredClusters

DIM, TIGHT, WIDE, SIZE = 4, 12, 4, 4
BUDGET = 2
OPTIONS = {"sinks": 0, "recent": 1, "budget": BUDGET, "cluster_size": SIZE, "max_cluster_size": 8, "dram": "1MB"}


def test_tokens_far_from_their_clusters_mean_are_found(tmp_path):
    """Clusters with better means have no token worth attending to."""
    keys = torch.zeros(TIGHT + WIDE, SIZE, DIM)
    keys[:TIGHT, :, 1] = torch.tensor([-0.5, -0.5, 0.5, 0.5])  # spread, but not where the query points
    keys[TIGHT:, :, 0] = torch.tensor([2.0, -1.5, -1.5, -1.5])
    entries = torch.cat([keys.flatten(0, 1), torch.randn((TIGHT + WIDE) * SIZE, DIM)], dim=1).unsqueeze(0)
    config = DynaKVConfig(directory=tmp_path, storage="float32", **OPTIONS)
    storage, form = ClusterStorage(config), EntryForm(DIM, DIM, torch.float32, torch.device("cpu"))
    packing = packing_of(config.storage, form, 1, ())
    storage.open(packing.width, packing.dtype)
    clusters = StoredClusters(storage, DynaKV(config), packing, 1)
    position = torch.arange(entries.shape[1]).unsqueeze(0)
    clusters.create(entries, position, position // SIZE, torch.tensor([TIGHT + WIDE]))
    found = []
    decoder = Decoder(clusters, DenseTokens(1, form.width, 0, 1, form.dtype, form.device))
    decoder.retrieve = lambda chosen, take=decoder.retrieve: found.append(take(chosen)) or found[-1]
    query = torch.zeros(1, 1, DIM)
    query[..., 0] = 8.0
    decoder.parts(query, 1.0, None, None, entries.shape[1])
    ((_, kept),) = found
    assert {*kept[0].tolist()} <= {(TIGHT + nth) * SIZE for nth in range(WIDE)}
    assert kept.shape == (1, BUDGET)
    storage.close()
