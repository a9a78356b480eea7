"""Which clusters a query needs, and where their entries go in a dense batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvsched_kernels import choose_clusters, cluster_scores

from .clusters import ClusterIndex


@dataclass(frozen=True)
class Retrieval:
    """The clusters that a query needs, int64 `[N]` each, by stream and then by number.

    Args:
        stream, cluster: which.
        size: tokens in each.
    """

    stream: torch.Tensor
    cluster: torch.Tensor
    size: torch.Tensor


@dataclass(frozen=True)
class Places:
    """For every retrieved token, in the order of the clusters, int64 `[T]`.

    Args:
        cluster: index into the retrieval.
        offset: place inside the cluster.
        stream, column: place in a batch of `[S, width]` tokens that is packed to the left.
        width: tokens of the fullest stream.
    """

    cluster: torch.Tensor
    offset: torch.Tensor
    stream: torch.Tensor
    column: torch.Tensor
    width: int


def retrieve(index: ClusterIndex, query: torch.Tensor, budget: int) -> Retrieval:
    """The clusters that score highest for `query` `[S, G, D]`, at most `budget` tokens for each stream."""
    size = index.size[:, : index.width]
    chosen = choose_clusters(cluster_scores(query, index.centroid[:, : index.width]), size, budget)
    stream, cluster = chosen.nonzero(as_tuple=True)
    return Retrieval(stream, cluster, size[stream, cluster].long())


def places(stream: torch.Tensor, size: torch.Tensor, streams: int) -> Places:
    """Where the tokens of clusters go that belong to `stream` `[N]` (ascending) and hold `size` `[N]` tokens."""
    total = int(size.sum())
    cluster = torch.arange(len(size), device=size.device).repeat_interleave(size, output_size=total)
    token = torch.arange(total, device=size.device)
    offset = token - (size.cumsum(0) - size)[cluster]
    per_stream = torch.zeros(streams, dtype=torch.long, device=size.device).index_add_(0, stream, size)
    of = stream[cluster]
    column = token - (per_stream.cumsum(0) - per_stream)[of]
    return Places(cluster, offset, of, column, int(per_stream.max()))
