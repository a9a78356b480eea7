"""A conversation that is saved, loaded and gone on with: the same tokens, or a clear refusal."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, PreTrainedModel

from kvsched import DynaKVCache
from kvsched.dynakv import snapshot
from kvsched.errors import ConfigError, FlashError, InputError

OPTIONS = {"budget": 10_000, "sinks": 4, "recent": 12, "cluster_size": 3.5, "max_cluster_size": 12, "io_threads": 2}
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def prompt(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def conversation(model: PreTrainedModel, cache, rows: int = 1) -> torch.Tensor:
    """A prompt and the answer to it; the first row is shorter by 30 tokens."""
    ids = prompt(rows, 150)
    mask = torch.ones_like(ids)
    mask[1:, :30] = 0
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)


def second_turn(model: PreTrainedModel, cache, ids: torch.Tensor) -> torch.Tensor:
    ids = torch.cat([ids, prompt(len(ids), 20, seed=1)], dim=1)
    mask = torch.ones_like(ids)
    mask[1:, :30] = 0
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **{**GREEDY, "max_new_tokens": 40})


def test_a_save_in_8_bits_goes_on_with_the_tokens_that_it_had(tiny_model, tmp_path):
    model = tiny_model("qwen2", num_hidden_layers=1)
    cache = DynaKVCache(model.config, OPTIONS, storage="int8", dram="100kB")
    ids = conversation(model, cache, rows=2)
    cache.save(tmp_path)
    expected = second_turn(model, cache, ids)
    cache.close()
    loaded = DynaKVCache.load(tmp_path, model.config, dram="1MB")
    assert loaded.options.storage == "int8"
    assert torch.equal(second_turn(model, loaded, ids), expected)
    loaded.close()
    with pytest.raises(ConfigError, match=r"storage='auto': .* made with 'int8'"):
        DynaKVCache.load(tmp_path, model.config, storage="auto")


@pytest.mark.parametrize(
    ("kind", "rows", "policy"), [("qwen2", 2, "dynakv"), ("gemma3", 1, "dynakv"), ("llama", 1, "static")]
)
def test_goes_on_with_the_same_tokens(tiny_model, tmp_path, kind, rows, policy):
    model = tiny_model(kind)
    full = DynamicCache(config=model.config)
    expected = second_turn(model, full, conversation(model, full, rows))
    cache = DynaKVCache(model.config, OPTIONS, policy=policy, dram="300kB", directory=tmp_path)
    ids = conversation(model, cache, rows)
    cache.save(tmp_path / "saved")
    before = cache.report()
    assert torch.equal(second_turn(model, cache, ids), expected), "the saved cache can be used on"
    cache.close()
    for dram in ("300kB", "2MB"):
        loaded = DynaKVCache.load(tmp_path / "saved", model.config, dram=dram)
        report = loaded.report()
        assert (report.tokens, report.steps) == (before.tokens, before.steps)
        assert (report.clusters, report.splits) == (before.clusters, before.splits)
        assert torch.equal(second_turn(model, loaded, ids), expected)
        loaded.close()


def test_loaded_caches_can_be_cropped_and_saved_again(tiny_model, tmp_path):
    model = tiny_model("qwen2")
    cache = DynaKVCache(model.config, OPTIONS)
    ids = conversation(model, cache)
    for tokens in (140, 90):
        cache.save(tmp_path)
        cache.close()
        cache = DynaKVCache.load(tmp_path, model.config)
        cache.crop(tokens - cache.get_seq_length())
        answer = second_turn(model, cache, ids[:, :tokens])
        asked = answer[:, :-40]
        full = model.generate(asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=40)
        assert torch.equal(answer, full)
    cache.close()


def test_rows_that_share_clusters_still_do_when_loaded(tiny_model, tmp_path):
    model = tiny_model("llama", num_hidden_layers=1)
    cache = DynaKVCache(model.config, OPTIONS)
    ids = torch.cat([conversation(model, cache), prompt(1, 20, seed=1)], dim=1).repeat(2, 1)
    cache.batch_repeat_interleave(2)
    cache.save(tmp_path)
    loaded = DynaKVCache.load(tmp_path, model.config)
    assert loaded._storage.pools.used == cache._storage.pools.used == loaded.report().clusters / 2
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": True, "top_k": 50}
    answers = []
    for each in (cache, loaded):
        torch.manual_seed(0)
        answers.append(model.generate(ids, past_key_values=each, **options))
        each.close()
    assert torch.equal(*answers) and not torch.equal(*answers[0])


def test_what_does_not_fit_is_refused(tiny_model, tmp_path):
    model = tiny_model("qwen2")
    empty = DynaKVCache(model.config, OPTIONS)
    with pytest.raises(InputError, match="nothing to save"):
        empty.save(tmp_path / "empty")
    empty.close()
    cache = DynaKVCache(model.config, OPTIONS)
    conversation(model, cache)
    cache.save(tmp_path)
    cache._storage.save(tmp_path / "clusters")
    cache.close()
    with pytest.raises(FlashError, match="num_hidden_layers is 3, here 2"):
        DynaKVCache.load(tmp_path, tiny_model("qwen2", num_hidden_layers=2).config)
    with pytest.raises(ConfigError, match=r"max_cluster_size=16: .* made with 12"):
        DynaKVCache.load(tmp_path, model.config, max_cluster_size=16)
    with pytest.raises(ConfigError, match="Did you mean 'budget'"):
        DynaKVCache.load(tmp_path, model.config, bugdet=3)
    with pytest.raises(FlashError, match="without the cache"):
        DynaKVCache.load(tmp_path / "clusters", model.config)
    with pytest.raises(FlashError, match="No such file"):
        DynaKVCache.load(tmp_path / "nowhere", model.config)


@pytest.mark.parametrize(
    ("table", "harm"),
    [
        ("layers.1.position", "gone"),
        ("layers.1.entries", "narrower"),
        ("layers.0.index.address", "elsewhere"),
        ("layers.2.index.size", "holes"),
        ("layers.2.position", "later"),
        ("size", "narrower"),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(tiny_model, tmp_path, table, harm):
    """Checksums that are right say nothing about the rest: a program with a mistake may have written it."""
    model = tiny_model("qwen2")
    cache = DynaKVCache(model.config, OPTIONS)
    conversation(model, cache)
    cache.save(tmp_path)
    cache.close()
    (path,) = tmp_path.glob("*.safetensors")
    tables = load_file(path)
    if harm == "gone":
        del tables[table]
    elif harm == "narrower":
        tables[table] = tables[table][..., :-1].contiguous()
    else:
        tables[table].flatten()[:1] = {"elsewhere": int(tables[table].max()), "holes": 0, "later": 10_000}[harm]
    save_file(tables, path)
    manifest = json.loads((tmp_path / snapshot.MANIFEST).read_text())
    manifest["tables_sum"] = snapshot.zlib.crc32(path.read_bytes())
    del manifest["sum"]
    manifest["sum"] = snapshot._sum(manifest)
    (tmp_path / snapshot.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(FlashError, match="no clusters can be taken"):
        DynaKVCache.load(tmp_path, model.config)


@pytest.mark.parametrize(("call", "code"), [("fsync", errno.EIO), ("replace", errno.ENOSPC), ("write", errno.ENOSPC)])
def test_a_save_that_fails_leaves_the_one_before_and_the_cache(tiny_model, tmp_path, monkeypatch, call, code):
    model = tiny_model("llama")
    cache = DynaKVCache(model.config, OPTIONS)
    ids = conversation(model, cache)
    cache.save(tmp_path / "saved")
    expected = second_turn(model, cache, ids)

    def fails(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(snapshot, "save_tables", fails)
        else:
            patch.setattr(os, call, fails)
        with pytest.raises(FlashError, match="cannot save"):
            cache.save(tmp_path / "saved")
    cache.close()
    loaded = DynaKVCache.load(tmp_path / "saved", model.config)
    assert torch.equal(second_turn(model, loaded, ids), expected)
    loaded.close()
