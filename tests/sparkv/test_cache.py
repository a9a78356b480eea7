from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import kvsched
from kvsched import SparKVCache
from kvsched.errors import ConfigError, StoreError, UnsupportedModelError

CHUNK, KINDS = 32, ["qwen2", "llama", "gemma3"]
GREEDY = {"max_new_tokens": 24, "do_sample": False}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=KINDS)
def published(request: pytest.FixtureRequest, tiny_model, tmp_path: Path):
    """A model, a prompt whose first 224 tokens are published with others behind them, and the options to load it."""
    model, document = tiny_model(request.param), draw(1, 256)
    options = {"store": str(tmp_path), "codec": "lossless", "chunk_tokens": CHUNK}
    kvsched.publish(model, document, config=options)
    prompt = torch.cat([document[:, :230], draw(1, 20, seed=1)], dim=1)
    return model, prompt, options


def expect_same_tokens(model, ids: torch.Tensor, options: dict, **inputs: torch.Tensor) -> SparKVCache:
    expected = model.generate(ids, **inputs, **GREEDY)
    output = model.generate(
        ids, **inputs, **GREEDY, cache_implementation="sparkv", cache_config=options, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, expected)
    return output.past_key_values


@pytest.mark.parametrize("planner", ["optimal", "stream", "local"])
def test_generate_gives_the_same_tokens(published, planner: str) -> None:
    model, prompt, options = published
    report = expect_same_tokens(model, prompt, {**options, "planner": planner}).report()
    assert report.prompt_tokens == 250
    assert report.loaded_tokens == (0 if planner == "local" else 224)
    assert report.fallback is None


@torch.no_grad()
def test_logits_of_a_plain_forward_equal_full_prefill(published) -> None:
    model, prompt, options = published
    cache = SparKVCache(model.config, options)
    cache.load(model, prompt)
    assert cache.get_seq_length() == 224
    logits = model(prompt[:, 224:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(prompt).logits[:, 224:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_unloaded_cache_is_a_dynamic_cache(published) -> None:
    model, prompt, options = published
    cache = SparKVCache(model.config, options)
    logits = model(prompt, past_key_values=cache).logits
    assert torch.equal(logits, model(prompt, past_key_values=DynamicCache(config=model.config)).logits)


def test_as_past_key_values_and_over_two_turns(published) -> None:
    model, prompt, options = published
    cache, plain = SparKVCache(model.config, options), DynamicCache(config=model.config)
    first = model.generate(prompt, past_key_values=cache, **GREEDY)
    assert torch.equal(first, model.generate(prompt, past_key_values=plain, **GREEDY))
    longer = torch.cat([first, draw(1, 9, seed=2)], dim=1)
    second = model.generate(longer, past_key_values=cache, **GREEDY)
    assert torch.equal(second, model.generate(longer, past_key_values=plain, **GREEDY))
    assert cache.report().loaded_tokens == 224


def test_a_whole_published_prompt_leaves_its_last_token_to_the_model(published) -> None:
    model, prompt, options = published
    assert expect_same_tokens(model, prompt[:, :224], options).report().loaded_tokens == 192


def test_beams_share_one_load(published) -> None:
    model, prompt, options = published
    expected = model.generate(prompt, num_beams=3, **GREEDY)
    found = model.generate(prompt, num_beams=3, **GREEDY, cache_implementation="sparkv", cache_config=options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", ["unpublished", "other chunk size", "shorter than a chunk"])
def test_a_prompt_that_is_not_in_the_store_is_computed(published, case: str) -> None:
    model, prompt, options = published
    if case == "unpublished":
        prompt = draw(1, 100, seed=5)
    elif case == "other chunk size":
        options = {**options, "chunk_tokens": 64}
    else:
        prompt = prompt[:, :CHUNK]
    report = expect_same_tokens(model, prompt, options).report()
    assert report.loaded_tokens == 0 and "no prefix of this prompt is published" in report.fallback


def test_another_model_never_finds_the_prefix(published, tiny_model) -> None:
    model, prompt, options = published
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    other = tiny_model("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 123.0})
    report = expect_same_tokens(other, prompt, options).report()
    assert report.loaded_tokens == 0


def test_a_padded_prompt_is_loaded(published) -> None:
    model, prompt, options = published
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(259)[None] >= 9).long()
    report = expect_same_tokens(model, padded, options, attention_mask=mask).report()
    assert (report.prompt_tokens, report.loaded_tokens, report.fallback) == (250, 224, None)


def test_a_batch_of_prompts_published_in_part(published) -> None:
    """One published far, one not at all, one less far and padded, and the first once more."""
    model, prompt, options = published
    short = torch.cat([torch.zeros(1, 50, dtype=torch.long), prompt[:, :100], draw(1, 100, seed=4)], dim=1)
    batch = torch.cat([prompt, draw(1, 250, seed=3), short, prompt])
    mask = torch.ones_like(batch)
    mask[2, :50] = 0
    report = expect_same_tokens(model, batch, options, attention_mask=mask).report()
    assert report.prompt_tokens == 250 + 250 + 200 and report.loaded_tokens == 224 + 96
    assert len(report.depths) == 7 + 3 and "no prefix" in report.fallback


@pytest.mark.parametrize("rows", [1, 2])
def test_a_mask_with_a_hole_is_a_local_prefill(published, rows: int) -> None:
    """What follows a hidden token was published as if it had been seen."""
    model, prompt, options = published
    mask = torch.ones_like(prompt).repeat(rows, 1)
    mask[-1, 100] = 0
    cache = expect_same_tokens(model, prompt.repeat(rows, 1), options, attention_mask=mask)
    assert "hides tokens" in (cache.report().fallback or "") and cache.report().loaded_tokens == 0


@torch.no_grad()
def test_logits_of_a_padded_batch_equal_full_prefill(published) -> None:
    model, prompt, options = published
    batch = torch.cat([prompt, torch.cat([torch.zeros(1, 30, dtype=torch.long), prompt[:, :220]], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :30] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = SparKVCache(model.config, options)
    cache.load(model, batch, mask)
    seen = cache.get_seq_length()
    assert seen == 224
    inputs = {"attention_mask": mask, "position_ids": positions[:, seen:], "past_key_values": cache}
    expected = model(batch, attention_mask=mask, position_ids=positions).logits[:, seen:]
    torch.testing.assert_close(model(batch[:, seen:], **inputs).logits, expected, atol=1e-4, rtol=0)


def test_an_exception_while_loading_leaves_an_empty_cache(published, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt, options = published
    cache = SparKVCache(model.config, options)
    with pytest.raises(RuntimeError, match="stop"), cache.loading(model, prompt):
        assert cache.get_seq_length() == 224
        raise RuntimeError("stop")
    assert cache.get_seq_length() == 0
    assert cache.load(model, prompt).loaded_tokens == 224


def test_a_store_that_does_not_answer_is_a_local_prefill(published, caplog: pytest.LogCaptureFixture) -> None:
    model, prompt, options = published
    with socket.create_server(("127.0.0.1", 0)) as mute, caplog.at_level(logging.WARNING, "kvsched"):
        uri = f"http://127.0.0.1:{mute.getsockname()[1]}"
        report = expect_same_tokens(model, prompt, {**options, "store": uri, "stall_timeout": 0.5}).report()
    assert "no answer within" in report.fallback and "no answer within" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"{}", b"not json"])
def test_a_damaged_manifest_is_a_local_prefill(published, damage: bytes) -> None:
    model, prompt, options = published
    for manifest in Path(options["store"]).rglob("*.json"):
        manifest.write_bytes(damage)
    report = expect_same_tokens(model, prompt, options).report()
    assert report.loaded_tokens == 0 and "manifest" in report.fallback


def test_options_are_checked() -> None:
    config = type("Config", (), {})()
    with pytest.raises(ConfigError, match="Did you mean 'store'"):
        SparKVCache(config, {"stroe": "x"})
    with pytest.raises(ConfigError, match="needs a store"):
        SparKVCache(config)
    with pytest.raises(StoreError, match="cannot open"):
        SparKVCache(config, store="/does/not/exist")


def test_a_model_with_linear_layers_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen3NextConfig

    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        SparKVCache(Qwen3NextConfig(num_hidden_layers=4), store=tmp_path)
