"""What becomes of tokens that leave the recent window: DynaKV's Algorithm 1, and the ways it is compared with.

A token joins its nearest cluster without a read where that has room on flash. Else it waits in DRAM until the cluster
is there too; when too many wait, the clusters most of them wait for are loaded. Clusters that grew too large or too
wide are split.
"""

from __future__ import annotations

import torch

from kvsched_kernels import moments

from .affinity import number
from .dense import BATCH, WAITING, DenseTokens
from .policies import pages
from .ranks import ranks
from .stored import StoredClusters


class Intake:
    """Brings tokens of one layer into clusters, as `clusters.policy.intake` says.

    Attributes:
        grouped: int64 `[S]`, the first clusters of each stream that stay as they are; those behind them are grouped
            again with what follows (intake "own").
    """

    def __init__(self, clusters: StoredClusters, dense: DenseTokens) -> None:
        self.clusters, self.dense, self.policy = clusters, dense, clusters.policy
        self.grouped = clusters.index.count.clone()

    def take(self, entries: torch.Tensor, position: torch.Tensor, query: torch.Tensor | None = None) -> bool:
        """Take in new tokens `[S, q, width]` at `position` (int64 `[S, q]`, -1 for padding).

        Args:
            query: those of their queries that tell how clusters are retrieved (`affinity`), `[S, G, Q, D]`, scaled.

        Returns:
            Whether tokens began to wait, so that `settle` has to follow.
        """
        left = self.dense.push(entries, position)
        if left is None:
            return False
        entries, position = left
        if self.policy.intake == "own":
            self._group_alone(entries, position)
            return False
        if int((position >= 0).sum(1).max()) > WAITING:
            self._group(entries, position, query)
            return False
        for i, part in enumerate(zip(entries.split(BATCH, dim=1), position.split(BATCH, dim=1), strict=True)):
            if i > 0:
                self.settle()
            self.dense.wait(*part)
        return True

    def settle(self) -> None:
        """Bring waiting tokens into their clusters until no more than `WAITING` wait in any stream (Algorithm 1)."""
        while True:
            self._append_to_resident()
            if self.policy.residual_bits:
                self._append_unread()
            waiting = self.dense.position[:, self.dense.waiting] >= 0
            over = waiting.sum(1) > WAITING
            if not over.any():
                break
            first = over & (self.clusters.index.count == 0)
            if first.any():
                taken = waiting & first.unsqueeze(1)
                region = self.dense.waiting
                position = torch.where(taken, self.dense.position[:, region], -1)
                self._group(self.dense.entries[:, region], position)
                self.dense.end_wait(*taken.nonzero(as_tuple=True))
            else:
                self._load_fullest(waiting.sum(1) - WAITING)
        if self.policy.intake == "split":
            self._split_widest()

    def crop(self, end: int) -> None:
        """Forget all tokens from position `end` on, which lies before the recent window; older ones fill it again."""
        start = self.dense.rewind(end)
        for stream, entries, position in self.clusters.take_out(start):
            self.dense.put_back(stream, entries, position, end)
        index = self.clusters.index
        number = torch.arange(index.size.shape[1], device=index.size.device)
        self.grouped = ((index.size > 0) & (number < self.grouped.unsqueeze(1))).sum(1)
        index.drop_empty()

    def select(self, streams: torch.Tensor) -> None:
        """Keep `streams` (int64, repeats allowed) in this order."""
        self.grouped = self.grouped[streams]

    def _group_alone(self, entries: torch.Tensor, position: torch.Tensor) -> None:
        """Group tokens with those since the last `segment`, once there are enough of them; until then page by page."""
        index = self.clusters.index
        stream, cluster = index.clusters()
        loose = cluster >= self.grouped[stream]
        stream, cluster = stream[loose], cluster[loose]
        held = torch.zeros_like(self.grouped).index_add_(0, stream, index.size[stream, cluster].long())
        if index.width and int((held + (position >= 0).sum(1)).max()) < self.policy.segment:
            self.clusters.create(entries, position, *pages(position >= 0, BATCH))
            return
        if len(stream):
            before, there = self.clusters.gather(stream, cluster)
            entries, position = torch.cat([before, entries], dim=1), torch.cat([there, position], dim=1)
            self.clusters.free(stream, cluster)
            index.truncate(self.grouped)
        self._group(entries, position)
        self.grouped = index.count.clone()

    def _group(self, entries: torch.Tensor, position: torch.Tensor, query: torch.Tensor | None = None) -> None:
        """Make clusters of tokens by themselves, as the policy groups them, in stretches of text of its choice.

        Those of a prompt come in the order in which its own queries say that they should lie.
        """
        whole = position.shape[1]
        step = -(-whole // -(-whole // (self.policy.together or whole)))
        for stretch, at in zip(entries.split(step, dim=1), position.split(step, dim=1), strict=True):
            keys = self.clusters.form.apart(stretch)[0].float()
            label, groups = self.policy.group(keys, at >= 0)
            if query is not None and self.policy.ordered and bool(groups.any()):
                centroid, size, _ = moments(keys, label, int(groups.max()))
                budget = self.policy.config.tokens_for(int(at.max()) + 1)
                label = number(label, centroid, size, query.float(), budget)
            self.clusters.create(stretch, at, label, groups)

    def _waiting_clusters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Stream, column in the waiting region and nearest cluster of each waiting token, where there are clusters."""
        region, index = self.dense.waiting, self.clusters.index
        waiting = (self.dense.position[:, region] >= 0) & (index.count > 0).unsqueeze(1)
        used = waiting.any(0).nonzero()[:, 0]
        stream, nth = waiting[:, used].nonzero(as_tuple=True)
        if len(stream) == 0:
            return stream, nth, nth
        keys = self.clusters.form.apart(self.dense.entries[:, region])[0][:, used].float()
        return stream, used[nth], index.tail(stream, self.policy.nearest(keys, index)[stream, nth])

    def _append_to_resident(self) -> None:
        """Append waiting tokens to clusters that are in DRAM, and split those without room for them."""
        clusters, index = self.clusters, self.clusters.index
        while True:
            stream, column, cluster = self._waiting_clusters()
            here = clusters.resident(stream, cluster)
            stream, column, cluster = stream[here], column[here], cluster[here]
            if len(stream) == 0:
                return
            width = index.width
            group, of = torch.unique(stream * width + cluster, return_inverse=True)
            offset = index.size[stream, cluster].long() + ranks(of)
            fits = offset < clusters.largest
            full = torch.zeros(len(group), dtype=torch.bool, device=of.device).index_fill_(0, of[~fits], True)
            for part in clusters.storage.rounds(len(group)):
                s, c = group[part] // width, group[part] % width
                slots = clusters.fetch_own(s, c)
                some = fits & (of >= part.start) & (of < part.stop)
                self._append(stream[some], column[some], cluster[some], offset[some], slots[of[some] - part.start])
                if self.policy.intake == "split":
                    clusters.refresh(s, c, slots)
                    clusters.split(s[full[part]], c[full[part]], slots[full[part]])
            if self.policy.intake == "chain":
                self._prolong(stream, column, index.parent[stream, cluster].long(), fits)
                return
            if fits.all():
                return

    def _append_unread(self) -> None:
        """Append waiting tokens to clusters on flash that have room for them."""
        stream, column, cluster = self._waiting_clusters()
        if len(stream) == 0:
            return
        clusters, width = self.clusters, self.clusters.index.width
        group, of, count = torch.unique(stream * width + cluster, return_inverse=True, return_counts=True)
        fits = clusters.have_room(group // width, group % width, count)
        order = of.argsort(stable=True)
        order = order[fits[of[order]]]
        stream, column, cluster = stream[order], column[order], cluster[order]
        region = self.dense.waiting
        entries, position = self.dense.entries[:, region], self.dense.position[:, region]
        clusters.append_unread(stream, cluster, entries[stream, column], position[stream, column])
        self.dense.end_wait(stream, column)

    def _append(
        self,
        stream: torch.Tensor,
        column: torch.Tensor,
        cluster: torch.Tensor,
        offset: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        entries = self.dense.entries[:, self.dense.waiting][stream, column]
        position = self.dense.position[:, self.dense.waiting][stream, column]
        self.clusters.append(stream, cluster, slots, offset, entries, position)
        self.dense.end_wait(stream, column)

    def _prolong(
        self, stream: torch.Tensor, column: torch.Tensor, parent: torch.Tensor, appended: torch.Tensor
    ) -> None:
        """Let chains follow the tokens that join them; those that were not `appended` make further clusters."""
        region, index = self.dense.waiting, self.clusters.index
        entries, position = self.dense.entries[:, region], self.dense.position[:, region]
        label = torch.full(position.shape, -1, dtype=torch.long, device=position.device)
        label[stream[~appended], column[~appended]] = parent[~appended]
        self.clusters.create(entries, position, label, index.count, chained=True)
        self.dense.end_wait(stream[~appended], column[~appended])
        label[stream, column] = parent
        index.follow(self.clusters.form.apart(entries)[0].float(), label)

    def _load_fullest(self, excess: torch.Tensor) -> None:
        """Fetch the clusters that most tokens wait for, in each stream enough of them for `excess` (int64 `[S]`).

        They come together: each alone would be a read that is waited for.
        """
        width = self.clusters.index.width
        stream, _, cluster = self._waiting_clusters()
        group, tokens = torch.unique(stream * width + cluster, return_counts=True)
        order = tokens.argsort(descending=True, stable=True)
        order = order[(group[order] // width).argsort(stable=True)]
        group, tokens = group[order], tokens[order]
        stream = group // width
        before = tokens.cumsum(0) - tokens
        first = torch.full_like(excess, int(tokens.sum())).scatter_reduce_(0, stream, before, "amin")
        group = group[before - first[stream] < excess[stream]]
        for part in self.clusters.storage.rounds(len(group)):
            self.clusters.fetch(group[part] // width, group[part] % width)

    def _split_widest(self) -> None:
        """Split clusters until there is one for `cluster_size` tokens, those with the largest deviation first.

        So the threshold tau of a head, which the paper leaves open, is the deviation above which there is room for its
        clusters in an index of the size wanted. Of the widest clusters those on flash are read: that is one for as many
        tokens as a cluster holds, and the paper's forced splits read as much.
        """
        index = self.clusters.index
        room = (index.tokens / self.policy.cluster_size).long() - index.count
        if not (room > 0).any():
            return
        worth = index.deviation.float().masked_fill_(index.size < 2, 0.0)
        best = worth.topk(min(int(room.max()), worth.shape[1]), dim=1)
        rank = torch.arange(best.indices.shape[1], device=worth.device)
        stream, column = ((rank < room.unsqueeze(1)) & (best.values > 0)).nonzero(as_tuple=True)
        cluster = best.indices[stream, column]
        for part in self.clusters.storage.rounds(len(stream)):
            self.clusters.split(stream[part], cluster[part], self.clusters.fetch_own(stream[part], cluster[part]))
