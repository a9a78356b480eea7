"""DynaKVCache in whole models against DynamicCache: with a budget above the context they are the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, GptOssConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

import kvsched
from kvsched import DynaKVCache
from kvsched.dynakv.flash import FlashFile
from kvsched.dynakv.layer import DynaKVLayer
from kvsched.errors import ConfigError, FlashError, InputError, UnsupportedModelError

# Small enough that clusters are made, split, evicted and read again within a few hundred tokens.
OPTIONS = {"budget": 10_000, "sinks": 4, "recent": 12, "cluster_size": 3.5, "max_cluster_size": 12}


@pytest.fixture
def new_cache() -> Iterator[Callable[..., DynaKVCache]]:
    """Makes caches and closes them, also when a test fails."""
    made = []

    def make(model, **changes) -> DynaKVCache:
        made.append(DynaKVCache(model.config, OPTIONS, **changes))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def prompt(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: torch.Tensor, padding: list[int]) -> torch.Tensor:
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return mask


@torch.no_grad()
def decode(model, cache, ids, mask, steps) -> torch.Tensor:
    """Greedy decoding in plain model calls; the logits of every step, `[steps, rows, vocab]`."""
    logits = []
    output = model(ids, attention_mask=mask, past_key_values=cache, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    for _ in range(steps):
        logits.append(output.logits[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        output = model(token, attention_mask=mask, past_key_values=cache, position_ids=mask.sum(1, keepdim=True) - 1)
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("kind", "head_dim", "padding", "attention"),
    [
        ("qwen2", 16, [0], "sdpa"),
        ("qwen2", 16, [0, 50, 145], "eager"),
        ("llama", 32, [0, 50, 145], "sdpa"),
        ("gemma3", 32, [0], "eager"),
        ("gemma3", 32, [0, 50, 145], "sdpa"),
    ],
)
def test_same_logits_as_the_full_cache(tiny_model, new_cache, tmp_path, kind, head_dim, padding, attention):
    model = tiny_model(kind, head_dim=head_dim, attn_implementation=attention)
    ids = prompt(len(padding), 150)
    mask = left_padded(ids, padding)
    full = decode(model, DynamicCache(config=model.config), ids, mask, 130)
    dram = {1: "200kB", 3: "500kB"}[len(padding)]
    cache = new_cache(model, directory=tmp_path, dram=dram)
    clustered = decode(model, cache, ids, mask, 130)
    torch.testing.assert_close(clustered, full, atol=1e-4, rtol=0)
    assert torch.equal(clustered.argmax(-1), full.argmax(-1))
    report = cache.report()
    assert report.splits > 50
    assert report.bytes_written > 0 and report.misses > report.clusters and report.bytes_read_per_step > 0
    assert report.steps == 130 and report.tokens == 280
    assert report.arena_bytes <= kvsched.config.parse_bytes(dram)


def test_the_budget_decides_what_is_seen(tiny_model, new_cache):
    model = tiny_model("qwen2")
    ids = prompt(1, 300)
    # Step 0 comes from the prompt's own attention; step 1 is the first that clusters answer.
    full = decode(model, DynamicCache(config=model.config), ids, torch.ones_like(ids), 2)
    error = {}
    for budget in (0, 64, 10_000):
        cache = new_cache(model, budget=budget)
        error[budget] = (decode(model, cache, ids, torch.ones_like(ids), 2) - full)[1].abs().max().item()
    assert error[10_000] < 1e-4
    assert error[0] > error[64] > 0.01


def test_a_budget_may_be_a_fraction_and_adaptive(tiny_model, new_cache):
    model, ids = tiny_model("qwen2"), prompt(1, 300)
    expected = decode(model, new_cache(model, budget=151), ids, torch.ones_like(ids), 2)
    # The prompt's clusters may lie in another order, which half of 300 tokens chose, and are added up in it.
    half = decode(model, new_cache(model, budget=0.5), ids, torch.ones_like(ids), 2)
    torch.testing.assert_close(half, expected, atol=2e-3, rtol=0)
    fifth = decode(model, new_cache(model, budget=0.2), ids, torch.ones_like(ids), 2)
    assert (fifth - expected).abs().max() > 1e-2
    full = decode(model, DynamicCache(config=model.config), ids, torch.ones_like(ids), 2)
    error, bytes_read = [], []
    for mass in (0.3, 0.9, 1.0):
        cache = new_cache(model, mass=mass, dram="150kB")
        error.append((decode(model, cache, ids, torch.ones_like(ids), 2) - full)[1].abs().max().item())
        bytes_read.append(cache.report().bytes_read)
    assert error[0] > error[1] > error[2] and error[2] < 1e-4
    assert bytes_read[0] < bytes_read[1] < bytes_read[2]


def test_layers_are_laid_out_as_transformers_does(tiny_model, new_cache):
    cache = new_cache(tiny_model("gemma3"))
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, DynaKVLayer] * 2
    assert cache.is_sliding == [True, False] * 2


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_beam_search(tiny_model, new_cache, kind):
    model = tiny_model(kind)
    ids = prompt(2, 90)
    mask = left_padded(ids, [0, 40])
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 30, "do_sample": False}
    expected = model.generate(ids, **options)
    cache = new_cache(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    assert cache.report().clusters > 0


def test_four_padded_rows_by_four_beams(tiny_model, new_cache):
    model, ids = tiny_model("llama", num_hidden_layers=1), prompt(4, 60)
    mask = left_padded(ids, [0, 30, 10, 55])
    options = {"attention_mask": mask, "num_beams": 4, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=new_cache(model), **options), expected)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(query_pre_attn_scalar=16, attn_logit_softcapping=2.0, sliding_window=16),
        GptOssConfig(num_local_experts=2, num_experts_per_tok=1, sliding_window=16),
    ],
    ids=["soft-capped scores", "learned sinks"],
)
def test_models_whose_attention_is_not_plain(new_cache, config):
    for name, value in {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}.items():
        setattr(config, name, value)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    config.layer_types, config.initializer_range = ["sliding_attention", "full_attention"], 0.2
    config.pad_token_id, config.eos_token_id = 0, None
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = prompt(1, 100)
    logits = []
    for cache in (DynamicCache(config=model.config), new_cache(model)):
        options = {"max_new_tokens": 12, "do_sample": False, "prefill_chunk_size": 40, "output_logits": True}
        output = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **options)
        logits.append(torch.stack(output.logits))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


def test_retrieval_while_prefill_goes_on(tiny_model, new_cache):
    model, ids = tiny_model("qwen2", num_hidden_layers=2), prompt(2, 200)
    mask = left_padded(ids, [0, 60])
    options = {"attention_mask": mask, "max_new_tokens": 2, "do_sample": False, "prefill_chunk_size": 64}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **options).logits[0]
    error = {}
    for budget in (8, 64, 10_000):
        cache = new_cache(model, prefill="retrieval", budget=budget)
        error[budget] = (model.generate(ids, past_key_values=cache, **options).logits[0] - expected).abs().max().item()
    assert error[10_000] < 1e-4
    assert error[8] > error[64] > 0.01


def test_second_turn(tiny_model, new_cache):
    model = tiny_model("llama")
    full, clustered = DynamicCache(config=model.config), new_cache(model)
    for cache in (full, clustered):
        ids = model.generate(prompt(1, 120), past_key_values=cache, max_new_tokens=40, do_sample=False)
        for turn, length in enumerate((10, 150)):
            ids = torch.cat([ids, prompt(1, length, seed=turn + 1)], dim=1)
            ids = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
        cache.answer = ids
    assert torch.equal(full.answer, clustered.answer)


def test_chunked_prefill(tiny_model, new_cache):
    model = tiny_model("qwen2")
    ids = prompt(2, 210)
    options = {"attention_mask": left_padded(ids, [0, 100]), "max_new_tokens": 40, "do_sample": False}
    expected = model.generate(ids, **options)
    cache = new_cache(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, prefill_chunk_size=64, **options), expected)


def test_assisted_decoding_crops(tiny_model, new_cache):
    model, assistant = tiny_model("qwen2"), tiny_model("qwen2", num_hidden_layers=1)
    ids = prompt(1, 100)
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)
    cache = new_cache(model)
    got = model.generate(ids, past_key_values=cache, assistant_model=assistant, max_new_tokens=40, do_sample=False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("removed", [5, 100])
def test_crop(tiny_model, new_cache, removed):
    model = tiny_model("llama")
    ids = prompt(2, 150)
    logits = []
    for cache in (DynamicCache(config=model.config), new_cache(model)):
        decode(model, cache, ids, torch.ones_like(ids), 40)
        cache.crop(-removed)
        assert cache.get_seq_length() == 190 - removed
        more, seen = prompt(2, 1, seed=5), torch.ones(2, 191 - removed, dtype=torch.long)
        with torch.no_grad():
            logits.append(model(more, attention_mask=seen, past_key_values=cache).logits)
        with pytest.raises(ValueError, match="negative"):
            cache.crop(3)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)


def test_by_name_in_generate(tiny_model, tmp_path):
    model = tiny_model("qwen2")
    ids = prompt(1, 100)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    config = {**OPTIONS, "directory": str(tmp_path), "dram": "2MiB"}
    got = model.generate(
        ids,
        cache_implementation="dynakv",
        cache_config=config,
        max_new_tokens=30,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert torch.equal(got.sequences, expected)
    assert isinstance(got.past_key_values, DynaKVCache)
    assert got.past_key_values.report().clusters > 0
    got.past_key_values.close()


def test_the_cache_can_be_reset_and_used_again(tiny_model, new_cache):
    model = tiny_model("qwen2")
    ids = prompt(1, 120)
    cache = new_cache(model)
    first = decode(model, cache, ids, torch.ones_like(ids), 20)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.report().clusters == 0
    torch.testing.assert_close(decode(model, cache, ids, torch.ones_like(ids), 20), first, atol=0, rtol=0)


def test_bad_input(tiny_model, new_cache, tmp_path):
    model = tiny_model("qwen2")
    ids = prompt(2, 20)
    right = torch.ones_like(ids)
    right[1, -5:] = 0
    cache = new_cache(model)
    with pytest.raises(InputError, match="padding_side"), torch.no_grad():
        model(ids, attention_mask=right, past_key_values=cache)
    with pytest.raises(ConfigError, match="Did you mean 'budget'"):
        new_cache(model, bugdet=3)
    with pytest.raises(FlashError, match="Create it"):
        new_cache(model, directory=tmp_path / "missing")
    # The error comes out of attention, in the middle of generate().
    cache = new_cache(model, dram=3 * 4096)
    with pytest.raises(ConfigError, match=r"Set (dram|it) "):
        model.generate(prompt(1, 100), past_key_values=cache, max_new_tokens=5)


@pytest.mark.parametrize("nth", [0, 7])
def test_a_device_that_fails_ends_generation_for_good(tiny_model, new_cache, monkeypatch, tmp_path, nth):
    """Neither a wrong token nor a save of what is no longer whole."""
    model, ids = tiny_model("llama"), prompt(1, 300)
    cache, wait, calls = new_cache(model, dram="150kB"), FlashFile.wait, itertools.count()

    def fails(self, transfer):
        if next(calls) >= nth:
            raise FlashError("the device is gone")
        return wait(self, transfer)

    with monkeypatch.context() as patch, pytest.raises(FlashError, match="the device is gone"):
        patch.setattr(FlashFile, "wait", fails)
        model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
    for use in (lambda: model(ids[:, :1], past_key_values=cache), lambda: cache.save(tmp_path / "saved")):
        with pytest.raises((FlashError, UnsupportedModelError)):
            use()


def test_disabled_kvsched_is_noticed_before_a_wrong_token(tiny_model, new_cache):
    model = tiny_model("qwen2")
    cache = new_cache(model)
    kvsched.disable()
    try:
        with pytest.raises(UnsupportedModelError, match="without the DynaKV cache"):
            model.generate(prompt(1, 30), past_key_values=cache, max_new_tokens=5, do_sample=False)
    finally:
        kvsched.enable()


def test_soft_capping_and_attention_sinks(tiny_model, new_cache):
    """What the model passes to its attention function reaches the clusters: against that function over all keys."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sunk

    class Module(torch.nn.Module):
        num_key_value_groups, head_dim = 2, 16
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])

    module = Module().eval()
    model = tiny_model("qwen2")
    for inner, given in ((capped, {"softcap": 2.0}), (sunk, {"s_aux": module.sinks})):
        cache = new_cache(model)
        draw = torch.Generator().manual_seed(0)
        keys, values = (torch.randn(2, 2, 160, 16, generator=draw) for _ in range(2))
        queries = torch.randn(2, 4, 160, 16, generator=draw)
        for step in range(100, 160):
            new = slice(0 if step == 100 else step, step + 1)
            key, value = cache.update(keys[:, :, new], values[:, :, new], 0)
            layer = cache.layers[0]
            got, _ = layer.attention(inner, module, queries[:, :, new], key, value, None, scaling=0.3, **given)
        expected, _ = inner(module, queries[:, :, -1:], keys, values, None, scaling=0.3, **given)
        assert cache.report().clusters > 0
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_deterministic(tiny_model, new_cache):
    model = tiny_model("qwen2")
    ids = prompt(1, 200)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        cache = new_cache(model, budget=48, dram="400kB")
        runs.append(
            (decode(model, cache, ids, torch.ones_like(ids), 60), cache.report().clusters, cache.report().reads)
        )
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]
