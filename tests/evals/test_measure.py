"""Measuring caches against the full one, on a random model: exact caches are at no distance, others are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from kvsched.sparkv.forward import PrefixCache
from kvsched_evals.measure import Prompts, ask, divergence, equal_prefix, take
from kvsched_evals.peers import QuantizedLM, opened
from kvsched_evals.results import Question
from kvsched_evals.suite import Suite, Variant

PROMPT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3 + "And"
SMALL = {"sinks": 2, "recent": 8, "dram": "1MiB"}


@pytest.fixture
def tokenizer(byte_tokenizer) -> PreTrainedTokenizerFast:
    return byte_tokenizer


class Filter:
    name = "none"

    def apply(self, instances: list[Instance]) -> None:
        for one in instances:
            one.filtered_resps[self.name] = one.resps[0]


class FakeTask:
    """As much of an lm-eval task as `ask` needs; an answer's score is its length."""

    _filters = (Filter(),)

    def __init__(self, kind: str) -> None:
        self.OUTPUT_TYPE = kind

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
        return {"length": float(len(results))} if self.OUTPUT_TYPE != "generate_until" else {"length": len(results[0])}


def questions(kind: str) -> list[Instance]:
    asked: list[tuple[Any, ...]]
    if kind == "generate_until":
        asked = [(PROMPT, {"until": [], "max_gen_toks": 12})]
    elif kind == "multiple_choice":
        asked = [(PROMPT, choice) for choice in (" A", " Bob", " B")]
    else:
        asked = [(PROMPT, " it was the age of foolishness")]
    request = "generate_until" if kind == "generate_until" else "loglikelihood"
    return [Instance(request, {}, one, number, ("fake", 7, 1)) for number, one in enumerate(asked)]


def measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, kind: str, *variants: Variant
) -> list[Question]:
    suite = Suite(name="s", tasks=[{"task": "fake", "limit": 1}], caches=[{"cache": "full"}])
    with opened(model, tokenizer, (Variant("full"), *variants)) as lms:
        return [
            ask(lm, FakeTask(kind), questions(kind), lms[0], suite.cell("fake", None, 0, lm.variant))  # type: ignore[arg-type]
            for lm in lms
        ]


EXACT = [
    Variant("dynakv", "dynakv", 1.0, options={**SMALL, "sinks": 64}),
    Variant("dynakv", "token-topk", 1.0, options={**SMALL, "sinks": 64}),
    Variant("sparkv", codec="lossless", options={"chunk_tokens": 32}),
    Variant("sparkv+dynakv", "dynakv", 1.0, "lossless", {**SMALL, "sinks": 64, "chunk_tokens": 32}),
]
LOSSY = [
    Variant("dynakv", "local", 0.05, options=SMALL),
    Variant("sparkv", codec="int8", options={"chunk_tokens": 32}),
    Variant("hf-quantized", codec="fp8"),
]


@pytest.mark.parametrize("kind", ["generate_until", "multiple_choice", "loglikelihood"])
def test_exact_caches_are_at_no_distance_and_others_are(tiny_model, tokenizer, kind: str) -> None:
    full, *others = measured(tiny_model("qwen2"), tokenizer, kind, *EXACT, *LOSSY)
    steps = {"generate_until": 12, "multiple_choice": 2 + 4, "loglikelihood": 30}[kind]
    assert len(full.logprob) == steps
    assert full.logprob == full.full_logprob
    assert max(full.kl) == 0
    assert full.equal_prefix == (12 if kind == "generate_until" else None)
    for one in others:
        assert (one.question, one.metric, one.prompt_tokens) == ("7", full.metric, len(PROMPT))
        assert one.full_logprob == full.logprob
        assert one.prefill_seconds == full.prefill_seconds > 0
        assert len(one.kl) == len(one.logprob) == steps
        assert one.dram_bytes > 0
    for one in others[: len(EXACT)]:
        assert (one.answer, one.score) == (full.answer, pytest.approx(full.score, abs=1e-4))
        assert one.logprob == pytest.approx(full.logprob, abs=1e-4)
        assert max(one.kl) < 1e-6
    assert others[2].bytes_read > others[len(EXACT) + 1].bytes_read > 0
    for one in others[len(EXACT) :]:
        assert max(one.kl) > 1e-5
    assert max(others[len(EXACT)].kl) > 0.1
    if kind == "loglikelihood":
        assert (full.metric, full.score) == ("logprob", pytest.approx(sum(full.logprob) / steps, abs=1e-5))


def test_a_cache_that_goes_astray_reads_the_reference_all_the_same(tiny_model, tokenizer) -> None:
    """Its divergence at each token is that of a cache which was given the reference from the beginning."""
    variants = [Variant("dynakv", "local", 0.02, options=SMALL), Variant("hf-quantized", codec="fp8")]
    model = tiny_model("qwen2")
    full, astray, quantized = measured(model, tokenizer, "generate_until", *variants)
    assert astray.equal_prefix is not None and astray.equal_prefix < 11
    assert len(astray.kl) == full.answer_tokens
    ids = torch.tensor([tokenizer(PROMPT).input_ids + full_tokens(model, tokenizer)])
    lm = QuantizedLM(model, tokenizer, variants[1], Prompts())
    cache = lm.prefill(ids[:, : len(PROMPT) - 1], torch.ones(1, len(PROMPT) - 1, dtype=torch.long))
    rest = ids[:, len(PROMPT) - 1 : -1]
    (log_probs,) = lm.log_probs(cache, rest, torch.ones(1, ids.shape[1] - 1, dtype=torch.long))
    expected = log_probs[0].gather(1, ids[0, len(PROMPT) :, None])[:, 0].tolist()
    assert quantized.logprob == pytest.approx(expected, abs=1e-3)


def full_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=0)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_a_prefix_taken_in_is_a_prefill(tiny_model, kind: str) -> None:
    model, ids = tiny_model(kind), torch.randint(256, (1, 60), generator=torch.Generator().manual_seed(0))
    prefix = PrefixCache(model.config, 59)
    prefix.compute(model, ids[:, :59], 0)
    cache = take(DynamicCache(config=model.config), prefix)
    with torch.no_grad():
        found = model(ids[:, 59:], past_key_values=cache).logits[0, -1]
        expected = model(ids).logits[0, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_divergence_is_that_of_the_definition() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert float(divergence(p.log(), q.log())) == pytest.approx(expected)
    assert float(divergence(p.log(), p.log())) == 0


@pytest.mark.parametrize(
    ("one", "other", "length"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3, 2], 1), ([1], [1, 2], 1)]
)
def test_answers_are_equal_until_they_part(one: list[int], other: list[int], length: int) -> None:
    assert equal_prefix(one, other) == length


def test_a_store_does_not_outlive_its_question(tiny_model, tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = measured(
        tiny_model("qwen2"), tokenizer, "loglikelihood", Variant("sparkv", codec="int8", options={"chunk_tokens": 32})
    )
    assert found[1].bytes_read > 0
    assert list(tmp_path.iterdir()) == []
