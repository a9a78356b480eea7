"""A conversation kept in a folder and taken up again: what its layers know about their tokens, beside the clusters.

`snapshot` writes and checks the folder, the storage fills it with entries. Here stands what else a cache is made of,
as tensors (`layers.{i}.{name}`) and plain values, and that it fits when it comes back.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..config import DynaKVConfig
from ..errors import ConfigError, InputError, UnsupportedModelError
from .layer import DynaKVLayer, dtype_named, name_of
from .snapshot import Saved
from .storage import ClusterStorage

_MODEL = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
"""What a model's configuration says that its keys and values depend on; weights are not looked at."""

_FIXED = ("policy", "sinks", "recent", "max_cluster_size", "storage")
"""Options by which tokens were laid out: they cannot be changed afterwards."""


def save(
    folder: Path,
    config: PreTrainedConfig,
    options: DynaKVConfig,
    storage: ClusterStorage,
    layers: Sequence[CacheLayerMixin],
) -> None:
    """Keep all layers of a cache in `folder`.

    Raises:
        FlashError: clusters could not be read, or the folder not be written.
        InputError: the cache holds no tokens.
        UnsupportedModelError: the model has layers of a kind that cannot be kept.
    """
    tables: dict[str, torch.Tensor] = {}
    about = []
    for number, layer in enumerate(layers):
        found, values = _state(layer)
        tables.update({f"layers.{number}.{name}": tensor.cpu().contiguous() for name, tensor in found.items()})
        about.append(values)
    if not any(isinstance(layer, DynaKVLayer) and layer.is_initialized for layer in layers):
        raise InputError("the cache holds no tokens in clusters, so there is nothing to save.")
    chosen = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    chosen["directory"] = None if options.directory is None else os.fspath(options.directory)
    storage.save(folder, tables, {"model": _model(config), "options": chosen, "layers": about})


def saved_options(saved: Saved, config: PreTrainedConfig, changes: dict[str, Any]) -> DynaKVConfig:
    """The options of a saved cache with `changes`.

    Raises:
        ConfigError: a change is not possible any more, or an option is not known.
        FlashError: what was saved belongs to another model, or holds no cache.
    """
    about, options = saved.form.get("model"), saved.form.get("options")
    if not isinstance(options, dict) or not isinstance(about, dict):
        raise saved.refused("it holds clusters without the cache that they belong to")
    for name, value in _model(config).items():
        if about.get(name) != value:
            raise saved.refused(f"it was saved with another model: its {name} is {about.get(name)!r}, here {value!r}")
    chosen = DynaKVConfig.merge(options, changes)
    for name in _FIXED:
        if getattr(chosen, name) != options.get(name):
            raise ConfigError(
                f"{name}={getattr(chosen, name)!r}: the cache in {saved.folder} was made with {options.get(name)!r}, "
                "which cannot be changed afterwards. Leave it out."
            )
    return chosen


def restore(saved: Saved, storage: ClusterStorage, layers: Sequence[CacheLayerMixin], device: torch.device) -> None:
    """Bring what `save` kept into a new cache.

    Raises:
        FlashError: it is incomplete or does not fit.
    """
    about = saved.form.get("layers")
    if not isinstance(about, list) or len(about) != len(layers):
        raise saved.refused("it has another number of layers")
    addresses = storage.load(saved)
    try:
        for number, (layer, values) in enumerate(zip(layers, about, strict=True)):
            if values is not None:
                _restore(layer, _Take(saved, f"layers.{number}.", device), values, addresses)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise saved.refused(f"what it says of a layer cannot be used ({error})") from error
    used = [layer.clusters.addresses() for layer in layers if isinstance(layer, DynaKVLayer) and layer.is_initialized]
    each, owners = np.unique(np.concatenate([*used, addresses[:0]]), return_counts=True)
    if not used or not np.array_equal(each, np.sort(addresses[addresses >= 0])):
        raise saved.refused("its layers and its clusters do not belong together")
    storage.share(np.repeat(each, owners - 1))


def _model(config: PreTrainedConfig) -> dict[str, Any]:
    text = config.get_text_config(decoder=True)
    return {name: getattr(text, name, None) for name in _MODEL}


def _state(layer: CacheLayerMixin) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Tensors and plain values of a layer; `None` for one without tokens."""
    if not layer.is_initialized:
        return {}, None
    if isinstance(layer, DynaKVLayer):
        return layer.state()
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        tensors = {"keys": layer.keys, "values": layer.values}
        return tensors, {"dtype": name_of(layer.dtype), "tokens": int(layer.get_seq_length())}
    raise UnsupportedModelError(
        f"layers of the kind {type(layer).__name__} cannot be saved: only full and sliding attention can."
    )


def _restore(layer: CacheLayerMixin, take: _Take, values: dict[str, Any], addresses: np.ndarray) -> None:
    if isinstance(layer, DynaKVLayer):
        layer.restore(take, values, addresses)
        return
    dtype, tokens = dtype_named(values["dtype"]), values["tokens"]
    sliding = isinstance(layer, DynamicSlidingWindowLayer)
    held = min(tokens, layer.sliding_window - 1) if sliding else tokens
    layer.lazy_initialization(*(take(name, dtype, -1, -1, held, -1) for name in ("keys", "values")))
    layer.keys, layer.values = (take(name, dtype, -1, -1, held, -1) for name in ("keys", "values"))
    if sliding:
        layer.cumulative_length = tokens


class _Take:
    """Hands out the tensors of one layer, each of a form that has to be right."""

    def __init__(self, saved: Saved, prefix: str, device: torch.device) -> None:
        self._saved, self._prefix, self.device = saved, prefix, device

    def __call__(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return self._saved.table(self._prefix + name, dtype, *shape).to(self.device)
