"""Lets a cache layer answer attention itself.

`Cache.update()` never sees the query. A layer that holds its keys elsewhere than in DRAM therefore returns a key tensor
that carries the layer (`carry`), and the attention function that the model looks up finds it there and asks the layer
(`CacheAttention.attention`). The look-up is wrapped instead of a new implementation registered: so the caches work with
whichever attention a model was loaded with (eager with soft-capping included), nothing is set on the model, and nothing
has to be set back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.modeling_utils import AttentionInterface

_CARRIER = "kvsched_layer"
_original_get_interface = AttentionInterface.get_interface


class CacheAttention(Protocol):
    """A cache layer that answers attention over the keys it holds."""

    def attention(
        self,
        inner: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attention output for `query`, in the form of transformers' attention functions.

        Args:
            inner: the attention function that the model was loaded with.
            module: the model's attention module.
            query: `[batch, query_heads, q, head_dim]`.
            key, value: `[batch, kv_heads, n, head_dim]`, what `update()` returned.
            attention_mask: whatever the model's mask function made; `None` where plain causal attention is meant.
            kwargs: `scaling`, `dropout`, `softcap`, ... as the model passes them.

        Returns:
            Output `[batch, q, query_heads, head_dim]`, and the weights where the function has them.
        """
        ...


def carry(key: torch.Tensor, layer: CacheAttention) -> torch.Tensor:
    """`key`, marked so that attention over it is answered by `layer`."""
    setattr(key, _CARRIER, layer)
    return key


@functools.cache
def _ask_layer_first(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        layer = getattr(key, _CARRIER, None)
        if layer is None:
            return inner(module, query, key, value, attention_mask, **kwargs)
        return layer.attention(inner, module, query, key, value, attention_mask, **kwargs)

    return attention


@functools.wraps(_original_get_interface)
def _get_interface(
    self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]
) -> Callable[..., Any]:
    return _ask_layer_first(_original_get_interface(self, attn_implementation, default))


def enable() -> None:
    """Make every model's attention look for a layer on its keys. Calling it twice changes nothing."""
    AttentionInterface.get_interface = _get_interface


def disable() -> None:
    """Give transformers its own look-up back."""
    AttentionInterface.get_interface = _original_get_interface
