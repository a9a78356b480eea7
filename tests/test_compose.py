"""A prefix from a store that becomes clusters on flash: the same tokens as with neither."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import kvsched
from kvsched import DynaKVConfig, SparKVConfig, SparKVDynaKVCache
from kvsched.compose import options_apart
from kvsched.errors import ConfigError

SPARKV = {"codec": "lossless", "chunk_tokens": 32}
DYNAKV = {"budget": 10_000, "sinks": 4, "recent": 12, "max_cluster_size": 12, "dram": "500kB", "io_threads": 2}
GREEDY = {"do_sample": False, "max_new_tokens": 30}


def prompt(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 256, (rows, tokens), generator=torch.Generator().manual_seed(0))


def options(store: Path, **changes: Any) -> dict[str, Any]:
    return {"sparkv": {**SPARKV, "store": str(store), **changes}, "dynakv": DYNAKV}


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
@pytest.mark.parametrize("planner", ["stream", "local", "token_split"])
def test_same_tokens_as_without(tiny_model, tmp_path, kind, planner):
    model, ids = tiny_model(kind), prompt(1, 200)
    kvsched.publish(model, ids, store=tmp_path, config=SPARKV)
    answer = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **answer)
    output = model.generate(
        ids,
        **answer,
        cache_implementation="sparkv+dynakv",
        cache_config=options(tmp_path, planner=planner),
    )
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)
    assert torch.equal(output.sequences, expected.sequences)
    cache = output.past_key_values
    assert type(cache) is SparKVDynaKVCache
    assert (cache.prefix.report().loaded_tokens > 0) == (planner != "local")
    report = cache.report()
    assert report.clusters > 0 and report.tokens == 229
    assert cache.prefix.get_seq_length() == 0, "the prefix is held once"
    cache.close()


@pytest.mark.parametrize(
    "search", [{}, {"num_beams": 3, "max_new_tokens": 8}, {"prefill_chunk_size": 24}], ids=["greedy", "beams", "chunks"]
)
def test_batches_with_padding_beams_and_chunks(tiny_model, tmp_path, search):
    model, ids = tiny_model("llama"), prompt(2, 150)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    for row, pad in zip(ids, (0, 50), strict=True):
        kvsched.publish(model, row[None, pad:], store=tmp_path, config=SPARKV)
    expected = model.generate(ids, attention_mask=mask, **{**GREEDY, **search})
    cache = SparKVDynaKVCache(model.config, options(tmp_path))
    assert torch.equal(
        model.generate(ids, attention_mask=mask, past_key_values=cache, **{**GREEDY, **search}), expected
    )
    assert cache.prefix.report().loaded_tokens == 128 + 96
    cache.close()


def test_what_is_not_published_is_computed(tiny_model, tmp_path):
    model, ids = tiny_model("qwen2"), prompt(1, 100)
    cache = SparKVDynaKVCache(model.config, options(tmp_path))
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), model.generate(ids, **GREEDY))
    assert "published" in cache.prefix.report().fallback
    cache.close()


def test_a_second_turn_loads_nothing(tiny_model, tmp_path):
    model, ids = tiny_model("qwen2"), prompt(1, 100)
    kvsched.publish(model, ids, store=tmp_path, config=SPARKV)
    cache = SparKVDynaKVCache(model.config, options(tmp_path))
    answer = model.generate(ids, past_key_values=cache, **GREEDY)
    more = torch.cat([answer, prompt(1, 40)], dim=1)
    mask = torch.ones_like(more)
    expected = model.generate(more, attention_mask=mask, **GREEDY)
    loaded = cache.prefix.report()
    assert torch.equal(model.generate(more, attention_mask=mask, past_key_values=cache, **GREEDY), expected)
    assert cache.prefix.report() == loaded
    cache.close()


def test_a_pass_that_fails_leaves_an_empty_cache(tiny_model, tmp_path):
    model, ids = tiny_model("qwen2"), prompt(1, 100)
    kvsched.publish(model, ids, store=tmp_path, config=SPARKV)
    cache = SparKVDynaKVCache(model.config, options(tmp_path))
    with pytest.raises(KeyboardInterrupt), cache.loading(model, ids):
        raise KeyboardInterrupt
    assert cache.get_seq_length() == 0
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), model.generate(ids, **GREEDY))
    cache.close()


def test_options_nested_and_flat(tmp_path):
    names = [{field.name for field in dataclasses.fields(config)} for config in (SparKVConfig, DynaKVConfig)]
    assert not names[0] & names[1], "a flat option could mean either"
    flat = options_apart({**SPARKV, "store": "s", **DYNAKV})
    assert flat == options_apart({"sparkv": {**SPARKV, "store": "s"}, "dynakv": DYNAKV})
    assert options_apart({"dynakv": DYNAKV}) == {"sparkv": {}, "dynakv": DYNAKV}
    with pytest.raises(ConfigError, match="Did you mean 'budget' of dynakv"):
        options_apart({"buget": 3})
    with pytest.raises(ConfigError, match="'budget' stands beside 'sparkv'"):
        options_apart({"sparkv": {}, "budget": 3})


def test_residuals_are_refused(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="Choose 'balanced'"):
        SparKVDynaKVCache(tiny_model("qwen2").config, options(tmp_path, codec="progressive"))
