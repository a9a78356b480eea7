"""lm-eval's model `kvsched`: exact against plain HFLM where the cache is exact, and blind to no cache that is not."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import Cache, DynamicCache

import kvsched
from kvsched.adapters.lm_eval import KVSchedLM
from kvsched.errors import ConfigError

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<assistant>"

CONTEXTS = ["The quick brown fox jumps over the lazy dog and", "A much shorter one", "x" * 90]
CONTINUATIONS = [" runs away", " sleeps", "!", "?", " runs off", " a rather long continuation of it all, to be read"]


@pytest.fixture(scope="session")
def tokenizer(byte_tokenizer) -> PreTrainedTokenizerFast:
    made = copy.copy(byte_tokenizer)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def model(tiny_model) -> PreTrainedModel:
    return tiny_model("qwen2")


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


CHOICES = requests("loglikelihood", *((context, more) for context in CONTEXTS for more in CONTINUATIONS))
WHOLE = requests("loglikelihood_rolling", ("Call me Ishmael. Some years ago, never mind how long",), ("precisely",))
OPEN = requests("generate_until", *((context, {"until": ["q"], "max_gen_toks": 12}) for context in CONTEXTS))


def same(found: list[Any], expected: list[Any]) -> None:
    numbers = [[one[0] if isinstance(one, tuple) else one for one in each] for each in (found, expected)]
    torch.testing.assert_close(torch.tensor(numbers[0]), torch.tensor(numbers[1]), atol=1e-4, rtol=0)
    assert [one[1:] if isinstance(one, tuple) else () for one in found] == [
        one[1:] if isinstance(one, tuple) else () for one in expected
    ]


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"score_chunk": 1}, {"prefill_chunk": 7, "score_chunk": 5}])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_full_cache_equals_plain_hflm(
    tiny_model, tokenizer, kind: str, options: dict[str, int], batch: int
) -> None:
    model = tiny_model(kind)
    plain = HFLM(model, tokenizer=tokenizer, max_length=64, batch_size=batch)
    ours = KVSchedLM(model, tokenizer=tokenizer, max_length=64, batch_size=batch, **options)
    same(ours.loglikelihood(CHOICES, disable_tqdm=True), plain.loglikelihood(CHOICES, disable_tqdm=True))
    same(ours.loglikelihood_rolling(WHOLE, disable_tqdm=True), plain.loglikelihood_rolling(WHOLE, disable_tqdm=True))
    assert ours.generate_until(OPEN, disable_tqdm=True) == plain.generate_until(OPEN, disable_tqdm=True)


@pytest.mark.parametrize("batch", [1, 3])
def test_dynakv_with_the_whole_budget_equals_plain_hflm(model, tokenizer, tmp_path: Path, batch: int) -> None:
    plain = HFLM(model, tokenizer=tokenizer, batch_size=batch)
    ours = KVSchedLM(
        model, "dynakv", tokenizer=tokenizer, batch_size=batch, budget=512, recent=16, sinks=2, directory=str(tmp_path)
    )
    assert ours.score_chunk == 1
    same(ours.loglikelihood(CHOICES, disable_tqdm=True), plain.loglikelihood(CHOICES, disable_tqdm=True))
    same(ours.loglikelihood_rolling(WHOLE, disable_tqdm=True), plain.loglikelihood_rolling(WHOLE, disable_tqdm=True))
    assert ours.generate_until(OPEN, disable_tqdm=True) == plain.generate_until(OPEN, disable_tqdm=True)


def test_sparkv_loads_the_context_and_equals_plain_hflm(model, tokenizer, tmp_path: Path) -> None:
    options = {"store": str(tmp_path), "chunk_tokens": 16, "codec": "lossless"}
    ids = tokenizer(CONTEXTS[2], return_tensors="pt").input_ids
    kvsched.publish(model, ids, config=options)
    loaded: list[int] = []

    class Watched(KVSchedLM):
        def prefill(self, ids: torch.Tensor, mask: torch.Tensor) -> Cache:
            cache = super().prefill(ids, mask)
            loaded.append(cache.report().loaded_tokens)
            return cache

    ours = Watched(model, "sparkv", tokenizer=tokenizer, **options)
    plain = HFLM(model, tokenizer=tokenizer)
    same(ours.loglikelihood(CHOICES, disable_tqdm=True), plain.loglikelihood(CHOICES, disable_tqdm=True))
    assert ours.generate_until(OPEN, disable_tqdm=True) == plain.generate_until(OPEN, disable_tqdm=True)
    assert sorted(set(loaded)) == [0, 80]


def test_a_small_budget_shows_in_the_log_probabilities(model, tokenizer) -> None:
    plain = HFLM(model, tokenizer=tokenizer)
    ours = KVSchedLM(model, "dynakv", tokenizer=tokenizer, budget=0, recent=4, sinks=0, policy="local")
    pairs = zip(
        ours.loglikelihood(CHOICES, disable_tqdm=True), plain.loglikelihood(CHOICES, disable_tqdm=True), strict=True
    )
    assert max(abs(a[0] - b[0]) for a, b in pairs) > 1


@pytest.mark.parametrize("score_chunk", [0, 1])
def test_a_damaged_cache_is_caught(model, tokenizer, score_chunk: int) -> None:
    class DamagedCache(DynamicCache):
        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys, -values

    class Damaged(KVSchedLM):
        def new_cache(self) -> Cache:
            return DamagedCache(config=self.model.config)

    plain, ours = HFLM(model, tokenizer=tokenizer), Damaged(model, tokenizer=tokenizer, score_chunk=score_chunk)
    for kind, asked in (("loglikelihood", CHOICES), ("loglikelihood_rolling", WHOLE)):
        with pytest.raises(AssertionError):
            same(getattr(ours, kind)(asked, disable_tqdm=True), getattr(plain, kind)(asked, disable_tqdm=True))
    assert ours.generate_until(OPEN, disable_tqdm=True) != plain.generate_until(OPEN, disable_tqdm=True)


def test_single_token_choices_share_one_step(model, tokenizer) -> None:
    ours = KVSchedLM(model, tokenizer=tokenizer, score_chunk=1)
    steps: list[int] = []
    inner = ours.log_probs
    ours.log_probs = lambda cache, ids, mask: steps.append(ids.shape[1]) or inner(cache, ids, mask)  # type: ignore[method-assign]
    ours.loglikelihood(requests("loglikelihood", *(("Question", letter) for letter in "ABCD")), disable_tqdm=True)
    assert steps == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "dynakw"}, "choose one of 'full', 'sparkv', 'dynakv'"),
        ({"cache": "dynakv", "budget": -1}, "budget=-1: it must be a number of tokens"),
        ({"cache": "dynakv", "cache_config": {"budgt": 3}}, "Did you mean 'budget'"),
        ({"cache": "dynakv", "budgt": 3}, "neither HFLM nor a cache has an option budgt"),
        ({"budget": 64}, "cache='full' has no options"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"score_chunk": -1}, "score_chunk=-1"),
    ],
)
def test_wrong_options_are_refused(model, tokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVSchedLM(model, tokenizer=tokenizer, **options)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A folder with a multiple-choice task of a few questions."""
    folder = tmp_path_factory.mktemp("task")
    rows = [{"question": f"{n} plus {n}?", "choices": [str(2 * n), str(n), "x"], "answer": 0} for n in range(5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(options))
    return folder


@pytest.fixture(scope="module")
def manager(task: Path) -> TaskManager:
    return TaskManager(include_path=str(task))


def evaluate(**arguments: Any) -> list[list[float]]:
    """The log-probability of each choice of each question."""
    found = lm_eval.simple_evaluate(tasks=["sums"], bootstrap_iters=0, **arguments)
    samples = sorted(found["samples"]["sums"], key=lambda one: one["doc_id"])
    return [[choice[0] for choice in one["filtered_resps"]] for one in samples]


@pytest.fixture
def folder(model, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat", [False, True])
def test_simple_evaluate_takes_it_by_name(
    folder: Path, manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    common: dict[str, Any] = {"task_manager": manager, "apply_chat_template": chat, "device": "cpu"}
    ours = evaluate(model="kvsched", model_args=f"pretrained={folder},cache=dynakv,budget=99,dram=1MiB", **common)
    plain = evaluate(model="hf", model_args=f"pretrained={folder}", **common)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), atol=1e-4, rtol=0)


def test_accelerate_shares_the_questions_out(folder: Path, task: Path) -> None:
    # On GPUs `accelerate launch` starts its processes by torchrun as well; on a CPU it would start a single one.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "kvsched.adapters.lm_eval"]
    command += ["--model=kvsched", f"--model_args=pretrained={folder},cache=dynakv,budget=99", "--tasks=sums"]
    command += [f"--include_path={task}", f"--output_path={task / 'out'}", "--log_samples", "--device=cpu"]
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(task / "cache"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    ran = subprocess.run(command, cwd=task, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert all(f"for sums on rank {rank}" in ran.stderr for rank in (0, 1))
    (samples,) = (task / "out").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert sorted(row["doc_id"] for row in rows) == [0, 1, 2, 3, 4]
