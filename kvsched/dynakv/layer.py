"""One full-attention layer whose keys and values lie in clusters, in DRAM or on flash.

Two ways to answer attention. While many tokens come at once (a prompt, a second turn, candidates of an assistant) the
model's own attention runs over all keys in the order of the text, read back where needed, and the new tokens are taken
in afterwards. A single token is answered from the sinks, the recent window, the tokens that wait and the clusters its
query retrieves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from kvsched_kernels import (
    Part,
    cap_scores,
    decode_attention,
    members,
    merge_parts,
    moments,
    two_means,
)

from ..attention import carry
from ..config import DynaKVConfig
from ..errors import InputError, UnsupportedModelError
from .clusters import ClusterIndex, Clusters, ranks
from .dense import BATCH, WAITING, DenseTokens
from .policies import pages, policy_named
from .pools import keep_order
from .retrieval import Retrieval, places
from .storage import ClusterStorage

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

_AT_ONCE = 1024
"""Groups of tokens that are summarised at once, which bounds the memory of copies padded to the largest."""


class DynaKVLayer(CacheLayerMixin):
    """The cache of one layer; see `CacheLayerMixin` for the methods that transformers calls.

    Rows of the batch and KV heads are streams, `S = batch x kv_heads`, each with clusters of its own. A token is an
    entry: its key (after RoPE) and value side by side. Padding is never kept.

    Attributes:
        splits: clusters of each stream that were split so far, int64 `[S]`.
        moved: entries of each stream that splits moved to another place on flash, int64 `[S]`.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, config: DynaKVConfig, storage: ClusterStorage, number: int = 0) -> None:
        super().__init__()
        self.config, self.storage, self._number = config, storage, number
        self.policy = policy_named(config.policy)(config)
        self.steps = self._spent = 0
        self.splits = self.moved = torch.zeros(0, dtype=torch.long)
        self._seen = 0
        self._arrived: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch, heads, widths, dtype and device from the first keys `[B, H, n, D]` and values `[B, H, n, Dv]`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._kv_heads, self._key_width = key_states.shape[1], key_states.shape[3]
        self._width = self._key_width + value_states.shape[3]
        stored = self.dtype if self.config.storage == "auto" else getattr(torch, self.config.storage)
        self.storage.open(self._width, stored)
        self._start(key_states.shape[0] * self._kv_heads)
        self.is_initialized = True

    def _start(self, streams: int) -> None:
        config = self.config
        forms = self.policy.forms(self._key_width, self._width - self._key_width)
        chained = self.policy.intake == "chain"
        self.index = ClusterIndex(streams, forms, config.max_cluster_size, self.device, chained)
        self.dense = DenseTokens(streams, self._width, config.sinks, config.recent, self.dtype, self.device)
        self._streams = streams
        self._grouped = self.index.count.clone()  # clusters that stay; those behind are grouped again with what follows
        self.splits, self.moved = torch.zeros(2, streams, dtype=torch.long, device=self.device).unbind()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announce new tokens `[B, H, q, D]`; they are taken in when attention is asked of the layer.

        Returns:
            Keys, marked for `attention`, and values: of the new token alone if it is one more, else of all tokens.

        Raises:
            UnsupportedModelError: the model computed attention without asking the layer.
            FlashError: earlier tokens could not be read back.
        """
        if self._arrived is not None:
            raise UnsupportedModelError(
                "attention was computed without the DynaKV cache, which holds the keys. Either kvsched.disable() was "
                "called (call kvsched.enable()), or this model does not look its attention up in transformers' "
                "AttentionInterface and cannot be used with DynaKV."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, new = self._seen, key_states.shape[2]
        self._arrived = torch.cat([key_states, value_states], dim=-1).view(self._streams, new, self._width)
        self._seen += new
        if before and new > 1:
            entries = torch.cat([self._read_back(before)[0], self._arrived], dim=1)
            entries = entries.view(-1, self._kv_heads, self._seen, self._width)
            key_states, value_states = entries[..., : self._key_width], entries[..., self._key_width :]
        return carry(key_states, self), value_states

    def attention(
        self,
        inner: Attention,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `kvsched.attention.CacheAttention`. Decoding returns no weights.

        Raises:
            InputError: a row ends in padding.
            UnsupportedModelError: the mask is of a kind that does not show padding, or attention needs a position bias.
            ConfigError: `dram` cannot hold the clusters of one step.
            FlashError: the cluster file could not be read, written or grown.
        """
        # Layers that share keys (Gemma 3n) ask again with keys that were taken in already.
        arrived, self._arrived = self._arrived, None
        everything = key.shape[2] == self._seen
        if everything:
            output = inner(module, query, key, value, attention_mask, **kwargs)
        left_window = False
        if arrived is not None:
            real = real_tokens(attention_mask, query.shape[0], arrived.shape[1], self.device)
            left_window = self._take(arrived, real.repeat_interleave(self._kv_heads, dim=0))
        if not everything:
            output = self._decode(query, **kwargs), None
        if left_window:
            self._settle()  # after decoding, when the clusters that this step retrieved are in DRAM
        if arrived is not None and (held := self.index.nbytes + self.dense.nbytes) != self._spent:
            self._spent = held
            self.storage.spend(f"layer {self._number}", held)
        return output

    def _decode(
        self,
        query: torch.Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if position_bias is not None:
            raise UnsupportedModelError("this model adds a position bias to attention, which DynaKV does not support.")
        batch, heads, _, dim = query.shape
        group = query.reshape(self._streams, heads // self._kv_heads, dim)
        sinks = None if s_aux is None else s_aux.view(self._kv_heads, -1).repeat(batch, 1)
        parts = self._parts(group, dim**-0.5 if scaling is None else scaling, softcap, sinks)
        self.steps += 1
        return merge_parts(parts).to(query.dtype).view(batch, 1, heads, -1)

    def _parts(
        self, query: torch.Tensor, scaling: float, softcap: float | None, sinks: torch.Tensor | None
    ) -> list[Part]:
        """Attention of `query` `[S, G, D]` over tokens in DRAM, over clusters it retrieves, and the estimate of others.

        The second and the third are missing where there are no clusters or no estimate.
        """
        held = self.dense.used
        entries, present = self.dense.entries[:, held], self.dense.position[:, held] >= 0
        parts = [decode_attention(query, *self._apart(entries), present, scaling, softcap, sinks)]
        if self.index.width == 0:
            return parts
        score = cap_scores(self.policy.score(query, self.index).mul_(scaling), softcap)
        tokens = self.policy.tokens(self.index)
        peak = score.amax(-1, keepdim=True)
        mass = (score - peak).exp_().mul_(tokens.unsqueeze(1))
        # The heads of a group differ in what they find here at all: one that looks at its sinks has no say.
        total = mass.sum(-1, keepdim=True) + (parts[0][1].unsqueeze(-1) - peak).exp_()
        worth = (mass / total).sum(1) / tokens
        waiting = (self.dense.position[:, self.dense.waiting] >= 0).sum(1, keepdim=True)
        found = self.policy.choose(worth, self.index, (self.config.budget - waiting).clamp_min(0))
        entries, position = self._retrieve(found)
        parts.append(decode_attention(query, *self._apart(entries), position >= 0, scaling, softcap))
        if self.policy.estimated:
            parts.append(self._estimate(mass, peak[..., 0], found, parts[1][1]))
        return parts

    def _apart(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return entries[..., : self._key_width], entries[..., self._key_width :]

    def _retrieve(self, found: Retrieval) -> tuple[torch.Tensor, torch.Tensor]:
        self.storage.begin(self._seen)
        return self._gather(found.stream, found.cluster, found.kept)

    def _gather(
        self, stream: torch.Tensor, cluster: torch.Tensor, kept: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of clusters by stream: entries `[S, n, width]`, position int64 `[S, n]`, -1 where none is.

        Args:
            stream, cluster: int64 `[N]`, by stream.
            kept: bool `[N, max_cluster_size]`, which tokens are wanted; `None` for all.
        """
        address, size = self.index.address[stream, cluster], self.index.size[stream, cluster].long()
        there, places_in_text = self.storage.gather(to_host(address), to_host(size))
        at = places(stream, size, self._streams, kept)
        if kept is not None:
            there, places_in_text = there[at.token.cpu()], places_in_text[to_host(at.token)]
        entries = torch.zeros(self._streams, at.width, self._width, dtype=self.dtype, device=self.device)
        entries[at.stream, at.column] = there.to(self.device, self.dtype)
        position = torch.full((self._streams, at.width), -1, dtype=torch.long, device=self.device)
        position[at.stream, at.column] = self._to_device(places_in_text).long()
        return entries, position

    def _estimate(self, mass: torch.Tensor, peak: torch.Tensor, found: Retrieval, total: torch.Tensor) -> Part:
        """Attention over the clusters left out: each as `size` tokens with its mean key and mean value.

        A mean key underrates its cluster, since exp is convex. By how much shows on the retrieved clusters, whose exact
        sum is known: all others are corrected by the same factor, within [1/e, e].

        Args:
            mass: float32 `[S, G, C]`, size times exp(score of the mean key - peak); peak: `[S, G]`.
            total: `[S, G]`, log of the exact sum over the retrieved clusters.
        """
        left = torch.ones(mass.shape[0], mass.shape[2], dtype=torch.bool, device=self.device)
        left[found.stream, found.cluster] = False
        others = mass * left.unsqueeze(1)
        if self.policy.corrects:
            known = peak + (mass.sum(-1) - others.sum(-1)).log()
            factor = (total - known).nan_to_num(0.0, 0.0, 0.0).clamp_(-1.0, 1.0)
        if self.policy.estimated < 1:
            best = others.sum(1).topk(math.ceil(self.policy.estimated * left.shape[1]), dim=1).indices
            others = others * torch.zeros_like(left).scatter_(1, best, True).unsqueeze(1)
        together = others.sum(-1, keepdim=True)
        output = self.index.tables["value"].mix(others / together.clamp_min(torch.finfo(torch.float32).tiny))
        estimate = peak + together[..., 0].log()
        if self.policy.corrects:
            estimate = estimate + factor
        return output, estimate

    def _take(self, entries: torch.Tensor, real: torch.Tensor) -> bool:
        """Take in the newest tokens `[S, q, width]`; those that `real` (bool `[S, q]`) does not mark are padding.

        Returns:
            Whether tokens began to wait, so that `_settle` has to follow.
        """
        new = torch.arange(self._seen - entries.shape[1], self._seen, device=self.device)
        left = self.dense.push(entries, torch.where(real, new, -1))
        if left is None:
            return False
        entries, position = left
        if self.policy.intake == "own":
            self._group_alone(entries, position)
            return False
        if int((position >= 0).sum(1).max()) > WAITING:
            self._group(entries, position)
            return False
        for i, part in enumerate(zip(entries.split(BATCH, dim=1), position.split(BATCH, dim=1), strict=True)):
            if i > 0:
                self._settle()
            self.dense.wait(*part)
        return True

    def _group_alone(self, entries: torch.Tensor, position: torch.Tensor) -> None:
        """Group tokens with those since the last `segment`, once there are enough of them; until then page by page."""
        stream, cluster = self.index.clusters()
        loose = cluster >= self._grouped[stream]
        stream, cluster = stream[loose], cluster[loose]
        held = torch.zeros_like(self._grouped).index_add_(0, stream, self.index.size[stream, cluster].long())
        if self.index.width and int((held + (position >= 0).sum(1)).max()) < self.policy.segment:
            self._create(entries, position, *pages(position >= 0, BATCH))
            return
        if len(stream):
            before, there = self._gather(stream, cluster)
            entries, position = torch.cat([before, entries], dim=1), torch.cat([there, position], dim=1)
            self._free(stream, cluster)
            self.index.truncate(self._grouped)
        self._group(entries, position)
        self._grouped = self.index.count.clone()

    def _group(self, entries: torch.Tensor, position: torch.Tensor) -> None:
        """Make clusters of tokens by themselves, as the policy groups them."""
        self._create(entries, position, *self.policy.group(entries[..., : self._key_width].float(), position >= 0))

    def _create(
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
        keys, most = entries[..., : self._key_width].float(), self.config.max_cluster_size
        _, size, deviation = moments(keys, label, int(groups.max()))
        stream, group = size.nonzero(as_tuple=True)
        size, deviation = size[stream, group], deviation[stream, group]
        token = members(label, stream, group, int(size.max()))
        parts = [
            self._summarise(entries[stream[part].unsqueeze(1), token[part].clamp_min(0)], token[part] >= 0)
            for part in torch.arange(len(stream), device=self.device).split(_AT_ONCE)
        ]
        vectors = {name: torch.cat([part[name] for part in parts]) for name in self.index.tables}

        whole = torch.arange(len(stream), device=self.device).repeat_interleave((size + most - 1) // most)
        link = ranks(whole)
        column = (link * most).unsqueeze(1) + torch.arange(most, device=self.device)
        token = token[whole.unsqueeze(1), column.clamp_max(token.shape[1] - 1)].clamp_min(0)
        size = (size[whole] - column[:, 0]).clamp_max(most)
        stream = stream[whole]
        rows = stream.unsqueeze(1)
        made = Clusters(stream, size, deviation[whole], {name: vector[whole] for name, vector in vectors.items()})
        for part in self.storage.rounds(len(stream)):
            here = rows[part], token[part]
            address = self.storage.create(
                entries[here], to_host(size[part]), to_host(position[here]), to_host(self._pool(stream[part]))
            )
            self.index.create(made[part], self._to_device(address), link[part], group[whole[part]] if chained else None)

    def _summarise(self, entries: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.policy.summarise(*self._apart(entries.float()), mask)

    def _settle(self) -> None:
        """Bring waiting tokens into their clusters until no more than `WAITING` wait in any stream (Algorithm 1)."""
        while True:
            self._append_to_resident()
            waiting = self.dense.position[:, self.dense.waiting] >= 0
            over = waiting.sum(1) > WAITING
            if not over.any():
                break
            first = over & (self.index.count == 0)
            if first.any():
                taken = waiting & first.unsqueeze(1)
                region = self.dense.waiting
                position = torch.where(taken, self.dense.position[:, region], -1)
                self._group(self.dense.entries[:, region], position)
                self.dense.end_wait(*taken.nonzero(as_tuple=True))
            else:
                self._load_fullest(over)
        if self.policy.intake == "split":
            self._split_widest()

    def _waiting_clusters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Stream, column in the waiting region and nearest cluster of each waiting token, where there are clusters."""
        region = self.dense.waiting
        waiting = (self.dense.position[:, region] >= 0) & (self.index.count > 0).unsqueeze(1)
        stream, column = waiting.nonzero(as_tuple=True)
        if len(stream) == 0:
            return stream, column, column
        keys = self.dense.entries[:, region, : self._key_width].float()
        return stream, column, self.index.tail(stream, self.policy.nearest(keys, self.index)[stream, column])

    def _append_to_resident(self) -> None:
        """Append waiting tokens to clusters that are in DRAM, and split those without room for them."""
        while True:
            stream, column, cluster = self._waiting_clusters()
            here = self.storage.resident(to_host(self.index.address[stream, cluster]))
            stream, column, cluster = (x[self._to_device(here)] for x in (stream, column, cluster))
            if len(stream) == 0:
                return
            width = self.index.width
            group, of = torch.unique(stream * width + cluster, return_inverse=True)
            offset = self.index.size[stream, cluster].long() + ranks(of)
            fits = offset < self.config.max_cluster_size
            full = torch.zeros(len(group), dtype=torch.bool, device=self.device).index_fill_(0, of[~fits], True)
            for part in self.storage.rounds(len(group)):
                s, c = group[part] // width, group[part] % width
                slots = self._fetch(s, c)
                some = fits & (of >= part.start) & (of < part.stop)
                self._append(stream[some], column[some], cluster[some], offset[some], slots[of[some] - part.start])
                if self.policy.intake == "split":
                    self._refresh(s, c, slots)
                    self._split(s[full[part]], c[full[part]], slots[full[part]])
            if self.policy.intake == "chain":
                self._prolong(stream, column, self.index.parent[stream, cluster].long(), fits)
                return
            if fits.all():
                return

    def _prolong(
        self, stream: torch.Tensor, column: torch.Tensor, parent: torch.Tensor, appended: torch.Tensor
    ) -> None:
        """Let chains follow the tokens that join them; those that were not `appended` make further clusters."""
        region = self.dense.waiting
        entries, position = self.dense.entries[:, region], self.dense.position[:, region]
        label = torch.full(position.shape, -1, dtype=torch.long, device=self.device)
        label[stream[~appended], column[~appended]] = parent[~appended]
        self._create(entries, position, label, self.index.count, chained=True)
        self.dense.end_wait(stream[~appended], column[~appended])
        label[stream, column] = parent
        self.index.follow(entries[..., : self._key_width].float(), label)

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
        self.storage.append(to_host(slots), to_host(offset), entries, to_host(position))
        size = torch.bincount(stream * self.index.width + cluster, minlength=self._streams * self.index.width)
        self.index.size[:, : self.index.width] += size.view(self._streams, -1).to(self.index.size)
        self.dense.end_wait(stream, column)

    def _refresh(self, stream: torch.Tensor, cluster: torch.Tensor, slots: torch.Tensor) -> None:
        """Take what the index keeps of clusters that grew from their entries, so that no rounding adds up."""
        size = self.index.size[stream, cluster].long()
        each = torch.arange(self.config.max_cluster_size, device=self.device)
        entries, mask = self._entries(slots.unsqueeze(1), each), each < size.unsqueeze(1)
        vectors = self._summarise(entries, mask)
        label = torch.where(mask, 0, -1)
        _, _, deviation = moments(entries[..., : self._key_width].float(), label, 1)
        self.index.replace(cluster, Clusters(stream, size, deviation[:, 0], vectors))

    def _split_widest(self) -> None:
        """Split clusters in DRAM until there is one for `cluster_size` tokens, those with the largest deviation first.

        So the threshold tau of a head, which the paper leaves open, is the deviation above which there is room for its
        clusters in an index of the size wanted. A wide cluster on flash keeps its rank until a query brings it.
        """
        room = (self.index.tokens / self.policy.cluster_size).long() - self.index.count
        if not (room > 0).any():
            return
        stream, cluster = self.index.clusters()
        here = self._to_device(self.storage.resident(to_host(self.index.address[stream, cluster])))
        worth = torch.zeros_like(self.index.deviation, dtype=torch.float32)
        worth[stream[here], cluster[here]] = self.index.deviation[stream[here], cluster[here]].float()
        worth[self.index.size < 2] = 0.0
        best = worth.topk(min(int(room.max()), worth.shape[1]), dim=1)
        rank = torch.arange(best.indices.shape[1], device=self.device)
        stream, column = ((rank < room.unsqueeze(1)) & (best.values > 0)).nonzero(as_tuple=True)
        cluster = best.indices[stream, column]
        for part in self.storage.rounds(len(stream)):
            self._split(stream[part], cluster[part], self._fetch(stream[part], cluster[part]))

    def _split(self, stream: torch.Tensor, cluster: torch.Tensor, slots: torch.Tensor) -> None:
        """Split clusters that lie in `slots`: the first half keeps its place, the second becomes a new cluster."""
        if len(stream) == 0:
            return
        most = self.config.max_cluster_size
        each = torch.arange(most, device=self.device)
        entries = self._entries(slots.unsqueeze(1), each).float()
        keys, mask = entries[..., : self._key_width], each < self.index.size[stream, cluster].unsqueeze(1)
        half = torch.where(mask, two_means(keys, mask).long(), -1)
        _, size, deviation = moments(keys, half, 2)

        order = keep_order(to_host(half == 1), to_host(mask.sum(1)))
        address = self.storage.split(to_host(slots), order, to_host(size))
        first = Clusters(stream, size[:, 0], deviation[:, 0], self._summarise(entries, half == 0))
        self.index.replace(cluster, first)
        second = Clusters(stream, size[:, 1], deviation[:, 1], self._summarise(entries, half == 1))
        self.index.create(second, self._to_device(address))
        self.splits.index_add_(0, stream, torch.ones_like(stream))
        shifted = (self._to_device(order) != each) & (each < size[:, :1])
        self.moved.index_add_(0, stream, shifted.sum(1) + size[:, 1])

    def _load_fullest(self, over: torch.Tensor) -> None:
        """For the streams marked in `over`, fetch the cluster that most tokens wait for."""
        stream, _, cluster = self._waiting_clusters()
        stream, cluster = stream[over[stream]], cluster[over[stream]]
        group, tokens = torch.unique(stream * self.index.width + cluster, return_counts=True)
        fullest = group[tokens.argsort(descending=True, stable=True)]
        fullest = fullest[ranks(fullest // self.index.width) == 0]
        for part in self.storage.rounds(len(fullest)):
            self._fetch(fullest[part] // self.index.width, fullest[part] % self.index.width)

    def _fetch(self, stream: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
        """The arena slots of clusters, int64 `[N]`."""
        address, size = self.index.address[stream, cluster], self.index.size[stream, cluster]
        return self._to_device(self.storage.fetch(to_host(address), to_host(size)))

    def _entries(self, slots: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return self.storage.read(to_host(slots), to_host(offset)).to(self.device, self.dtype)

    def _pool(self, stream: torch.Tensor) -> torch.Tensor:
        """A number for each of `stream` that no other layer has: clusters of one stream lie together on flash."""
        return stream + self._number * self._streams

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _read_back(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `tokens` tokens in order: entries `[S, tokens, width]`; bool `[S, tokens]`, False for padding."""
        entries = torch.zeros(self._streams, tokens, self._width, dtype=self.dtype, device=self.device)
        present = torch.zeros(self._streams, tokens, dtype=torch.bool, device=self.device)
        held = self.dense.position[:, self.dense.used]
        stream, column = (held >= 0).nonzero(as_tuple=True)
        entries[stream, held[stream, column]] = self.dense.entries[stream, column]
        present[stream, held[stream, column]] = True
        clustered, position = self._gather(*self.index.clusters())
        stream, column = (position >= 0).nonzero(as_tuple=True)
        entries[stream, position[stream, column]] = clustered[stream, column]
        present[stream, position[stream, column]] = True
        return entries, present

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys for which the model makes its mask: all tokens, padding included."""
        return self._seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self._seen

    def get_max_length(self) -> int:
        """-1: there is no limit but the device's space."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens. Beyond the recent window everything is clustered anew."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove from the end.")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        remaining = self._seen + tokens_to_remove
        if remaining <= 0:
            self.reset()
        elif -tokens_to_remove <= self.dense.recent:
            self.dense.crop(-tokens_to_remove)
            self._seen = remaining
        else:
            entries, present = self._read_back(self._seen)
            self._free(*self.index.clusters())
            self._start(self._streams)
            self._seen = remaining
            if self._take(entries[:, :remaining], present[:, :remaining]):
                self._settle()

    def reset(self) -> None:
        """Forget all tokens and give their room on flash back."""
        if self.is_initialized:
            self._free(*self.index.clusters())
            del self.index, self.dense
        self.is_initialized = False
        self._arrived = None
        self._seen = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.is_initialized:
            self._select_rows(torch.arange(self._streams // self._kv_heads).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        if self.is_initialized:
            self._select_rows(torch.arange(self._streams // self._kv_heads)[indices.cpu()])

    def activate_past_recording(self) -> None:
        """Nothing to do: all tokens are kept, so `crop` always works."""

    def _select_rows(self, rows: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        heads = torch.arange(self._kv_heads, device=self.device)
        streams = (rows.to(self.device).unsqueeze(1) * self._kv_heads + heads).flatten()
        if torch.equal(streams, torch.arange(self._streams, device=self.device)):
            return
        stream, cluster = self.index.clusters()
        gone = ~torch.isin(stream, streams)
        self._free(stream[gone], cluster[gone])
        self.index.select(streams)
        self.dense.select(streams)
        self._grouped, self.splits, self.moved = self._grouped[streams], self.splits[streams], self.moved[streams]
        self._streams = len(streams)

        # The first copy of a row keeps the clusters; each further one gets clusters of its own.
        copy = ranks(streams)
        for nth in range(1, int(copy.max()) + 1):
            stream, cluster = self.index.clusters()
            stream, cluster = stream[copy[stream] == nth], cluster[copy[stream] == nth]
            for part in self.storage.rounds(len(stream)):
                s, c = stream[part], cluster[part]
                size = to_host(self.index.size[s, c])
                entries, position = self.storage.gather(to_host(self.index.address[s, c]), size)
                address = self.storage.create(entries, size, position, to_host(self._pool(s)))
                self.index.address[s, c] = self._to_device(address).to(self.index.address)

    def _free(self, stream: torch.Tensor, cluster: torch.Tensor) -> None:
        self.storage.free(to_host(self.index.address[stream, cluster]))


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """An int64 (or bool) array on the host."""
    return (tensor if tensor.dtype == torch.bool else tensor.long()).cpu().numpy()


def real_tokens(mask: Any, batch: int, new: int, device: torch.device) -> torch.Tensor:
    """Which of the newest tokens are no padding, read off the model's attention mask: bool `[batch, new]`.

    Args:
        mask: `None`; bool `[B, 1, q, kv]`, True to attend (sdpa); floating `[B, 1, q, kv]`, very negative where masked
            (eager); or `[B, kv]`, 0 for padding (flash attention).

    Raises:
        InputError: a row that has begun ends in padding.
        UnsupportedModelError: the mask is none of these.
    """
    if mask is None:
        return torch.ones(batch, new, dtype=torch.bool, device=device)
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        raise UnsupportedModelError(
            f"DynaKV cannot read padding off an attention mask of type {type(mask).__name__}. Load the model with "
            "attn_implementation='sdpa' or 'eager'."
        )
    seen = mask if mask.ndim == 2 else mask[:, 0, -1]
    seen = seen > torch.finfo(seen.dtype).min / 2 if seen.is_floating_point() and mask.ndim == 4 else seen != 0
    # A row may be all padding so far: a chunk of a prompt that is much shorter than its neighbours.
    if bool((seen.any(1) & ~seen[:, -1]).any()):
        raise InputError(
            "the attention mask ends in padding. Decoding goes on from the last token of every row, so pad on the "
            "left: tokenizer.padding_side = 'left'."
        )
    return seen[:, -new:].expand(batch, -1)
