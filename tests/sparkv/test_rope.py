"""Un-rotated keys are what the model's projections gave, and come back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from kvsched.sparkv.rope import Rotation


@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 120_000), st.sampled_from([8, 10, 64]))
def test_a_rotation_that_is_undone_comes_back(heads: int, tokens: int, position: int, width: int) -> None:
    rotation = Rotation([tuple(10 ** (-n / 2) for n in range(4))])
    keys = torch.randn(heads, tokens, width)
    back = rotation.apply(rotation.remove(keys, 0, position), 0, position)
    torch.testing.assert_close(back, keys, atol=3e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("qwen2", {"rope_type": "default", "rope_theta": 1e4}),
        ("qwen2", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
        ("qwen2", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
        ("llama", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 1024}),
        ("gemma3", None),
    ],
)
@torch.no_grad()
def test_equal_tokens_have_equal_keys_once_the_models_rotation_is_off(tiny_model, kind: str, rope: dict | None) -> None:
    """In the first layer a key depends on nothing but its token and its position."""
    model = tiny_model(kind, **({} if rope is None else {"rope_parameters": rope}))
    cache = DynamicCache()
    model(torch.full((1, 12), 7), past_key_values=cache)
    for layer in [0] if kind != "gemma3" else [0, 1]:  # equal tokens stay equal, so the next layer can tell as well
        keys = cache.layers[layer].keys[0]
        bare = Rotation.of(model, len(cache.layers)).remove(keys, layer, 0)
        assert not torch.allclose(keys[:, :1], keys, atol=1e-2)
        torch.testing.assert_close(bare, bare[:, :1].expand_as(bare), atol=3e-5, rtol=1e-4)


def test_gemma_3_turns_its_two_kinds_of_layers_at_two_rates(tiny_model) -> None:
    rates = Rotation.of(tiny_model("gemma3"), 4).frequencies
    assert rates[0] == rates[2] != rates[1] == rates[3]


def test_a_model_without_a_rotation_is_left_as_it_is(tiny_model) -> None:
    model = tiny_model("qwen2")
    del model.model.rotary_emb
    keys = torch.randn(2, 5, 16)
    assert Rotation.of(model, 3).remove(keys, 1, 100) is keys
