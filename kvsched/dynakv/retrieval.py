"""What a query was given to attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Retrieval:
    """The clusters that a query needs, int64 `[N]` each, by stream.

    Args:
        stream, cluster: which.
        kept: bool `[N, m]`, the tokens that take part in attention; `None` for all of them.
    """

    stream: torch.Tensor
    cluster: torch.Tensor
    kept: torch.Tensor | None = None

    @classmethod
    def of_clusters(cls, chosen: torch.Tensor) -> Retrieval:
        """The clusters that bool `[S, C]` marks."""
        return cls(*chosen.nonzero(as_tuple=True))

    @classmethod
    def of_tokens(cls, cluster: torch.Tensor, kept: torch.Tensor) -> Retrieval:
        """The tokens that bool `kept` `[S, k, m]` marks of clusters, int64 `[S, k]`."""
        stream, nth = kept.any(2).nonzero(as_tuple=True)
        return cls(stream, cluster[stream, nth], kept[stream, nth])
