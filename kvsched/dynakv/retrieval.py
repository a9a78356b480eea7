"""What a query was given to attend to: the clusters that were chosen, and where their entries go in a dense batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Retrieval:
    """The clusters that a query needs, int64 `[N]` each, by stream and then by number.

    Args:
        chosen: bool `[S, C]`, which of all.
        stream, cluster: the same as numbers.
        size: tokens in each.
        kept: bool `[N, max_size]`, the tokens that take part in attention; `None` for all of them.
    """

    chosen: torch.Tensor
    stream: torch.Tensor
    cluster: torch.Tensor
    size: torch.Tensor
    kept: torch.Tensor | None = None

    @classmethod
    def of(cls, chosen: torch.Tensor, size: torch.Tensor, kept: torch.Tensor | None = None) -> Retrieval:
        """What bool `chosen` `[S, C]` marks, with integer sizes `[S, C]` and bool `kept` `[S, C, max_size]`."""
        stream, cluster = chosen.nonzero(as_tuple=True)
        kept = None if kept is None else kept[stream, cluster]
        return cls(chosen, stream, cluster, size[stream, cluster].long(), kept)


@dataclass(frozen=True)
class Places:
    """Where the tokens of some clusters go in a batch of `[S, width]` tokens that is packed to the left.

    Args:
        row: int64 `[T]`, for every token in the order of the clusters `stream * width + column`, -1 where it is left
            out.
        width: tokens of the fullest stream.
    """

    row: np.ndarray
    width: int


def places(stream: np.ndarray, size: np.ndarray, streams: int, kept: np.ndarray | None = None) -> Places:
    """Where the tokens of clusters go that belong to `stream` `[N]` (ascending) and hold `size` `[N]` tokens.

    Of these only the tokens that `kept` (bool `[N, max_size]`) marks get a place, if it is given.
    """
    of = np.repeat(stream, size)
    wanted = None if kept is None else kept[np.arange(kept.shape[1]) < size[:, None]]
    taken = of if wanted is None else of[wanted]
    per_stream = np.bincount(taken, minlength=streams)
    width = max(per_stream.tolist())
    before = np.arange(streams) * width - (np.cumsum(per_stream) - per_stream)
    place = np.arange(len(taken)) + before[taken]
    if wanted is None:
        return Places(place, width)
    row = np.full(len(of), -1, dtype=np.int64)
    row[wanted] = place
    return Places(row, width)
