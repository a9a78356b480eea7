"""One full-attention layer whose keys and values lie in clusters, in DRAM or on flash.

Two ways to answer attention. While many tokens come at once (a prompt, a second turn, candidates of an assistant) the
model's own attention runs over all keys in the order of the text, read back where needed, and the new tokens are taken
in afterwards. A single token is answered from the sinks, the recent window, the tokens that wait and the clusters its
query retrieves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from kvsched_kernels import decode_attention, kmeans, members, moments, split_oversized, two_means

from ..attention import carry
from ..config import DynaKVConfig
from ..errors import InputError, UnsupportedModelError
from .clusters import ClusterIndex, ranks
from .dense import BATCH, WAITING, DenseTokens
from .retrieval import places, retrieve
from .storage import ClusterStorage

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class DynaKVLayer(CacheLayerMixin):
    """The cache of one layer; see `CacheLayerMixin` for the methods that transformers calls.

    Rows of the batch and KV heads are streams, `S = batch x kv_heads`, each with clusters of its own. A token is an
    entry: its key (after RoPE) and value side by side. Padding is never kept.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, config: DynaKVConfig, storage: ClusterStorage) -> None:
        super().__init__()
        self.config, self.storage = config, storage
        self.steps = self.splits = 0
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
        self.index = ClusterIndex(streams, self._key_width, config.max_cluster_size, config.split_variance, self.device)
        self.dense = DenseTokens(streams, self._width, config.sinks, config.recent, self.dtype, self.device)
        self._streams = streams

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
        held = self.dense.used
        entries, mask = self.dense.entries[:, held], self.dense.position[:, held] >= 0
        if self.index.width:
            retrieved, present = self._retrieve(group)
            entries, mask = torch.cat([entries, retrieved], dim=1), torch.cat([mask, present], dim=1)
        output = decode_attention(
            group,
            entries[..., : self._key_width],
            entries[..., self._key_width :],
            mask,
            dim**-0.5 if scaling is None else scaling,
            softcap,
            None if s_aux is None else s_aux.view(self._kv_heads, -1).repeat(batch, 1),
        )
        self.steps += 1
        return output.view(batch, 1, heads, -1)

    def _retrieve(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The entries that `query` `[S, G, D]` needs: `[S, n, width]`, and bool `[S, n]` where there is one."""
        found = retrieve(self.index, query, self.config.budget)
        self.storage.begin()
        slots = self._fetch(found.stream, found.cluster)
        at = places(found.stream, found.size, self._streams)
        entries = torch.zeros(self._streams, at.width, self._width, dtype=self.dtype, device=self.device)
        entries[at.stream, at.column] = self._entries(slots[at.cluster], at.offset)
        present = torch.zeros(self._streams, at.width, dtype=torch.bool, device=self.device)
        present[at.stream, at.column] = True
        return entries, present

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
        if int((position >= 0).sum(1).max()) > WAITING:
            self._make_clusters(entries, position)
            return False
        for i, part in enumerate(zip(entries.split(BATCH, dim=1), position.split(BATCH, dim=1), strict=True)):
            if i > 0:
                self._settle()
            self.dense.wait(*part)
        return True

    def _make_clusters(self, entries: torch.Tensor, position: torch.Tensor) -> None:
        """Cluster tokens by themselves; a stream without clusters takes its threshold from them."""
        keys, mask = entries[..., : self._key_width].float(), position >= 0
        fresh = self.index.count == 0
        count = (mask.sum(1) + self.config.cluster_size - 1) // self.config.cluster_size
        label, count = split_oversized(keys, kmeans(keys, mask, count), count, self.config.max_cluster_size)
        centroid, size, deviation = moments(keys, label, int(count.max()))
        stream, cluster = size.nonzero(as_tuple=True)
        token = members(label, stream, cluster, self.config.max_cluster_size).clamp_min(0)
        for part in self.storage.rounds(len(stream)):
            s, c, rows = stream[part], cluster[part], stream[part].unsqueeze(1)
            address = self.storage.create(entries[rows, token[part]], to_host(size[s, c]))
            self.index.create(
                s, centroid[s, c], size[s, c], deviation[s, c], position[rows, token[part]], self._to_device(address)
            )
        self.index.calibrate(fresh)

    def _settle(self) -> None:
        """Bring waiting tokens into their clusters until no more than `WAITING` wait in any stream (Algorithm 1)."""
        while True:
            self._append_to_resident()
            waiting = self.dense.position[:, self.dense.waiting] >= 0
            over = waiting.sum(1) > WAITING
            if not over.any():
                return
            first = over & (self.index.count == 0)
            if first.any():
                taken = waiting & first.unsqueeze(1)
                region = self.dense.waiting
                position = torch.where(taken, self.dense.position[:, region], -1)
                self._make_clusters(self.dense.entries[:, region], position)
                self.dense.end_wait(*taken.nonzero(as_tuple=True))
            else:
                self._load_fullest(over)

    def _waiting_clusters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Stream, column in the waiting region and nearest cluster of each waiting token, where there are clusters."""
        region = self.dense.waiting
        waiting = (self.dense.position[:, region] >= 0) & (self.index.count > 0).unsqueeze(1)
        stream, column = waiting.nonzero(as_tuple=True)
        if len(stream) == 0:
            return stream, column, column
        keys = self.dense.entries[:, region, : self._key_width].float()
        return stream, column, self.index.nearest(keys)[stream, column]

    def _append_to_resident(self) -> None:
        """Append waiting tokens to clusters that are in DRAM, and split those that got too wide or have no room."""
        while True:
            stream, column, cluster = self._waiting_clusters()
            here = self.storage.resident(to_host(self.index.address[stream, cluster]))
            stream, column, cluster = (x[self._to_device(here)] for x in (stream, column, cluster))
            if len(stream) == 0:
                return
            group, of = torch.unique(stream * self.index.width + cluster, return_inverse=True)
            width = self.index.width
            offset = self.index.size[stream, cluster] + ranks(of)
            fits = offset < self.config.max_cluster_size
            full = torch.zeros(len(group), dtype=torch.bool, device=self.device).index_fill_(0, of[~fits], True)
            for part in self.storage.rounds(len(group)):
                s, c = group[part] // width, group[part] % width
                slots = self._fetch(s, c)
                some = fits & (of >= part.start) & (of < part.stop)
                self._append(stream[some], column[some], cluster[some], offset[some], slots[of[some] - part.start])
                split = full[part] | self.index.too_wide(s, c)
                self._split(s[split], c[split], slots[split])
            if fits.all():
                return

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
        self.storage.append(to_host(slots), to_host(offset), entries)
        self.index.append(stream, cluster, offset, entries[:, : self._key_width].float(), position)
        self.dense.end_wait(stream, column)

    def _split(self, stream: torch.Tensor, cluster: torch.Tensor, slots: torch.Tensor) -> None:
        """Split clusters that lie in `slots`: the first half keeps its place, the second becomes a new cluster."""
        if len(stream) == 0:
            return
        each = torch.arange(self.config.max_cluster_size, device=self.device)
        keys = self._entries(slots.unsqueeze(1), each)[..., : self._key_width].float()
        mask = each < self.index.size[stream, cluster].unsqueeze(1)
        second = two_means(keys, mask)
        half = torch.where(mask, second.long(), -1)
        centroid, size, deviation = moments(keys, half, 2)

        order = torch.where(mask, half, 2).argsort(dim=1, stable=True)
        address = self.storage.split(to_host(slots), to_host(order), to_host(size))
        position = self.index.position[stream, cluster].gather(1, order)
        self.index.replace(stream, cluster, centroid[:, 0], size[:, 0], deviation[:, 0], position)

        behind = (each + size[:, :1]).clamp_max(self.config.max_cluster_size - 1)
        self.index.create(
            stream, centroid[:, 1], size[:, 1], deviation[:, 1], position.gather(1, behind), self._to_device(address)
        )
        self.splits += len(stream)

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
        streams, clusters = self.index.clusters()
        for part in self.storage.rounds(len(streams)):
            stream, cluster = streams[part], clusters[part]
            slots = self._fetch(stream, cluster)
            at = places(stream, self.index.size[stream, cluster].long(), self._streams)
            position = self.index.position[at.stream, cluster[at.cluster], at.offset].long()
            entries[at.stream, position] = self._entries(slots[at.cluster], at.offset)
            present[at.stream, position] = True
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
        self._streams = len(streams)

        # The first copy of a row keeps the clusters; each further one gets clusters of its own.
        copy = ranks(streams)
        for nth in range(1, int(copy.max()) + 1):
            stream, cluster = self.index.clusters()
            stream, cluster = stream[copy[stream] == nth], cluster[copy[stream] == nth]
            for part in self.storage.rounds(len(stream)):
                s, c = stream[part], cluster[part]
                slots = self._fetch(s, c)
                each = torch.arange(self.config.max_cluster_size, device=self.device)
                address = self.storage.create(self._entries(slots.unsqueeze(1), each), to_host(self.index.size[s, c]))
                self.index.address[s, c] = self._to_device(address)

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
