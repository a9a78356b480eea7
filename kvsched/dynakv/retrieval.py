"""What a query was given to attend to: the clusters that were chosen, and where their entries go in a dense batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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


@dataclass(frozen=True)
class Places:
    """Where tokens of some clusters go in a batch of `[S, width]` tokens that is packed to the left.

    Args:
        row: int64 `[T]`, for every token in the order of the clusters `stream * width + column`.
        width: tokens of the fullest stream.
    """

    row: np.ndarray
    width: int


def places(stream: np.ndarray, taken: np.ndarray, streams: int) -> Places:
    """Where tokens go of clusters that belong to `stream` `[N]` (ascending), `taken` `[N]` of each."""
    per_stream = np.bincount(stream, weights=taken, minlength=streams).astype(np.int64)
    width = int(per_stream.max())
    before = np.arange(streams) * width - (np.cumsum(per_stream) - per_stream)
    row = np.arange(int(per_stream.sum()))
    row += np.repeat(before, per_stream)
    return Places(row, width)
