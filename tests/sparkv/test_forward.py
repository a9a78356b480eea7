from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Qwen3NextConfig

from kvsched.errors import UnsupportedModelError
from kvsched.sparkv.forward import PrefixCache, kv_shapes

KINDS = ["qwen2", "llama", "gemma3"]


def reference(model, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    cache = DynamicCache()  # without a configuration it keeps every layer whole, sliding ones too
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_to_any_depth_equal_one_whole_forward(tiny_model, kind: str) -> None:
    model = tiny_model(kind)
    ids = torch.randint(0, model.config.vocab_size, (1, 96), generator=torch.Generator().manual_seed(0))
    expected = reference(model, ids)
    layers = len(expected)
    cache = PrefixCache(model.config, 96)
    for chunk, depth in enumerate([layers, layers - 1, 1]):
        start = 32 * chunk
        cache.compute(model, ids[:, start : start + 32], start, lambda layer, depth=depth: layer + 1 < depth)
        for layer in range(layers):
            loaded, (keys, values) = cache.layers[layer], expected[layer]
            span = slice(start, start + 32)
            if layer < depth:
                torch.testing.assert_close(loaded.keys[:, :, span], keys[:, :, span], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(loaded.values[:, :, span], values[:, :, span], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_the_model_produces(tiny_model, kind: str) -> None:
    model = tiny_model(kind)
    expected = reference(model, torch.arange(8)[None])
    assert kv_shapes(model.config) == [(keys.shape[1], keys.shape[3]) for keys, _ in expected]


@pytest.mark.parametrize("kind", KINDS)
def test_allocated_memory_is_where_both_paths_write(tiny_model, kind: str) -> None:
    model = tiny_model(kind)
    cache = PrefixCache(model.config, 64).allocate(model)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    cache.compute(model, torch.arange(32)[None], 0)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert {layer.keys.shape[2] for layer in cache.layers} == {64}


def test_a_model_that_hands_over_other_shapes_is_refused(tiny_model) -> None:
    model = tiny_model("qwen2")
    cache = PrefixCache(model.config, 64).allocate(model)
    cache.layers[0].lazy_initialization(torch.empty(1, 3, 0, 16), torch.empty(1, 3, 0, 16))
    with pytest.raises(UnsupportedModelError, match="2 heads of 16"):
        cache.compute(model, torch.arange(32)[None], 0)


def test_layers_above_the_depth_are_not_run(tiny_model) -> None:
    model, ran = tiny_model("qwen2"), []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    PrefixCache(model.config, 8).compute(model, torch.arange(8)[None], 0, lambda layer: layer + 1 < 2)
    assert ran == [0]


def test_a_model_with_other_state_than_keys_and_values_is_refused() -> None:
    config = Qwen3NextConfig(num_hidden_layers=4)
    assert "linear_attention" in config.layer_types
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        PrefixCache(config, 8)


def test_a_model_that_does_not_use_the_cache_is_refused(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2")
    monkeypatch.setattr(model.model, "forward", lambda **kwargs: None)
    with pytest.raises(UnsupportedModelError, match="did not hand"):
        PrefixCache(model.config, 8).compute(model, torch.arange(8)[None], 0)
