"""DynaKVCache: decode past what DRAM holds, with the keys and values of full-attention layers in clusters on flash.

After DynaKV (arXiv 2511.07427): clusters that follow the decode, flash read by cluster, a DRAM budget over all layers.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, get_layer_types_and_kwargs

from ..config import DynaKVConfig
from ..errors import UnsupportedModelError
from . import resume
from .layer import DynaKVLayer
from .policies import policy_named
from .rotary import rates_of
from .snapshot import Saved
from .storage import ClusterStorage


@dataclass(frozen=True)
class DynaKVReport:
    """What a cache holds and what it did so far, over all its clustered layers.

    Args:
        tokens: tokens seen, padding included.
        steps: tokens decoded one at a time.
        clusters, splits: clusters held now, and how often one was split.
        bytes_read, reads, read_seconds: what was read from flash, in how many reads, and how long decoding waited.
        bytes_written: what was written to flash.
        hits, misses: clusters that were asked for and found in DRAM, or not.
        arena_bytes, index_bytes, dense_bytes: DRAM held by resident clusters; by centroids, sizes and positions; by
            sinks, recent and waiting tokens.
        index_bytes_read: what of the index was read from flash; 0 where it has room in DRAM.
        flash_bytes: size of the cluster file.
        direct: whether the file bypasses the page cache; if not, reads may have come from memory that no budget counts.
    """

    tokens: int
    steps: int
    clusters: int
    splits: int
    bytes_read: int
    reads: int
    read_seconds: float
    bytes_written: int
    hits: int
    misses: int
    arena_bytes: int
    index_bytes: int
    index_bytes_read: int
    dense_bytes: int
    flash_bytes: int
    direct: bool

    @property
    def dram_bytes(self) -> int:
        """All DRAM that the clustered layers hold."""
        return self.arena_bytes + self.index_bytes + self.dense_bytes

    @property
    def bytes_read_per_step(self) -> float:
        """Mean bytes read from flash for each decoded token."""
        return self.bytes_read / max(1, self.steps)


class DynaKVCache(Cache):
    """A transformers cache for `past_key_values=`, or by name: `generate(cache_implementation="dynakv")`.

    Only full-attention layers are clustered; sliding, linear and other layers stay as transformers has them.

    Args:
        config: the model's configuration.
        options: a `DynaKVConfig` or a mapping of its options; `changes` go on top.

    Raises:
        ConfigError: an option is unknown or invalid.
        FlashError: the directory is missing, not writable or full.
        UnsupportedModelError: the model has layers that transformers' own DynamicCache does not know.
    """

    def __init__(
        self, config: PreTrainedConfig, options: DynaKVConfig | Mapping[str, Any] | None = None, **changes: Any
    ) -> None:
        self.options, self._config = DynaKVConfig.merge(options, changes), config
        text = config.get_text_config(decoder=True)
        kinds, arguments = get_layer_types_and_kwargs(text)
        if unknown := set(kinds) - set(DYNAMIC_LAYER_TYPE_MAPPING):
            raise UnsupportedModelError(
                f"the model has layers of type {', '.join(sorted(unknown))}, for which transformers' DynamicCache has "
                "no form either. Leave cache_implementation out for this model."
            )
        self._storage = ClusterStorage(self.options)
        self._finalizer = weakref.finalize(self, self._storage.close)

        dense = policy_named(self.options.policy).dense_layers

        def layer(number: int, kind: str, given: dict[str, Any]) -> Any:
            if kind == "full_attention" and number >= dense:
                return DynaKVLayer(self.options, self._storage, number, rates_of(text, kind))
            return DYNAMIC_LAYER_TYPE_MAPPING[kind](**given)

        # A model that exits early to assist itself has fewer layers than kinds of them.
        each = zip(kinds, arguments, strict=False)
        super().__init__(layers=[layer(i, kind, given) for i, (kind, given) in enumerate(each)])

    def report(self) -> DynaKVReport:
        """The numbers so far."""
        storage = self._storage
        layers = [layer for layer in self.layers if isinstance(layer, DynaKVLayer)]
        held = [layer.clusters for layer in layers if layer.is_initialized]
        table, counters = storage.residency, storage.flash.counters
        return DynaKVReport(
            tokens=max((layer.get_seq_length() for layer in layers), default=0),
            steps=max((layer.steps for layer in layers), default=0),
            clusters=sum(int(clusters.index.count.sum()) for clusters in held),
            splits=sum(int(clusters.splits.sum()) for clusters in held),
            bytes_read=counters.bytes_read,
            reads=counters.reads,
            read_seconds=storage.transfers.read_seconds,
            bytes_written=counters.bytes_written,
            hits=table.hits if table else 0,
            misses=table.misses if table else 0,
            arena_bytes=storage.arena_bytes,
            index_bytes=sum(layer.index_bytes for layer in layers) + storage.index_file.nbytes,
            index_bytes_read=storage.index_file.counters.bytes_read,
            dense_bytes=sum(layer.dense_bytes for layer in layers),
            flash_bytes=storage.flash.size,
            direct=storage.flash.direct,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Keep everything in the folder `path`, so that `load` goes on without a prefill.

        The folder is made if need be; what it kept before is replaced in one step when everything is on disk, so a
        save that fails or is killed leaves the one before. The cache can be used on.

        Raises:
            FlashError: clusters could not be read, or the folder not be written.
            InputError: the cache holds no tokens.
            UnsupportedModelError: the model has layers other than full and sliding attention.
        """
        resume.save(Path(path), self._config, self.options, self._storage, self.layers)

    @staticmethod
    def load(
        path: str | os.PathLike[str],
        config: PreTrainedConfig,
        device: torch.device | str = "cpu",
        **changes: Any,
    ) -> DynaKVCache:
        """The cache that was saved in the folder `path`, which stays as it is.

        It holds the same tokens in the same clusters. Which of them lie in DRAM is not kept, and a cluster is split
        when it next gets there: with a budget smaller than the context later tokens may differ by that.

        Args:
            config: of the model that it was saved with. Its weights are not checked: they have to be the same.
            device: where the model is.
            changes: options that differ from those of then, such as `directory`, `dram` and `budget`.

        Raises:
            ConfigError: a change is not possible.
            FlashError: the folder holds no complete, unaltered save of such a model's cache.
        """
        saved = Saved(Path(path))
        cache = DynaKVCache(config, resume.saved_options(saved, config, changes))
        try:
            resume.restore(saved, cache._storage, cache.layers, torch.device(device))
        except BaseException:
            cache.close()
            raise
        return cache

    def close(self) -> None:
        """Give the file's space and the threads back now. It happens by itself when the cache is garbage collected."""
        self._finalizer()
