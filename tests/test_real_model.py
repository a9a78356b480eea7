"""Targets S1 and D1 on the real model: the same logits to 1e-4 and the same 256 greedy tokens, whatever the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import kvsched
from kvsched import SparKVCache
from kvsched.sparkv import cache as sparkv_cache
from kvsched.sparkv import loader
from kvsched.sparkv.store import Store

pytestmark = pytest.mark.real_model

TOLERANCE = 1e-4
PROMPT = 900
LOSSLESS = {"codec": "lossless", "chunk_tokens": 128}
GENERATE = {"max_new_tokens": 256, "min_new_tokens": 256, "do_sample": False, "output_logits": True}


@dataclass(frozen=True)
class Reference:
    """A real prompt, and what the model says to it with transformers' own cache."""

    model: PreTrainedModel
    ids: torch.Tensor
    tokens: torch.Tensor
    logits: torch.Tensor

    def expect_same(self, **cache: object) -> object:
        output = self.model.generate(self.ids, **GENERATE, return_dict_in_generate=True, **cache)
        assert torch.equal(output.sequences, self.tokens)
        difference = (torch.stack(output.logits) - self.logits).abs().max()
        assert difference <= TOLERANCE, f"logits differ by {difference:.1e}"
        return output.past_key_values.report()


@pytest.fixture(scope="module")
def reference(real_model) -> Reference:
    model, tokenizer = real_model
    ids = tokenizer(topics["customization"], return_tensors="pt").input_ids[:, :PROMPT]
    output = model.generate(ids, **GENERATE, return_dict_in_generate=True)
    return Reference(model, ids, output.sequences, torch.stack(output.logits))


@pytest.fixture(scope="module")
def store(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    kvsched.publish(reference.model, reference.ids, store=folder, config=LOSSLESS)
    return folder


def test_sparkv_lossless_equals_full_prefill_over_256_tokens(reference: Reference, store: Path) -> None:
    report = reference.expect_same(cache_implementation="sparkv", cache_config={"store": str(store), **LOSSLESS})
    assert report.loaded_tokens == 896 and report.fallback is None


@pytest.mark.parametrize(
    "depths",
    [[24] * 7, [24, 24, 20, 12, 9, 1, 0], [23, 23, 5, 5, 5, 2, 1], [1] * 7, [0] * 7],
    ids=["all computed", "steep", "stairs", "first layer", "all streamed"],
)
@torch.no_grad()
def test_every_staircase_gives_the_logits_of_full_prefill(
    reference: Reference, store: Path, monkeypatch: pytest.MonkeyPatch, depths: list[int]
) -> None:
    monkeypatch.setitem(loader.PLANNERS, "optimal", lambda *_: np.array(depths))
    monkeypatch.setattr(loader, "_REPLAN_SECONDS", 1e6)  # seconds: the first plan stands
    monkeypatch.setattr(loader, "_MIN_GAIN", -1e9)
    monkeypatch.setitem(sparkv_cache._last_goodput, Store(store).uri, 1e6)  # known, so that the plan comes first
    cache = SparKVCache(reference.model.config, store=store, **LOSSLESS)
    assert cache.load(reference.model, reference.ids).depths == tuple(depths)
    logits = reference.model(reference.ids[:, cache.get_seq_length() :], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, reference.logits[0], atol=TOLERANCE, rtol=0)


def test_dynakv_with_budget_for_everything_equals_full_attention(reference: Reference, tmp_path: Path) -> None:
    report = reference.expect_same(
        cache_implementation="dynakv",
        cache_config={"directory": tmp_path, "budget": PROMPT + 256, "dram": "24MiB"},
    )
    assert report.bytes_read > 0, "nothing came from flash, so nothing was tested"
