"""What a query was given to attend to: the clusters that were chosen, and where their entries go in a dense batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Retrieval:
    """The clusters that a query needs, int64 `[N]` each, by stream and then by number.

    Args:
        stream, cluster: which.
        size: tokens in each.
        kept: bool `[N, max_size]`, the tokens that take part in attention; `None` for all of them.
    """

    stream: torch.Tensor
    cluster: torch.Tensor
    size: torch.Tensor
    kept: torch.Tensor | None = None

    @classmethod
    def of(cls, chosen: torch.Tensor, size: torch.Tensor) -> Retrieval:
        """What bool `chosen` `[S, C]` marks, with integer sizes `[S, C]`."""
        stream, cluster = chosen.nonzero(as_tuple=True)
        return cls(stream, cluster, size[stream, cluster].long())


@dataclass(frozen=True)
class Places:
    """For every wanted token of some clusters, in the order of the clusters, int64 `[T]`.

    Args:
        token: its number among all tokens of the clusters.
        stream, column: place in a batch of `[S, width]` tokens that is packed to the left.
        width: tokens of the fullest stream.
    """

    token: torch.Tensor
    stream: torch.Tensor
    column: torch.Tensor
    width: int


def places(stream: torch.Tensor, size: torch.Tensor, streams: int, kept: torch.Tensor | None = None) -> Places:
    """Where the tokens of clusters go that belong to `stream` `[N]` (ascending) and hold `size` `[N]` tokens.

    Of these only the tokens that `kept` (bool `[N, max_size]`) marks get a place, if it is given.
    """
    total = int(size.sum())
    cluster = torch.arange(len(size), device=size.device).repeat_interleave(size, output_size=total)
    token = torch.arange(total, device=size.device)
    if kept is not None:
        inside = kept[cluster, token - (size.cumsum(0) - size)[cluster]]
        cluster, token = cluster[inside], token[inside]
    of = stream[cluster]
    per_stream = torch.bincount(of, minlength=streams)
    column = torch.arange(len(of), device=size.device) - (per_stream.cumsum(0) - per_stream)[of]
    return Places(token, of, column, int(per_stream.max()))
