"""Teaches `generate()` the cache names `sparkv`, `dynakv` and `sparkv+dynakv`.

Three places of transformers are touched, all undone by `disable()`:

* `ALL_CACHE_IMPLEMENTATIONS`, against which `GenerationConfig` checks `cache_implementation`;
* `GenerationMixin._prepare_cache_for_generation`, which builds the cache from `cache_config`;
* `GenerationMixin._prefill`, the first place that sees both the prompt and the cache, where a SparKV prefix is loaded.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.generation import configuration_utils
from transformers.generation.utils import GenerationMixin

from . import attention
from .compose import SparKVDynaKVCache
from .dynakv.cache import DynaKVCache
from .errors import InputError, UnsupportedModelError
from .sparkv.cache import SparKVCache

CACHES: dict[str, type[SparKVCache] | type[DynaKVCache]] = {
    "sparkv": SparKVCache,
    "dynakv": DynaKVCache,
    "sparkv+dynakv": SparKVDynaKVCache,
}

_original_names = configuration_utils.ALL_CACHE_IMPLEMENTATIONS
_original_prepare = GenerationMixin._prepare_cache_for_generation
_original_prefill = GenerationMixin._prefill


@functools.wraps(_original_prepare)
def _prepare_cache_for_generation(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    name = generation_config.cache_implementation
    given = model_kwargs.get("past_key_values")
    if generation_config.is_assistant and name in CACHES and isinstance(given, CACHES[name]):
        return None  # a model that assists itself (early exit) goes on with the cache that it had
    if name not in CACHES or given is not None or generation_config.use_cache is False:
        return _original_prepare(self, generation_config, model_kwargs, *args, **kwargs)
    if self.config.is_encoder_decoder or not self._supports_default_dynamic_cache():
        raise UnsupportedModelError(
            f"cache_implementation={name!r} needs a decoder-only model that works with transformers' Cache classes; "
            f"{type(self).__name__} does not. Leave cache_implementation out for this model."
        )
    cache = CACHES[name](self.config, generation_config.cache_config)
    if generation_config.is_assistant:
        cache.activate_past_recording()
    model_kwargs["past_key_values"] = cache
    return None


@functools.wraps(_original_prefill)
def _prefill(
    self: Any,
    input_ids: torch.LongTensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    cache = model_kwargs.get("past_key_values")
    mask = model_kwargs.get("attention_mask")
    if isinstance(cache, tuple(CACHES.values())):
        _refuse_right_padding(mask)
    if isinstance(cache, (SparKVCache, SparKVDynaKVCache)) and model_kwargs.get("inputs_embeds") is None:
        with cache.loading(self, input_ids, mask):
            return _original_prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
    return _original_prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs)


def _refuse_right_padding(mask: torch.Tensor | None) -> None:
    if mask is not None and mask.ndim == 2 and not bool((mask[:, -1] != 0).all()):
        raise InputError(
            "the attention mask ends in padding. Generation goes on from the last token of every row, so pad on the "
            "left: tokenizer.padding_side = 'left'."
        )


def enable() -> None:
    """Let transformers know the caches: by name in `generate()`, and in plain `model(...)` calls.

    Importing kvsched has done it already; call it after `disable()`. Calling it twice changes nothing.
    """
    attention.enable()
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS = _original_names + tuple(CACHES)
    GenerationMixin._prepare_cache_for_generation = _prepare_cache_for_generation
    GenerationMixin._prefill = _prefill


def disable() -> None:
    """Take everything back that `enable()` changed in transformers."""
    attention.disable()
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS = _original_names
    GenerationMixin._prepare_cache_for_generation = _original_prepare
    GenerationMixin._prefill = _original_prefill
