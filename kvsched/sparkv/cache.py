"""`SparKVCache`: a DynamicCache whose beginning can come from a store."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from ..config import SparKVConfig
from ..errors import ChunkError, ConfigError, StoreError
from .address import chain, fingerprint
from .forward import PrefixCache
from .loader import Loader, LoadResult
from .manifest import Manifest, manifest_path
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger("kvsched")

# Bytes a second that each store gave when something was last loaded from it: the first guess of the next load.
_last_goodput: dict[str, float] = {}


@dataclass(frozen=True)
class SparKVReport:
    """The numbers of the last load.

    Args:
        prompt_tokens: tokens of the prompt that was to be loaded.
        loaded_tokens: tokens of its prefix that were streamed or computed by the loader; the model itself computes
            the rest of the prompt.
        depths: for each chunk of the prefix, layers that were computed; the layers above were streamed.
        bytes_streamed: bytes that arrived from the store, manifests not counted.
        seconds: wall time of the load.
        predicted_seconds: what the first plan made with a known goodput promised.
        compute_seconds: time spent computing.
        stream_seconds: time until the last streamed byte.
        goodput: bytes a second of the link at the end.
        plans: how often the division was planned.
        fallback: why something was computed that could have been streamed; `None` if nothing was.
    """

    prompt_tokens: int = 0
    loaded_tokens: int = 0
    depths: tuple[int, ...] = ()
    bytes_streamed: int = 0
    seconds: float = 0.0
    predicted_seconds: float | None = None
    compute_seconds: float = 0.0
    stream_seconds: float = 0.0
    goodput: float | None = None
    plans: int = 0
    fallback: str | None = None


class SparKVCache(DynamicCache):
    """A KV cache that loads the published prefix of a prompt, partly streamed and partly computed (SparKV, prefill).

    `generate()` calls `load` by itself, whether the cache was asked for by name or passed as `past_key_values`. In a
    plain forward call it, then pass the tokens it has not loaded:

    ```python
    cache = SparKVCache(model.config, store="file:///chunks")
    cache.load(model, input_ids)
    model(input_ids[:, cache.get_seq_length():], past_key_values=cache)
    ```

    After loading it is a DynamicCache in every respect.

    Args:
        config: the model's configuration.
        options: a `SparKVConfig` or a mapping of its fields; further keyword arguments go on top.

    Raises:
        ConfigError: an option is unknown or invalid, or no store is named.
        StoreError: the store's URI is not understood.
        UnsupportedModelError: the model has layers whose state is more than keys and values.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        options: SparKVConfig | Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        self.options = SparKVConfig.merge(options, changes)
        if self.options.store is None:
            raise ConfigError('sparkv needs a store: cache_config={"store": "file:///folder"}.')
        self._store = Store(self.options.store, self.options.stall_timeout)
        PrefixCache(config, 0)  # refuses a model that cannot be loaded now, not when its first prompt comes
        self._report = SparKVReport()
        super().__init__(config=config)

    def report(self) -> SparKVReport:
        """The numbers of the last load."""
        return self._report

    def load(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> SparKVReport:
        """Load the longest published prefix of `input_ids` that leaves at least one token for the model.

        Nothing is loaded, and the model computes the whole prompt, where nothing is published, the store does not
        answer, rows differ or are padded, or the cache holds tokens already: the report's `fallback` says so.

        Args:
            model: the model that will go on with this cache.
            input_ids: `[batch, n]`.
            attention_mask: `[batch, n]`, or `None` where nothing is padded.
        """
        if self.get_seq_length() > 0:
            return self._report
        self._report = SparKVReport(prompt_tokens=input_ids.shape[1])
        if self.options.planner == "local":
            return self._report
        if attention_mask is not None and not bool(attention_mask.all()):
            return self._fall_back("the prompt is padded")
        if not bool((input_ids == input_ids[:1]).all()):
            return self._fall_back("the batch holds different prompts")
        try:
            manifest = self._store.wait(self._find(model, input_ids[0]))
        except (StoreError, ChunkError) as error:
            return self._fall_back(str(error))
        if manifest is None:
            return self._fall_back(f"no prefix of this prompt is published in {self._store.uri}")
        goodput = _last_goodput.get(self._store.uri)
        result = Loader(model, input_ids[:1], manifest, self._store, self.options, goodput).run()
        if result.goodput is not None:
            _last_goodput[self._store.uri] = result.goodput
        self._install(result, batch=len(input_ids))
        return self._report

    def _fall_back(self, reason: str) -> SparKVReport:
        logger.warning("the prompt is computed, not loaded: %s", reason)
        self._report = replace(self._report, fallback=reason)
        return self._report

    async def _find(self, model: PreTrainedModel, token_ids: torch.Tensor) -> Manifest | None:
        """The manifest of the longest published prefix, in two round trips; in one, if there is none."""
        name, codec = fingerprint(model), self.options.codec
        addresses = chain(name, codec, self.options.chunk_tokens, token_ids[:-1])
        found = await self._store.exists(map(manifest_path, addresses))
        if not any(found):
            return None
        deepest = len(found) - found[::-1].index(True)
        data = await self._store.get(manifest_path(addresses[deepest - 1]))
        return Manifest.from_bytes(data, name, codec, addresses[:deepest], len(self.layers))

    def _install(self, result: LoadResult, batch: int) -> None:
        """Hand the prefix to the layers as transformers keeps them: whole, or a sliding layer's window."""
        tokens = result.cache.layers[0].capacity
        for layer, loaded in zip(self.layers, result.cache.layers, strict=True):
            layer.lazy_initialization(loaded.keys, loaded.values)
            layer.keys, layer.values = loaded.keys, loaded.values
            if layer.is_sliding:
                kept = slice(1 - layer.sliding_window, None)
                layer.keys, layer.values = loaded.keys[:, :, kept].clone(), loaded.values[:, :, kept].clone()
                layer.cumulative_length = tokens
        if batch > 1:
            self.batch_repeat_interleave(batch)
        self._report = replace(
            self._report,
            loaded_tokens=tokens,
            depths=result.depths,
            bytes_streamed=result.bytes_streamed,
            seconds=result.seconds,
            predicted_seconds=result.predicted_seconds,
            compute_seconds=result.compute_seconds,
            stream_seconds=result.stream_seconds,
            goodput=result.goodput,
            plans=result.plans,
            fallback=result.fallback,
        )
