from __future__ import annotations

import json
from pathlib import Path

import torch

from kvsched_evals import demo

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_committed_measurement() -> None:
    result = json.loads((ROOT / "evals/results/demo.json").read_text())
    assert demo.table(result["sparkv"], result["dynakv"]) in (ROOT / "README.md").read_text()


def test_every_answer_of_the_committed_measurement_begins_with_the_same_token() -> None:
    rows = json.loads((ROOT / "evals/results/demo.json").read_text())["sparkv"]["rows"]
    assert {row["tokens"][0] for row in rows.values()} == {rows["local"]["tokens"][0]}


def test_equal_tokens_are_counted_position_by_position() -> None:
    assert demo.equal_share([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75


def test_the_clock_counts_from_its_making_and_skips_the_prompt() -> None:
    clock = demo.TokenClock()
    for _ in range(4):
        clock.put(torch.zeros(1))
    clock.end()
    assert clock.times[0] <= clock.first == clock.times[1] <= clock.times[3] and clock.step >= 0


def test_next_token_agreement_is_one_for_the_models_own_answer(tiny_model) -> None:
    from transformers import DynamicCache

    model, ids = tiny_model("qwen2"), torch.arange(1, 40)[None]
    cache = DynamicCache()
    tokens, _, _ = demo.answer(model, ids, 12, "test", past_key_values=cache)
    assert demo.next_token_agreement(model, cache, tokens) == 1.0
    cache = DynamicCache()
    demo.answer(model, ids, 12, "test", past_key_values=cache)
    other = [*tokens[:-1], (tokens[-1] + 1) % 256]
    assert demo.next_token_agreement(model, cache, other) == 10 / 11
