from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.generation import configuration_utils
from transformers.generation.utils import GenerationMixin

import kvsched
from kvsched import DynaKVCache, SparKVCache, attention, generation
from kvsched.errors import ConfigError, InputError, UnsupportedModelError

IDS = torch.randint(1, 256, (1, 120), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 16, "do_sample": False}
DYNAKV = {"budget": 8, "sinks": 2, "recent": 4, "dram": "1MiB"}


@pytest.fixture
def options(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """`cache_config` of both names, by name."""
    return {"sparkv": {"store": str(tmp_path)}, "dynakv": {**DYNAKV, "directory": str(tmp_path)}}


@pytest.mark.parametrize(
    ("seam", "expected"),
    [
        pytest.param(
            generation._original_prepare,
            "self generation_config model_kwargs generation_mode batch_size max_cache_length",
            id="GenerationMixin._prepare_cache_for_generation",
        ),
        pytest.param(
            generation._original_prefill,
            "self input_ids generation_config model_kwargs is_first_iteration",
            id="GenerationMixin._prefill",
        ),
        pytest.param(
            attention._original_get_interface,
            "self attn_implementation default",
            id="AttentionInterface.get_interface",
        ),
    ],
)
def test_the_seams_of_transformers_have_the_shape_that_is_relied_on(seam: Any, expected: str) -> None:
    """The test that fails is named after the seam that moved."""
    assert " ".join(inspect.signature(seam).parameters) == expected


def test_the_seams_do_what_is_relied_on() -> None:
    prepare, prefill = map(inspect.getsource, (generation._original_prepare, generation._original_prefill))
    assert "generation_config.cache_implementation" in prepare, "_prepare_cache_for_generation chooses otherwise"
    assert "cache.get_seq_length()" in prefill, "_prefill no longer skips the tokens that a cache holds"
    validate = inspect.getsource(GenerationConfig.validate)
    assert "ALL_CACHE_IMPLEMENTATIONS" in validate, "GenerationConfig.validate checks names elsewhere"
    assert "sparkv" not in generation._original_names


def test_disable_takes_everything_back_and_enable_does_it_again(tiny_model, options) -> None:
    model = tiny_model("qwen2")
    kvsched.disable()
    try:
        assert configuration_utils.ALL_CACHE_IMPLEMENTATIONS is generation._original_names
        assert GenerationMixin._prefill is generation._original_prefill
        assert GenerationMixin._prepare_cache_for_generation is generation._original_prepare
        with pytest.raises(ValueError, match="cache_implementation"):
            model.generate(IDS, **GREEDY, cache_implementation="dynakv", cache_config=options["dynakv"])
    finally:
        kvsched.enable()
        kvsched.enable()
    names = configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    assert names == (*generation._original_names, *generation.CACHES)
    model.generate(IDS, **GREEDY, cache_implementation="dynakv", cache_config=options["dynakv"])


@pytest.mark.parametrize(("name", "cache_class"), [("sparkv", SparKVCache), ("dynakv", DynaKVCache)])
def test_generate_builds_the_cache_with_its_options(tiny_model, options, name: str, cache_class: type) -> None:
    output = tiny_model("qwen2").generate(
        IDS, **GREEDY, cache_implementation=name, cache_config=options[name], return_dict_in_generate=True
    )
    assert type(output.past_key_values) is cache_class
    for key, value in options[name].items():
        assert getattr(output.past_key_values.options, key) == value


@pytest.mark.parametrize("name", ["sparkv", "dynakv"])
def test_a_generation_config_can_carry_the_cache(tiny_model, options, name: str) -> None:
    config = GenerationConfig(**GREEDY, cache_implementation=name, cache_config=options[name])
    model = tiny_model("qwen2")
    first = model.generate(IDS, generation_config=config)
    assert torch.equal(first, model.generate(IDS, generation_config=config))
    assert config.cache_config == options[name]


@pytest.mark.parametrize("name", ["sparkv", "dynakv"])
def test_an_unknown_option_is_refused_with_the_nearest_name(tiny_model, options, name: str) -> None:
    key, near = {"sparkv": ("chunk_token", "chunk_tokens"), "dynakv": ("buget", "budget")}[name]
    with pytest.raises(ConfigError, match=f"Did you mean '{near}'"):
        tiny_model("qwen2").generate(IDS, **GREEDY, cache_implementation=name, cache_config={**options[name], key: 3})


@pytest.mark.parametrize("name", ["sparkv", "dynakv"])
def test_right_padding_is_refused(tiny_model, options, name: str) -> None:
    mask = torch.ones_like(IDS)
    mask[:, -3:] = 0
    with pytest.raises(InputError, match="padding_side"):
        tiny_model("qwen2").generate(
            IDS, attention_mask=mask, **GREEDY, cache_implementation=name, cache_config=options[name]
        )


@pytest.mark.parametrize("name", ["sparkv", "dynakv"])
def test_an_encoder_decoder_is_refused(options, name: str) -> None:
    model = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=256, decoder_start_token_id=0)
    )
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration"):
        model.generate(IDS, **GREEDY, cache_implementation=name, cache_config=options[name])


@pytest.mark.parametrize("name", ["sparkv", "dynakv"])
def test_name_and_cache_together_are_refused_by_transformers(tiny_model, options, name: str) -> None:
    model = tiny_model("qwen2")
    with pytest.raises(ValueError, match="Passing both"):
        model.generate(
            IDS, **GREEDY, past_key_values=DynamicCache(), cache_implementation=name, cache_config=options[name]
        )


@pytest.mark.parametrize("name", ["sparkv", "dynakv"])
def test_custom_generate_gets_the_cache(tiny_model, options, name: str) -> None:
    """The official seam for another decoding loop: it receives the cache that was asked for by name."""
    seen = []

    def loop(model, input_ids, **kwargs):
        seen.append(kwargs["past_key_values"])
        return model._sample(input_ids, **kwargs)

    model = tiny_model("qwen2")
    arguments = {**GREEDY, "cache_implementation": name, "cache_config": options[name]}
    assert torch.equal(model.generate(IDS, custom_generate=loop, **arguments), model.generate(IDS, **arguments))
    assert type(seen[0]) is generation.CACHES[name]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("other", [None, "dynamic", "static"])
def test_every_other_cache_works_as_before(tiny_model, kind: str, other: str | None) -> None:
    model = tiny_model(kind)
    kvsched.disable()
    try:
        expected = model.generate(IDS, **GREEDY, cache_implementation=other, disable_compile=True)
    finally:
        kvsched.enable()
    assert torch.equal(model.generate(IDS, **GREEDY, cache_implementation=other, disable_compile=True), expected)
