"""One full-attention layer whose keys and values lie in clusters, in DRAM or on flash: the contract with transformers.

Three ways to answer attention. The first tokens of all are the model's own attention's matter. Where more than one
token follows earlier ones (a chunk of a prompt, a second turn, candidates of an assistant) these pass by in parts
(`prefill`). A single token is answered from the sinks, the recent window, the tokens that wait and the clusters its
query retrieves (`decode`). What is new is brought into clusters afterwards (`intake`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from kvsched_kernels import merge_parts

from ..attention import carry
from ..config import DynaKVConfig
from ..errors import UnsupportedModelError
from .affinity import telling
from .allocator import give_back
from .decode import Decoder
from .dense import DenseTokens
from .entries import EntryForm, packing_of
from .intake import Intake
from .padding import real_tokens
from .policies import policy_named
from .prefill import Chunk, ChunkAttention, Tokens
from .storage import ClusterStorage
from .stored import StoredClusters

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class DynaKVLayer(CacheLayerMixin):
    """The cache of one layer; see `CacheLayerMixin` for the methods that transformers calls.

    Rows of the batch and KV heads are streams, `S = batch x kv_heads`, each with clusters of its own. A token is an
    entry: its key (after RoPE) and value side by side. Padding is never kept.

    Args:
        number: of the layer.
        rates: of the model's rotary embedding, as `rotary.rates_of` gives them.

    Attributes:
        clusters: tokens that left the recent window.
        dense: tokens that lie in DRAM and always take part.
        steps: tokens decoded one at a time.
    """

    is_sliding = False
    is_croppable = True
    decoder_class = Decoder

    def __init__(
        self, config: DynaKVConfig, storage: ClusterStorage, number: int = 0, rates: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.config, self.storage, self._number, self._rates = config, storage, number, rates
        self.policy = policy_named(config.policy)(config)
        self.steps = self._spent = 0
        self._seen = 0
        self._arrived: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch, heads, widths, dtype and device from the first keys `[B, H, n, D]` and values `[B, H, n, Dv]`."""
        batch, heads, _, dim = key_states.shape
        form = EntryForm(dim, value_states.shape[3], key_states.dtype, key_states.device)
        self._initialize(form, heads, batch * heads)

    def _initialize(self, form: EntryForm, heads: int, streams: int) -> None:
        self.dtype, self.device, self._form, self._kv_heads = form.dtype, form.device, form, heads
        config = self.config
        packing = packing_of(config.storage, form, streams, self._rates)
        self.storage.open(packing.width, packing.dtype)
        self.clusters = StoredClusters(self.storage, self.policy, packing, streams, self._number)
        self.dense = DenseTokens(streams, self._form.width, config.sinks, config.recent, self.dtype, self.device)
        self._intake = Intake(self.clusters, self.dense)
        self.decoder = self.decoder_class(self.clusters, self.dense)
        self._chunks = ChunkAttention(self.clusters, self.dense, self.decoder)
        self.is_initialized = True

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All there is to know of its tokens beside the entries in clusters: tensors by name, and plain values."""
        clusters, form = self.clusters, self._form
        tensors = {"entries": self.dense.entries, "position": self.dense.position, "grouped": self._intake.grouped}
        tensors |= {"splits": clusters.splits, "moved": clusters.moved}
        with clusters.index_in_dram():
            # What is on flash otherwise does not stay where it is now.
            copied = self.storage.index_file.used
            for name, tensor in clusters.index.state().items():
                tensors[f"index.{name}"] = tensor.clone() if copied else tensor
        tensors |= clusters.packing.state()
        return tensors, {
            "streams": clusters.streams,
            "kv_heads": self._kv_heads,
            "key_width": form.key_width,
            "value_width": form.value_width,
            "dtype": name_of(form.dtype),
            "seen": self._seen,
            "steps": self.steps,
            "recent": self.dense.recent,
        }

    def restore(self, take: Any, values: Mapping[str, Any], addresses: np.ndarray) -> None:
        """Become what `state` told of; the storage holds the clusters already.

        Args:
            take: `take(name, dtype, *shape)` hands the tensors out, on the device `take.device`.
            addresses: what the addresses of then are now.

        Raises:
            ValueError, KeyError, TypeError: the values do not fit together.
        """
        streams, heads = int(values["streams"]), int(values["kv_heads"])
        if streams < 1 or heads < 1 or streams % heads:
            raise ValueError(f"{streams} streams of {heads} heads")
        dtype = dtype_named(values["dtype"])
        self._initialize(EntryForm(values["key_width"], values["value_width"], dtype, take.device), heads, streams)
        self._seen, self.steps, dense, index = (
            int(values["seen"]),
            int(values["steps"]),
            self.dense,
            self.clusters.index,
        )
        dense.entries = take("entries", dtype, *dense.entries.shape)
        dense.position = take("position", torch.int64, *dense.position.shape)
        dense.recent = int(values["recent"])
        if not 0 <= dense.recent <= self.dense.position.shape[1] - dense.waiting.stop:
            raise ValueError(f"{dense.recent} tokens in the recent window")
        self.clusters.packing.restore(take)
        self._intake.grouped = take("grouped", torch.int64, streams)
        self.clusters.splits, self.clusters.moved = (take(name, torch.int64, streams) for name in ("splits", "moved"))
        with self.clusters.index_in_dram():
            addresses_now = torch.from_numpy(addresses).to(take.device)
            index.restore(lambda name, *form: take(f"index.{name}", *form), addresses_now)
        held = (dense.position[:, dense.used] >= 0).sum(1) + index.tokens
        if bool((held > self._seen).any()) or int(dense.position.max()) >= self._seen:
            raise ValueError("more tokens than were seen")
        self._tell_storage()

    @property
    def index_bytes(self) -> int:
        """DRAM of the index."""
        return self.clusters.index.nbytes if self.is_initialized else 0

    @property
    def dense_bytes(self) -> int:
        """DRAM of sinks, recent and waiting tokens."""
        return self.dense.nbytes if self.is_initialized else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announce new tokens `[B, H, q, D]`; they are taken in when attention is asked of the layer.

        Returns:
            The same keys, marked for `attention`, and values.

        Raises:
            UnsupportedModelError: the model computed attention without asking the layer.
        """
        if self._arrived is not None:
            raise UnsupportedModelError(
                "attention was computed without the DynaKV cache, which holds the keys. Either kvsched.disable() was "
                "called (call kvsched.enable()), or this model does not look its attention up in transformers' "
                "AttentionInterface and cannot be used with DynaKV."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        entries = torch.cat([key_states, value_states], dim=-1)
        self._arrived = entries.view(self.clusters.streams, -1, self._form.width)
        self._seen += key_states.shape[2]
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
        """See `kvsched.attention.CacheAttention`. Weights are returned for the first tokens of all only.

        Raises:
            InputError: a row ends in padding.
            UnsupportedModelError: the mask is of a kind that does not show padding, or attention needs a position bias.
            ConfigError: `dram` cannot hold the clusters of one step.
            FlashError: the cluster file could not be read, written or grown.
        """
        # Layers that share keys (Gemma 3n) ask again with keys that were taken in already.
        arrived, self._arrived = self._arrived, None
        own = None if arrived is None else self._located(arrived, attention_mask)
        asked = self._asked(query, attention_mask, **kwargs)
        alone, first = query.shape[2] == 1, key.shape[2] == self._seen
        output: tuple[torch.Tensor, torch.Tensor | None]
        with self.clusters.index_in_dram():
            if first:
                output = inner(module, query, key, value, attention_mask, **kwargs)
            elif not alone:
                output = self._answer_chunk(asked, own), None
            prompt = None if alone else telling(asked.query) * asked.scaling
            left_window = own is not None and self._intake.take(own.entries, own.position, prompt)
            if alone and not first:
                output = self._answer_one(asked), None
            if left_window:
                self._intake.settle()  # after decoding, when the clusters that this step retrieved are in DRAM
        if own is not None:
            self._tell_storage()
            if not alone:
                give_back()  # what answering and clustering a chunk took for a moment
        return output

    def _tell_storage(self) -> None:
        if (held := self.index_bytes + self.dense_bytes) != self._spent:
            self._spent = held
            self.storage.spend(f"layer {self._number}", held)

    def take_in(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor) -> None:
        """Take in the first tokens `[B, H, n, D]`, which were computed elsewhere: no attention is asked for.

        Args:
            real: bool `[B, n]`, False for padding.

        Raises:
            FlashError: the cluster file could not be written or grown.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._seen = keys.shape[2]
        entries = torch.cat([keys, values], dim=-1).view(self.clusters.streams, -1, self._form.width)
        position = torch.where(real.to(self.device), torch.arange(self._seen, device=self.device), -1)
        with self.clusters.index_in_dram():
            if self._intake.take(entries, position.repeat_interleave(self._kv_heads, dim=0)):
                self._intake.settle()
        self._tell_storage()

    def _located(self, entries: torch.Tensor, mask: Any) -> Tokens:
        """The newest tokens `[S, q, width]` with their positions."""
        streams, new, _ = entries.shape
        position = torch.arange(self._seen - new, self._seen, device=self.device).expand(streams, new)
        if mask is not None:
            real = real_tokens(mask, streams // self._kv_heads, new)
            position = torch.where(real.repeat_interleave(self._kv_heads, dim=0), position, -1)
        return Tokens(entries, position)

    def _asked(
        self,
        query: torch.Tensor,
        mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Chunk:
        if position_bias is not None:
            raise UnsupportedModelError("this model adds a position bias to attention, which DynaKV does not support.")
        batch, heads, new, dim = query.shape
        group = query.reshape(self.clusters.streams, heads // self._kv_heads, new, dim)
        sinks = None if s_aux is None else s_aux.view(self._kv_heads, -1).repeat(batch, 1)
        return Chunk(group, mask, self._seen, dim**-0.5 if scaling is None else scaling, softcap, sinks)

    def _answer_chunk(self, chunk: Chunk, own: Tokens | None) -> torch.Tensor:
        if own is not None and self.config.prefill == "retrieval":
            return self._shaped(chunk, self._chunks.retrieved(chunk, own))
        return self._shaped(chunk, self._chunks.exact(chunk, own))

    def _answer_one(self, chunk: Chunk) -> torch.Tensor:
        query = chunk.query[:, :, 0]
        parts = self.decoder.parts(query, chunk.scaling, chunk.softcap, chunk.sinks, chunk.seen)
        if self.decoder.found is not None:
            self.clusters.expect_next(self.decoder.found)
        self.steps += 1
        return self._shaped(chunk, merge_parts(parts).unsqueeze(2))

    def _shaped(self, chunk: Chunk, output: torch.Tensor) -> torch.Tensor:
        """Output `[S, G, q, Dv]` as the model wants it: `[B, q, query_heads, Dv]`."""
        rows = output.unflatten(0, (-1, self._kv_heads)).flatten(1, 2)
        return rows.transpose(1, 2).to(chunk.query.dtype)

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
        """Remove the newest `-tokens_to_remove` tokens. Beyond the recent window all clusters are read once."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove from the end.")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        remaining = self._seen + tokens_to_remove
        if remaining <= 0:
            self.reset()
        elif -tokens_to_remove <= self.dense.recent:
            self.dense.crop(-tokens_to_remove)
        else:
            with self.clusters.index_in_dram():
                self._intake.crop(remaining)
        self._seen = max(0, remaining)

    def reset(self) -> None:
        """Forget all tokens and give their room on flash back."""
        if self.is_initialized:
            self.clusters.free(*self.clusters.index.clusters())
            self.storage.index_file.forget(self._number)
            del self.clusters, self.dense, self._intake, self.decoder, self._chunks
        self.is_initialized = False
        self._arrived = None
        self._seen = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        if self.is_initialized:
            self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.is_initialized:
            self._select_rows(torch.arange(self.clusters.streams // self._kv_heads).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        if self.is_initialized:
            self._select_rows(torch.arange(self.clusters.streams // self._kv_heads)[indices.cpu()])

    def activate_past_recording(self) -> None:
        """Nothing to do: all tokens are kept, so `crop` always works."""

    def _select_rows(self, rows: torch.Tensor) -> None:
        heads = torch.arange(self._kv_heads, device=self.device)
        streams = (rows.to(self.device).unsqueeze(1) * self._kv_heads + heads).flatten()
        if torch.equal(streams, torch.arange(self.clusters.streams, device=self.device)):
            return
        with self.clusters.index_in_dram():
            self.clusters.select(streams)
        self.dense.select(streams)
        self._intake.select(streams)


def name_of(dtype: torch.dtype) -> str:
    """A dtype as text, such as `float16`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The floating dtype of that name.

    Raises:
        ValueError: there is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name!r} is no floating dtype")
    return dtype
