"""What all tests share: models small enough to build anew, the real model, and a check that no thread is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

import kvsched

TinyModel = Callable[..., PreTrainedModel]

_CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {"num_hidden_layers": 3}),
    "llama": (LlamaConfig, {"num_hidden_layers": 2}),
    "gemma3": (
        Gemma3TextConfig,
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
        },
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: a mistake shows before the real model is loaded."""
    items.sort(key=lambda item: item.get_closest_marker("real_model") is not None)


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """A factory: `tiny_model("qwen2" | "llama" | "gemma3", **config)` builds a random model, the same each time.

    Four query heads of 16 share two KV heads; gemma3 alternates sliding and full layers. The weights are ten times
    larger than a fresh model's, so that attention is not uniform and a wrong key shows in the logits.
    """

    def build(kind: str, **overrides: Any) -> PreTrainedModel:
        config_class, own = _CONFIGS[kind]
        config = config_class(
            **{
                "vocab_size": 256,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "max_position_embeddings": 4096,
                "initializer_range": 0.2,
                "bos_token_id": 0,
                "eos_token_id": None,
                "pad_token_id": 0,
                **own,
                **overrides,
            }
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return build


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, which is all that the tiny models know."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=letters[0], pad_token=letters[0])


@pytest.fixture(scope="session")
def real_model() -> tuple[PreTrainedModel, Tokenizer]:
    """The 0.5B model and its tokenizer, loaded once; mark what uses it with `real_model`."""
    return kvsched.load_model()


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 2  # seconds for a thread that was told to end
    while left := [thread.name for thread in threading.enumerate() if thread.name.startswith("kvsched")]:
        assert time.monotonic() < deadline, f"threads outlived the test: {left}"
        time.sleep(0.01)
