"""How each token's key differs from the mean key of its cluster, in a few bits a channel.

Clusters are as large as reads from flash should be, which is too coarse to choose tokens by: a cluster that a query
wants for one token brings fifteen others. The mean and the residual together tell tokens of a cluster apart without
reading it. Residuals lie cluster after cluster without gaps, so they take what they say and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvsched_kernels import Vectors

from .ranks import ranks
from .table import VectorTable

_MOVED_AT_ONCE = 1 << 15
"""Tokens whose residuals move together, whole streams of them: no budget counts what that takes for a moment."""

_ROOM = 32
"""Tokens for which the table grows at a time."""


class TokenResiduals:
    """Residuals of the tokens of `streams` streams, in the order of their clusters.

    Args:
        width: channels of a key.
        bits: of a channel's code: 2, 4 or 8.

    Attributes:
        table: of all residuals.
        size: as `ClusterIndex.size` was when they were last put.
    """

    def __init__(self, streams: int, width: int, bits: int, size: torch.Tensor) -> None:
        self.size = size.clone()
        self.table = VectorTable(streams, width, bits, size.device)

    @property
    def nbytes(self) -> int:
        """Bytes of what grows with the tokens."""
        return self.table.nbytes + self.size.nbytes

    def put(self, stream: torch.Tensor, cluster: torch.Tensor, size: torch.Tensor, residuals: torch.Tensor) -> None:
        """Let clusters hold other tokens; all others keep theirs.

        Args:
            stream, cluster: int64 `[N]`, each once.
            size: int64 `[N]`, how many tokens; their `residuals` `[size.sum(), D]` are in turn.
        """
        changed = self.size.clone()
        changed[stream, cluster] = size.to(changed)
        kept = self.size > 0
        kept[stream, cluster] = False
        self._move(changed, kept)
        each = torch.arange(len(size), device=size.device).repeat_interleave(size)
        nth = torch.arange(len(each), device=size.device) - (size.cumsum(0) - size)[each]
        self.table.write(stream[each], self._starts()[stream, cluster][each] + nth, residuals)

    def append(self, stream: torch.Tensor, cluster: torch.Tensor, residuals: torch.Tensor) -> None:
        """Add tokens, `residuals` `[M, D]`, to clusters (int64 `[M]`), in turn where several go to one."""
        changed, before = self.size.clone(), self.size[stream, cluster].long()
        changed.index_put_((stream, cluster), torch.ones_like(stream).to(changed), accumulate=True)
        self._move(changed, self.size > 0)
        rank = ranks(stream * changed.shape[1] + cluster)
        self.table.write(stream, self._starts()[stream, cluster] + before + rank, residuals)

    @property
    def none(self) -> torch.Tensor:
        """Residuals of no tokens."""
        return self.table.offset.new_zeros(0, self.table.width)

    def lie(self, cluster: torch.Tensor) -> tuple[Vectors, torch.Tensor, torch.Tensor]:
        """All residuals, and of some clusters (int64 `[S, k]`) the first of their tokens' and how many, int64."""
        rows = self.table.data.shape[1]
        return self.table.vectors(rows), self._starts().gather(1, cluster), self.size.gather(1, cluster).long()

    def spread(self, query: torch.Tensor) -> torch.Tensor:
        """How far products with `query` `[S, G, D]` spread over tokens, by how far their keys do: `[S, G, 1]`.

        Both as standard deviations, of a key that of its length: channels spread unlike each other, as their steps do.
        """
        step = self.table.step
        length = step.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(step.dtype).tiny)
        return (query * step).norm(dim=-1, keepdim=True) / length

    def grow(self, clusters: int) -> None:
        """Make room for `clusters` of each stream."""
        more = self.size.new_zeros(len(self.size), clusters - self.size.shape[1])
        self.size = torch.cat([self.size, more], dim=1)

    def permute(self, order: torch.Tensor) -> None:
        """Number the clusters anew: int64 `[S, C]`, in which those that hold tokens keep their order."""
        self.size = self.size.gather(1, order)

    def truncate(self, gone: torch.Tensor) -> None:
        """Forget the clusters that bool `[S, C]` marks, behind which no other holds tokens."""
        self.size[gone] = 0

    def select(self, streams: torch.Tensor) -> None:
        """Keep `streams` (int64, repeats allowed) in this order."""
        self.size = self.size[streams]
        self.table.select(streams)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that it is made of but the sizes, by name."""
        return self.table.state()

    def restore(self, take: Callable[..., torch.Tensor], size: torch.Tensor) -> None:
        """Become what `state` gave, of clusters of `size`; `take(name, dtype, *shape)` hands the tensors out."""
        self.size = size.clone()
        self.table.restore(take, -1)
        if self.table.data.shape[1] < int(size.sum(1, dtype=torch.long).max()):
            raise ValueError("tokens without a residual")

    def _move(self, size: torch.Tensor, kept: torch.Tensor) -> None:
        """Let clusters have other sizes. The tokens of those that bool `[S, C]` marks go where they lie then."""
        before, have = self._starts(), self.table.data.shape[1]
        self.size = size
        after, rows = self._starts(), int(size.sum(1, dtype=torch.long).max())
        if rows > have:
            self.table.grow(-(-rows // _ROOM) * _ROOM)
        if not bool(((before != after) & kept).any()):
            return
        ends, shift, row = after + size, before - after, torch.arange(rows, device=size.device)
        step = max(1, _MOVED_AT_ONCE // rows)
        for some in (slice(start, start + step) for start in range(0, len(after), step)):
            own = row.repeat(len(after[some]), 1)
            of = torch.searchsorted(ends[some], own, right=True).clamp_max_(after.shape[1] - 1)
            self.table.permute(own.add_(shift[some].gather(1, of)).clamp_(0, have - 1), some)

    def _starts(self) -> torch.Tensor:
        """The row of each cluster's first token, int64 `[S, C]`."""
        return self.size.cumsum(1, dtype=torch.long) - self.size
