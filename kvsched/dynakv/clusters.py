"""The index of one layer: what is kept in DRAM about its clusters, whose bytes may lie on flash.

A cluster has a size, the sum of squared deviations of its keys from their mean, the address of its bytes, and one
vector for each `VectorTable` that the policy asks for, such as its mean key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvsched_kernels import moments

from .ranks import ranks
from .residuals import TokenResiduals
from .table import VectorTable

_ROOM = 64
"""Clusters for which the tensors grow at a time. Doubling would leave up to half of the index empty."""


@dataclass(frozen=True)
class Clusters:
    """N clusters of given streams, as they enter the index.

    Args:
        stream: int64 `[N]`, ascending.
        size: int64 `[N]`, tokens.
        deviation: float32 `[N]`, sum over tokens and channels of squared deviations from the mean key.
        vectors: for each table float32 `[N, width]`.
        keys: float32 `[size.sum(), D]`, of their tokens in turn, where the index keeps residuals.
    """

    stream: torch.Tensor
    size: torch.Tensor
    deviation: torch.Tensor
    vectors: Mapping[str, torch.Tensor]
    keys: torch.Tensor | None = None


class ClusterIndex:
    """Clusters of `streams` streams (batch rows x KV heads), numbered from 0 in each.

    Tensors have room for C clusters; `width` of them are in use in the fullest stream.

    Attributes:
        tables: a `VectorTable` for each of `forms`, which gives name, numbers and bits a number.
        residuals: how the tokens' keys differ from the mean keys; `None` where that is not kept.
        size: uint8 `[S, C]` (int16 where clusters may exceed 255 tokens), 0 where there is no cluster.
        deviation: bfloat16 `[S, C]`; it only ranks clusters.
        address: int32 `[S, C]`, where the entries lie.
        parent: int32 `[S, C]` if `chained`: the first cluster of a chain, whose clusters share their vectors.
        count: int64 `[S]`, clusters of each stream.
    """

    def __init__(
        self,
        streams: int,
        forms: Mapping[str, tuple[int, int]],
        max_size: int,
        device: torch.device,
        chained: bool = False,
        residual_bits: int = 0,
    ) -> None:
        self.width = 0
        self.tables = {name: VectorTable(streams, width, bits, device) for name, (width, bits) in forms.items()}
        self.size = torch.zeros(streams, 0, dtype=torch.uint8 if max_size < 256 else torch.int16, device=device)
        self.deviation = torch.zeros(streams, 0, dtype=torch.bfloat16, device=device)
        self.address = torch.zeros(streams, 0, dtype=torch.int32, device=device)
        self.parent = torch.zeros(streams, 0, dtype=torch.int32, device=device)
        self.count = torch.zeros(streams, dtype=torch.long, device=device)
        self.residuals = (
            TokenResiduals(streams, forms["key"][0], residual_bits, self.size) if residual_bits > 0 else None
        )
        self._per_cluster = ("size", "deviation", "address", *(["parent"] if chained else []))

    @property
    def nbytes(self) -> int:
        """Bytes of what grows with the clusters."""
        tables = sum(table.nbytes for table in self._parts.values())
        return tables + sum(getattr(self, name).nbytes for name in self._per_cluster)

    @property
    def _parts(self) -> dict[str, VectorTable | TokenResiduals]:
        return {**self.tables, **({} if self.residuals is None else {"residuals": self.residuals})}

    @property
    def _vector_tables(self) -> list[VectorTable]:
        return [*self.tables.values(), *([] if self.residuals is None else [self.residuals.table])]

    def hand_out(self) -> tuple[list[torch.Tensor], bool]:
        """Its vectors, which are nowhere else afterwards, and whether they changed since `take_back`."""
        tables = self._vector_tables
        data, changed = [table.data for table in tables], any(table.changed for table in tables)
        for table in tables:
            table.data = table.data.new_empty(0)
        return data, changed

    def take_back(self, data: Sequence[torch.Tensor]) -> None:
        """The vectors that `hand_out` gave, wherever they lie now."""
        for table, own in zip(self._vector_tables, data, strict=True):
            table.data, table.changed = own, False

    @property
    def tokens(self) -> torch.Tensor:
        """Tokens in the clusters of each stream, int64 `[S]`."""
        return self.size.sum(1, dtype=torch.long)

    def clusters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Stream and number of every cluster, int64 `[N]` each, in ascending order."""
        stream, cluster = self.size[:, : self.width].nonzero(as_tuple=True)
        return stream, cluster

    def create(
        self,
        clusters: Clusters,
        address: torch.Tensor,
        link: torch.Tensor | None = None,
        parent: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add N clusters that lie at `address` (integer `[N]`).

        Args:
            link: int64 `[N]`, how many before it belong to the same chain.
            parent: int64 `[N]`, the first cluster of the chain that it prolongs, if that is not among the N.

        Returns:
            int64 `[N]`, their numbers.
        """
        number = self.count[clusters.stream] + ranks(clusters.stream)
        self.count += torch.bincount(clusters.stream, minlength=len(self.count))
        self.width = int(self.count.max())
        if (capacity := self.size.shape[1]) < self.width:
            wanted = -(-self.width // _ROOM) * _ROOM
            for name in self._per_cluster:
                old = getattr(self, name)
                more = old.new_zeros(old.shape[0], wanted - capacity, *old.shape[2:])
                setattr(self, name, torch.cat([old, more], dim=1))
            for table in self._parts.values():
                table.grow(wanted)
        self.address[clusters.stream, number] = address.to(self.address)
        if "parent" in self._per_cluster:
            first = number if link is None else number - link
            self.parent[clusters.stream, number] = (first if parent is None else parent).to(self.parent)
        self.replace(number, clusters)
        return number

    def replace(self, number: torch.Tensor, clusters: Clusters) -> None:
        """Give the clusters `number` (int64 `[N]`) of `clusters.stream` other tokens; their addresses stay."""
        stream = clusters.stream
        for name, vectors in clusters.vectors.items():
            self.tables[name].write(stream, number, vectors)
        self.size[stream, number] = clusters.size.to(self.size)
        self.deviation[stream, number] = clusters.deviation.to(self.deviation)
        if self.residuals is not None and clusters.keys is not None:
            mean = self.tables["key"].at(stream, number).repeat_interleave(clusters.size, dim=0)
            self.residuals.put(stream, number, clusters.size, clusters.keys - mean)

    def append(self, stream: torch.Tensor, number: torch.Tensor, keys: torch.Tensor) -> None:
        """Add tokens, float32 `keys` `[M, D]`, to clusters (int64 `[M]`, ascending), whose vectors stay."""
        assert self.residuals is not None
        residual = keys - self.tables["key"].at(stream, number)
        one = torch.ones_like(stream)
        self.size.index_put_((stream, number), one.to(self.size), accumulate=True)
        deviation = self.deviation.float()
        deviation.index_put_((stream, number), residual.square().sum(-1), accumulate=True)
        self.deviation = deviation.to(self.deviation)
        self.residuals.append(stream, number, residual)

    def empty(self, stream: torch.Tensor, number: torch.Tensor) -> None:
        """Let clusters hold nothing; they keep their numbers until `drop_empty`."""
        self.size[stream, number] = 0
        if self.residuals is not None:
            self.residuals.put(stream, number, torch.zeros_like(number), self.residuals.none)

    def tail(self, stream: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
        """The cluster that a token joins which is nearest to `cluster`: the last of its chain. int64 `[N]`."""
        if "parent" not in self._per_cluster:
            return cluster
        number = torch.arange(self.width, device=cluster.device).expand(len(self.count), -1)
        parent = self.parent[:, : self.width].long()
        last = torch.zeros_like(number).scatter_reduce_(
            1, parent, torch.where(self.size[:, : self.width] > 0, number, 0), "amax"
        )
        return last[stream, parent[stream, cluster]]

    def follow(self, keys: torch.Tensor, label: torch.Tensor) -> None:
        """Move the mean keys of chains by tokens that joined them: a running mean, exact up to rounding.

        Args:
            keys: float32 `[S, n, D]`.
            label: int64 `[S, n]`, the first cluster of the chain, -1 for none. Their sizes count these tokens already.
        """
        table, parent = self.tables["key"], self.parent[:, : self.width].long()
        size = self.size[:, : self.width].long()
        total = torch.zeros_like(size).scatter_add_(1, parent, size)
        mean, count, _ = moments(keys, label, self.width)
        before = table.read(self.width)
        after = before + (mean - before) * (count / total.clamp_min(1)).unsqueeze(-1)
        stream, cluster = self.clusters()
        table.write(stream, cluster, after[stream, parent[stream, cluster]])

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that it is made of, by name."""
        own = {name: getattr(self, name) for name in self._per_cluster}
        return own | {f"{of}.{name}": part for of, table in self._parts.items() for name, part in table.state().items()}

    def restore(self, take: Callable[..., torch.Tensor], addresses: torch.Tensor) -> None:
        """Become what `state` gave; `take(name, dtype, *shape)` hands the tensors out.

        Args:
            addresses: int64, what the addresses of then are now; -1 where there is none.
        """
        streams = len(self.count)
        size = take("size", self.size.dtype, streams, -1)
        room = size.shape[1]
        for name in self._per_cluster:
            setattr(self, name, take(name, getattr(self, name).dtype, streams, room))
        for of, table in self.tables.items():
            table.restore(functools.partial(_under, take, of), room)
        if self.residuals is not None:
            self.residuals.restore(functools.partial(_under, take, "residuals"), size)
        live = size > 0
        self.count = live.sum(1)
        self.width = int(self.count.max())
        if not torch.equal(live, torch.arange(room, device=size.device) < self.count.unsqueeze(1)):
            raise ValueError("its clusters are not numbered in turn")
        if "parent" in self._per_cluster and bool((self.parent[live] >= self.width).any()):
            raise ValueError("a chain begins with a cluster that is not there")
        self.address[live] = addresses[self.address[live].long()].to(self.address)
        if bool((self.address[live] < 0).any()):
            raise ValueError("a cluster has no entries")

    def drop_empty(self) -> None:
        """Number the clusters anew, in the same order, without those whose size has become 0."""
        empty = self.size == 0
        order = empty.to(torch.uint8).argsort(dim=1, stable=True)
        self.count = (~empty).sum(1)
        self.width = int(self.count.max())
        for name in self._per_cluster:
            setattr(self, name, getattr(self, name).gather(1, order))
        for table in self._parts.values():
            table.permute(order)
        if "parent" in self._per_cluster:
            # A chain is named by its first cluster; that one may be gone.
            parent, number = self.parent.long(), torch.arange(order.shape[1], device=order.device).expand_as(order)
            first = torch.full_like(parent, order.shape[1]).scatter_reduce_(
                1, parent, torch.where(self.size > 0, number, order.shape[1]), "amin"
            )
            self.parent = torch.where(self.size > 0, first.gather(1, parent), 0).to(self.parent)

    def truncate(self, count: torch.Tensor) -> None:
        """Forget all clusters of each stream but the first `count` (int64 `[S]`)."""
        gone = torch.arange(self.size.shape[1], device=count.device) >= count.unsqueeze(1)
        self.size[gone] = 0
        if self.residuals is not None:
            self.residuals.truncate(gone)
        self.count = count.clone()
        self.width = int(count.max())

    def select(self, streams: torch.Tensor) -> None:
        """Keep `streams` (int64, repeats allowed) in this order. Repeated clusters have the same addresses."""
        for name in (*self._per_cluster, "count"):
            setattr(self, name, getattr(self, name)[streams])
        for table in self._parts.values():
            table.select(streams)
        self.width = int(self.count.max())


def _under(take: Callable[..., torch.Tensor], of: str, name: str, *form: Any) -> torch.Tensor:
    return take(f"{of}.{name}", *form)
