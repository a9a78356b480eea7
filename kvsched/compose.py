"""Both caches in one: a prompt's beginning is loaded from a store, and becomes clusters on flash as it comes.

`sparkv` and `dynakv` know nothing of each other; here they meet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .config import DynaKVConfig, SparKVConfig
from .dynakv.cache import DynaKVCache
from .dynakv.layer import DynaKVLayer
from .errors import ConfigError
from .sparkv.cache import SparKVCache

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_CONFIGS = {"sparkv": SparKVConfig, "dynakv": DynaKVConfig}


class SparKVDynaKVCache(DynaKVCache):
    """A `DynaKVCache` whose first tokens a `SparKVCache` loads: `generate(cache_implementation="sparkv+dynakv")`.

    A layer of the loaded prefix is clustered when the model's pass over the rest of the prompt comes to it, while
    layers above are still arriving. Until all have come the prefix lies in DRAM too, as `sparkv` keeps it: what is
    lost on the way is computed from it. Afterwards the cache is a `DynaKVCache` in every respect.

    Args:
        config: the model's configuration.
        options: `{"sparkv": {...}, "dynakv": {...}}`, or the options of both in one mapping: no name is in both.

    Raises:
        ConfigError: an option is unknown or invalid, or residuals would come to tokens that lie in clusters.
        FlashError, StoreError, UnsupportedModelError: as the two caches have it.
    """

    def __init__(self, config: PreTrainedConfig, options: Mapping[str, Any] | None = None, **changes: Any) -> None:
        apart = options_apart({**(options or {}), **changes})
        if apart["sparkv"].get("codec") == "progressive":
            raise ConfigError(
                "codec='progressive' refines a prefix while decoding goes on, which tokens in clusters cannot take. "
                "Choose 'balanced', the default, or another."
            )
        self.prefix = SparKVCache(config, apart["sparkv"])
        self._coming: dict[int, torch.Tensor] = {}
        super().__init__(config, apart["dynakv"])

    @contextlib.contextmanager
    def loading(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Load what is published of the prompts' beginnings while the block passes the rest of them to the model.

        `prefix.report()` has the numbers of it. A cache that holds tokens already loads nothing.

        Args:
            model, input_ids, attention_mask: as in `SparKVCache.load`.
        """
        if self.get_seq_length() > 0:
            yield
            return
        try:
            with self.prefix.loading(model, input_ids, attention_mask):
                columns = self.prefix.get_seq_length()
                mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                real = mask[:, :columns] != 0
                self._coming = dict.fromkeys(range(len(self.layers) if columns else 0), real)
                yield
                for layer in tuple(self._coming):
                    self._take(layer)
        except BaseException:
            self._coming.clear()
            self.reset()
            raise
        self.prefix.reset()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in DynaKVCache; waits for this layer of the prefix if it has not come."""
        self._take(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, those included that are on their way."""
        if layer_idx in self._coming:
            return int(self.prefix.get_seq_length(layer_idx))
        return int(super().get_seq_length(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys for which the model makes its mask."""
        held = self.prefix.layers if layer_idx in self._coming else self.layers
        length, offset = held[layer_idx].get_mask_sizes(query_length)
        return int(length), int(offset)

    def _take(self, index: int) -> None:
        if index not in self._coming:
            return
        self.prefix.take(index)
        real, loaded, layer = self._coming.pop(index), self.prefix.layers[index], self.layers[index]
        if isinstance(layer, DynaKVLayer):
            layer.take_in(loaded.keys, loaded.values, real)
            loaded.keys = loaded.values = loaded.keys[:, :, :0]
        else:
            self.layers[index], self.prefix.layers[index] = loaded, layer


def options_apart(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each cache, from nested or flat ones.

    Raises:
        ConfigError: neither cache has an option of that name, or nested and flat ones are mixed.
    """
    if nested := set(options) & set(_CONFIGS):
        if left := set(options) - nested:
            raise ConfigError(f"{min(left)!r} stands beside {min(nested)!r}: write it inside of 'sparkv' or 'dynakv'.")
        return {name: dict(options.get(name) or {}) for name in _CONFIGS}
    owner = {field.name: name for name, config in _CONFIGS.items() for field in dataclasses.fields(config)}
    apart: dict[str, dict[str, Any]] = {name: {} for name in _CONFIGS}
    for name, value in options.items():
        if name not in owner:
            near = difflib.get_close_matches(str(name), owner, n=1, cutoff=0.0)[0]
            raise ConfigError(f"neither cache has an option {name!r}. Did you mean {near!r} of {owner[near]}?")
        apart[owner[name]][name] = value
    return apart
