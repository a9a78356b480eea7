"""Depth-limited prefill: the keys and values of a chunk's first layers, from an unmodified model.

`PrefixCache.update()` ends the forward with a private exception once the wanted layer has handed over its keys and
values. The attention and MLP of that layer, and all layers above, are never run: only its K/V projection was needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class _StopForwardError(Exception):
    """Raised inside `update()` to end a forward; never leaves this module."""


def wait_for(device: torch.device) -> None:
    """Let `device` finish what was launched on it: before that, neither times nor plans mean anything."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def kv_shapes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """KV heads and head dimension of every layer, as the model's configuration states them."""
    return [
        (
            getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads,
            getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads,
        )
        for layer in config.get_text_config(decoder=True).per_layer_config
    ]


class PrefixLayer(CacheLayerMixin):
    """One layer's keys and values for a whole prefix, `[1, heads, tokens, head_dim]`, filled chunk by chunk.

    A sliding layer keeps the whole prefix too: the model's mask hides what lies outside its window, and streamed
    chunks can be put anywhere.
    """

    def __init__(self, capacity: int, is_sliding: bool) -> None:
        super().__init__()
        self.capacity, self.is_sliding, self.length = capacity, is_sliding, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = key_states.new_empty((*key_states.shape[:2], self.capacity, key_states.shape[3]))
        self.values = value_states.new_empty((*value_states.shape[:2], self.capacity, value_states.shape[3]))
        self.is_initialized = True

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put `keys` and `values` `[1, heads, n, head_dim]` at token `start`.

        Once memory is allocated, threads may write at the same time, each its own tokens.

        Raises:
            UnsupportedModelError: they have another shape than the layer.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        stop = start + keys.shape[2]
        for held, new in ((self.keys, keys), (self.values, values)):
            if (held.shape[1], held.shape[3]) != (new.shape[1], new.shape[3]):
                raise UnsupportedModelError(
                    f"a layer hands over {new.shape[1]} heads of {new.shape[3]} where the model's configuration says "
                    f"{held.shape[1]} of {held.shape[3]}, so its chunks cannot be told from foreign ones."
                )
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.write(self.length, key_states, value_states)
        self.length += key_states.shape[2]
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class PrefixCache(Cache):
    """The cache under a prefix that is being computed and streamed at once.

    Args:
        config: the model's configuration.
        tokens: length of the prefix.

    Raises:
        UnsupportedModelError: a layer is neither full nor sliding attention, so its state is more than K and V.
    """

    def __init__(self, config: PreTrainedConfig, tokens: int) -> None:
        kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        foreign = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if foreign:
            raise UnsupportedModelError(
                f"SparKV loads layers of full and sliding attention; this model also has {', '.join(foreign)}. "
                "Leave cache_implementation out for this model."
            )
        super().__init__(layers=[PrefixLayer(tokens, kind == "sliding_attention") for kind in kinds])
        self._go_on: Callable[[int], bool] = lambda layer: True

    def allocate(self, model: PreTrainedModel) -> PrefixCache:
        """Make room for the whole prefix in every layer, in the shapes that the model's configuration states."""
        for layer, (heads, head_dim) in zip(self.layers, kv_shapes(model.config), strict=True):
            empty = torch.empty(1, heads, 0, head_dim, dtype=model.dtype, device=model.device)
            layer.lazy_initialization(empty, empty)
        return self

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        wait_for(key_states.device)
        if not self._go_on(layer_idx) or layer_idx + 1 == len(self.layers):
            raise _StopForwardError
        return states

    @torch.no_grad()
    def compute(
        self,
        model: PreTrainedModel,
        token_ids: torch.Tensor,
        start: int,
        go_on: Callable[[int], bool] = lambda layer: True,
    ) -> None:
        """Run `model` on `token_ids` `[1, n]` at position `start`; keeps keys and values of each layer it reaches.

        Args:
            go_on: asked with the index of every layer whose keys and values have just been written; the forward ends
                when it answers no. After the last layer's it ends anyway.
        """
        for layer in self.layers:
            layer.length = start
        self._go_on = go_on
        try:
            model.base_model(input_ids=token_ids.to(model.device), past_key_values=self, use_cache=True)
        except _StopForwardError:
            return
        raise UnsupportedModelError(
            f"{type(model).__name__} did not hand the keys and values of its last layer to Cache.update(), "
            "so its prefix cannot be computed in parts."
        )
