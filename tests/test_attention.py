from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import AttentionInterface

import kvsched
from kvsched import attention

IDS = torch.arange(1, 30)[None]


class Marked(DynamicCache):
    """A cache whose keys carry a layer that notes what it is asked, and answers as the model's own attention would."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.asked: list[tuple[int, ...]] = []

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(*args, **kwargs)
        return attention.carry(keys, self), values

    def attention(self, inner, module, query, key, value, attention_mask, **kwargs):
        self.asked.append(tuple(query.shape))
        return inner(module, query, key, value, attention_mask, **kwargs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3"])
@torch.no_grad()
def test_a_marked_key_is_answered_by_its_layer(tiny_model, kind: str, implementation: str) -> None:
    model = tiny_model(kind, attn_implementation=implementation)
    cache = Marked(config=model.config)
    marked = model(IDS, past_key_values=cache).logits
    assert len(cache.asked) == model.config.num_hidden_layers
    assert set(cache.asked) == {(1, 4, 29, 16)}
    assert torch.equal(marked, model(IDS, past_key_values=DynamicCache(config=model.config)).logits)


@torch.no_grad()
def test_disabled_nobody_is_asked(tiny_model) -> None:
    model = tiny_model("qwen2")
    cache = Marked(config=model.config)
    kvsched.disable()
    try:
        model(IDS, past_key_values=cache)
    finally:
        kvsched.enable()
    assert cache.asked == []


def test_the_look_up_is_transformers_own_after_disabling() -> None:
    kvsched.disable()
    try:
        assert AttentionInterface.get_interface.__module__ == "transformers.modeling_utils"
        assert not hasattr(AttentionInterface.get_interface, "__wrapped__")
    finally:
        kvsched.enable()
    assert AttentionInterface.get_interface.__wrapped__ is not None


def test_an_unknown_attention_is_still_refused_by_transformers() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        AttentionInterface().get_interface("nonsense", lambda: None)
