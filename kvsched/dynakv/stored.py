"""The clusters of one layer: what the index keeps of them in DRAM, and their entries wherever the storage has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from kvsched_kernels import members, moments, two_means

from .clusters import ClusterIndex, Clusters
from .entries import Packing
from .policies import Policy
from .pools import keep_order
from .ranks import ranks
from .retrieval import Retrieval
from .storage import ClusterStorage

_NUMBERS_AT_ONCE = 1 << 18
"""In copies of clusters padded to the largest, which no budget counts: 1 MiB in float32."""

_TAKEN_AT_ONCE = 1024
"""Tokens over all streams that are looked at together when some have to go."""


class StoredClusters:
    """Clusters of `streams` streams, which are the rows of the batch times the KV heads.

    Attributes:
        index: see `ClusterIndex`.
        splits: clusters of each stream that were split so far, int64 `[S]`.
        moved: entries of each stream that splits moved to another place on flash, int64 `[S]`.
    """

    def __init__(
        self, storage: ClusterStorage, policy: Policy, packing: Packing, streams: int, number: int = 0
    ) -> None:
        self.storage, self.policy, self.packing, self.streams = storage, policy, packing, streams
        self.form = form = packing.form
        self.largest = policy.config.max_cluster_size
        self._number, self._growing = number, policy.intake != "own"
        forms, chained = policy.forms(form.key_width, form.value_width), policy.intake == "chain"
        self.index = ClusterIndex(streams, forms, self.largest, form.device, chained, policy.residual_bits)
        self.splits, self.moved = torch.zeros(2, streams, dtype=torch.long, device=form.device).unbind()

    @contextmanager
    def index_in_dram(self) -> Iterator[None]:
        """Whatever reads or changes the index happens in here: elsewhere it may lie on flash."""
        self.storage.index_file.take(self._number, self.index)
        try:
            yield
        finally:
            if self.form.device.type == "cpu":  # what another device holds takes no DRAM
                self.storage.index_file.put(self._number, self.index)

    def resident(self, stream: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
        """bool `[N]`: which clusters can be used without reading."""
        return self._to_device(self.storage.resident(to_host(self.index.address[stream, cluster])))

    def in_dram(self, cluster: torch.Tensor) -> torch.Tensor:
        """bool `[S, k, max_cluster_size]`: which tokens of `cluster` (int64 `[S, k]`) can be used without reading;
        anything where there is none."""
        return self._to_device(self.storage.holds(self.index.address.gather(1, cluster).cpu().numpy()))

    def fetch(self, stream: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
        """The arena slots of clusters, int64 `[N]`, good until the next round of the storage."""
        address, size = self.index.address[stream, cluster], self.index.size[stream, cluster]
        return self._to_device(self.storage.fetch(to_host(address), to_host(size)))

    def fetch_own(self, stream: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
        """`fetch` for clusters that are about to change: those that other streams share are copied."""
        address, slots = self.storage.own(
            to_host(self.index.address[stream, cluster]), to_host(self.fetch(stream, cluster))
        )
        self.index.address[stream, cluster] = self._to_device(address).to(self.index.address)
        return self._to_device(slots)

    def read_ahead(self, stream: torch.Tensor, cluster: torch.Tensor) -> None:
        """Start reading clusters that are about to be fetched or gathered."""
        address, size = self.index.address[stream, cluster], self.index.size[stream, cluster]
        self.storage.prefetch(to_host(address), to_host(size))

    def expect_next(self, found: Retrieval) -> None:
        """This is what a step wanted; the storage reads ahead what it expects of the next layer."""
        address, size = self.index.address[found.stream, found.cluster], self.index.size[found.stream, found.cluster]
        wanted = found.kept
        if wanted is None:
            wanted = torch.arange(self.largest, device=size.device) < size.unsqueeze(1)
        self.storage.expect_next(self._number, to_host(address), to_host(wanted))

    def gather(
        self, stream: torch.Tensor, cluster: torch.Tensor, kept: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of clusters by stream: entries `[S, n, width]`, position int64 `[S, n]`, -1 where none is.

        Args:
            stream, cluster: int64 `[N]`, by stream.
            kept: bool `[N, m]`, which tokens are wanted; `None` for all.
        """
        address, size = self.index.address[stream, cluster], self.index.size[stream, cluster]
        wanted = None if kept is None else to_host(kept)
        entries, position = self.storage.gather(to_host(address), to_host(size), wanted, to_host(stream), self.streams)
        position, streams = position.to(self.form.device), torch.arange(self.streams, device=self.form.device)
        return self.packing.unpack(entries, position, streams.unsqueeze(1)), position

    def parts(self, tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All clusters, in parts of about `tokens` tokens over all streams: stream, number, int64 `[N]` by stream."""
        size = self.index.size[:, : self.index.width]
        part = size.sum(0, dtype=torch.long).cumsum(0) // max(1, tokens)
        start = 0
        for count in torch.unique_consecutive(part, return_counts=True)[1].tolist():
            stream, cluster = size[:, start : start + count].nonzero(as_tuple=True)
            yield stream, cluster + start
            start += count

    def create(
        self,
        entries: torch.Tensor,
        position: torch.Tensor,
        label: torch.Tensor,
        groups: torch.Tensor,
        chained: bool = False,
    ) -> None:
        """Make a cluster of each group; of a group too large for one, several with the vectors of the whole group.

        Args:
            entries: `[S, n, width]`, position: int64 `[S, n]`.
            label: int64 `[S, n]`, -1 for tokens that are left out; groups: int64 `[S]`, how many.
            chained: a group's number is that of a cluster whose chain it prolongs.
        """
        if not bool((label >= 0).any()):
            return
        self.packing.begin(entries, position, label >= 0)
        keys = self.form.apart(entries)[0].float()
        _, size, deviation = moments(keys, label, int(groups.max()))
        stream, group = size.nonzero(as_tuple=True)
        size, deviation = size[stream, group], deviation[stream, group]
        token = members(label, stream, group, int(size.max()))
        parts = [
            self._summarise(entries[stream[part].unsqueeze(1), token[part].clamp_min(0)], token[part] >= 0)
            for part in self._some(len(stream), token.shape[1])
        ]
        vectors = {name: torch.cat([part[name] for part in parts]) for name in self.index.tables}

        whole = torch.arange(len(stream), device=label.device).repeat_interleave(
            (size + self.largest - 1) // self.largest
        )
        link = ranks(whole)
        each = torch.arange(self.largest, device=label.device)
        column = (link * self.largest).unsqueeze(1) + each
        token = token[whole.unsqueeze(1), column.clamp_max(token.shape[1] - 1)].clamp_min(0)
        size = (size[whole] - column[:, 0]).clamp_max(self.largest)
        stream = stream[whole]
        for part in self.storage.rounds(len(stream)):
            nth, offset = (each < size[part].unsqueeze(1)).nonzero(as_tuple=True)
            here = stream[part][nth], token[part][nth, offset]
            packed = self.packing.pack(entries[here], position[here], here[0])
            address = self.storage.create(
                packed, to_host(size[part]), to_host(position[here]), to_host(self._pool(stream[part])), self._growing
            )
            own = {name: vector[whole[part]] for name, vector in vectors.items()}
            made = Clusters(stream[part], size[part], deviation[whole[part]], own, keys[here])
            self.index.create(made, self._to_device(address), link[part], group[whole[part]] if chained else None)

    def append(
        self,
        stream: torch.Tensor,
        cluster: torch.Tensor,
        slots: torch.Tensor,
        offset: torch.Tensor,
        entries: torch.Tensor,
        position: torch.Tensor,
    ) -> None:
        """Put entries `[M, width]`, positions `[M]` at `offset` `[M]` of clusters in `slots` `[M]`, without gaps."""
        packed = self.packing.pack(entries, position, stream)
        self.storage.append(to_host(slots), to_host(offset), packed, to_host(position))
        size = torch.bincount(stream * self.index.width + cluster, minlength=self.streams * self.index.width)
        self.index.size[:, : self.index.width] += size.view(self.streams, -1).to(self.index.size)

    def have_room(self, stream: torch.Tensor, cluster: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        """bool `[N]`: to which clusters (each once) `more` (int64 `[N]`) tokens can be added by `append_unread`."""
        size = self.index.size[stream, cluster].long() + more
        return self._to_device(self.storage.have_room(to_host(self.index.address[stream, cluster]), to_host(size)))

    def append_unread(
        self, stream: torch.Tensor, cluster: torch.Tensor, entries: torch.Tensor, position: torch.Tensor
    ) -> None:
        """Add entries `[M, width]` at `position` `[M]` to clusters wherever these lie.

        Their mean keys and values stay as they are, until the clusters are split: the residuals of the new tokens know
        how far these are from there, and the deviation grows by it.

        Args:
            stream, cluster: int64 `[M]`, ascending.
        """
        index, width = self.index, self.index.width
        group, count = torch.unique_consecutive(stream * width + cluster, return_counts=True)
        done = 0
        for part in self.storage.rounds(len(group)):
            some = slice(done, done + int(count[part].sum()))
            packed = self.packing.pack(entries[some], position[some], stream[some])
            address = to_host(index.address[group[part] // width, group[part] % width])
            self.storage.append_unread(address, to_host(count[part]), packed, to_host(position[some]))
            done = some.stop
        index.append(stream, cluster, self.form.apart(entries)[0].float())

    def refresh(self, stream: torch.Tensor, cluster: torch.Tensor, slots: torch.Tensor) -> None:
        """Take what the index keeps of clusters that changed from their entries, so that no rounding adds up."""
        for part in self._some(len(stream), self.largest):
            size = self.index.size[stream[part], cluster[part]].long()
            entries, mask = self._members(stream[part], slots[part], size)
            keys = self.form.apart(entries)[0]
            _, _, deviation = moments(keys, torch.where(mask, 0, -1), 1)
            changed = Clusters(stream[part], size, deviation[:, 0], self._summarise(entries, mask), keys[mask])
            self.index.replace(cluster[part], changed)

    def split(self, stream: torch.Tensor, cluster: torch.Tensor, slots: torch.Tensor) -> None:
        """Split clusters that lie in `slots`: the first half keeps its place, the second becomes a new cluster."""
        for part in self._some(len(stream), self.largest):
            self._split(stream[part], cluster[part], slots[part])

    def _split(self, stream: torch.Tensor, cluster: torch.Tensor, slots: torch.Tensor) -> None:
        entries, mask = self._members(stream, slots, self.index.size[stream, cluster])
        keys = self.form.apart(entries)[0]
        half = torch.where(mask, two_means(keys, mask).long(), -1)
        _, size, deviation = moments(keys, half, 2)

        order = keep_order(to_host(half == 1), to_host(mask.sum(1)))
        address = self.storage.split(to_host(slots), order, to_host(size))
        number = self.index.create(Clusters(stream, size[:, 1], deviation[:, 1], {}), self._to_device(address))
        first, second = (self._summarise(entries, half == side) for side in (0, 1))
        vectors = {name: torch.cat([first[name], second[name]]) for name in first}
        each, source = torch.arange(self.largest, device=stream.device), self._to_device(order)
        left, right = each < size[:, :1], (each >= size[:, :1]) & (each < size.sum(1, keepdim=True))
        keys = keys.gather(1, source.unsqueeze(2).expand_as(keys))
        in_turn = torch.cat([keys[left], keys[right]])
        halves = Clusters(stream.repeat(2), size.T.flatten(), deviation.T.flatten(), vectors, in_turn)
        self.index.replace(torch.cat([cluster, number]), halves)
        self.splits.index_add_(0, stream, torch.ones_like(stream))
        shifted = (source != each) & left
        self.moved.index_add_(0, stream, shifted.sum(1) + size[:, 1])

    def addresses(self) -> np.ndarray:
        """int64: the addresses of all clusters."""
        return to_host(self.index.address[self.index.clusters()])

    def take_out(self, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Remove all tokens from position `start` on. Clusters left empty keep their number until `index.drop_empty`.

        Yields:
            Stream int64 `[N]`, entries `[N, width]` and position int64 `[N]` of what was removed, part by part.
        """
        for stream, cluster in self.parts(_TAKEN_AT_ONCE):
            size = self.index.size[stream, cluster].long()
            (packed,), (position,) = self.storage.gather(to_host(self.index.address[stream, cluster]), to_host(size))
            packed, position = packed.to(self.form.device), position.to(self.form.device)
            of = torch.arange(len(size), device=size.device).repeat_interleave(size)
            kept = position < start
            left = torch.bincount(of[kept], minlength=len(size))
            touched = left < size
            if not touched.any():
                continue
            gone = ~kept
            yield stream[of[gone]], self.packing.unpack(packed[gone], position[gone], stream[of[gone]]), position[gone]
            kept &= touched[of]
            self._rewrite(stream[touched], cluster[touched], left[touched], packed[kept], position[kept])

    def _rewrite(
        self,
        stream: torch.Tensor,
        cluster: torch.Tensor,
        size: torch.Tensor,
        packed: torch.Tensor,
        position: torch.Tensor,
    ) -> None:
        """Give clusters the first `size` of entries, packed, `[sum of sizes, width]` in turn, at a new address."""
        self.free(stream, cluster)
        self.index.empty(stream, cluster)
        some = size > 0
        stream, cluster, size = stream[some], cluster[some], size[some]
        pool = to_host(self._pool(stream))
        address = self.storage.create(packed, to_host(size), to_host(position), pool, self._growing)
        self.index.address[stream, cluster] = self._to_device(address).to(self.index.address)
        of = torch.arange(len(size), device=size.device).repeat_interleave(size)
        entries = self.packing.unpack(packed, position, stream[of])
        padded = torch.zeros(len(size), self.largest, self.form.width, device=size.device)
        padded[of, ranks(of)] = entries.float()
        mask = torch.arange(self.largest, device=size.device) < size.unsqueeze(1)
        _, _, deviation = moments(self.form.apart(padded)[0], torch.where(mask, 0, -1), 1)
        # The vectors of a chain are those of all its tokens.
        vectors = {} if self.policy.intake == "chain" else self._summarise(padded, mask)
        keys = self.form.apart(entries)[0].float()
        self.index.replace(cluster, Clusters(stream, size, deviation[:, 0], vectors, keys))

    def free(self, stream: torch.Tensor, cluster: torch.Tensor) -> None:
        """Give room of clusters back; the caller takes them out of the index."""
        self.storage.free(to_host(self.index.address[stream, cluster]))

    def select(self, streams: torch.Tensor) -> None:
        """Keep `streams` (int64, repeats allowed) in this order; copies share their clusters until these change."""
        stream, cluster = self.index.clusters()
        copies = torch.bincount(streams, minlength=self.streams)[stream]
        address = self.index.address[stream, cluster]
        self.storage.share(to_host(address.repeat_interleave((copies - 1).clamp_min(0))))
        self.storage.free(to_host(address[copies == 0]))
        self.index.select(streams)
        self.packing.select(streams)
        self.splits, self.moved = self.splits[streams], self.moved[streams]
        self.streams = len(streams)

    def _some(self, clusters: int, largest: int) -> Iterator[slice]:
        """Parts of some clusters of which copies padded to `largest` entries take little memory."""
        step = max(1, _NUMBERS_AT_ONCE // (largest * self.form.width))
        return (slice(start, start + step) for start in range(0, clusters, step))

    def _members(
        self, stream: torch.Tensor, slots: torch.Tensor, size: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of clusters in DRAM, float32 `[N, max_cluster_size, width]`, and bool `[N, n]`, where one is."""
        each = torch.arange(self.largest, device=slots.device)
        at = to_host(slots.unsqueeze(1)), to_host(each)
        packed, position = self.storage.read(*at), self._to_device(self.storage.positions(*at))
        return self.packing.unpack(packed, position, stream.unsqueeze(1)).float(), each < size.unsqueeze(1)

    def _summarise(self, entries: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.policy.summarise(*self.form.apart(entries.float()), mask)

    def _pool(self, stream: torch.Tensor) -> torch.Tensor:
        """A number for each of `stream` that no other layer has: clusters of one stream lie together on flash."""
        return stream + self._number * self.streams

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.form.device)


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """An int64 (or bool) array on the host."""
    return (tensor if tensor.dtype == torch.bool else tensor.long()).cpu().numpy()
