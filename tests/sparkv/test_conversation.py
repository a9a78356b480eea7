"""A conversation that grows turn by turn, on real files and servers: what is loaded, computed and published."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults import Faulty
from transformers import DynamicCache, PreTrainedModel

import kvsched
from kvsched import SparKVCache

CHUNK = 32
GREEDY = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}


def draw(count: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 256, (1, count), generator=torch.Generator().manual_seed(seed))


def join(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=1)


@pytest.fixture(params=["qwen2", "llama", "gemma3"])
def model(request: pytest.FixtureRequest, tiny_model) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, object]:
    return {"store": str(tmp_path), "codec": "lossless", "chunk_tokens": CHUNK}


@contextlib.contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens the model takes in each of its forwards, to whatever depth."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
    try:
        yield seen
    finally:
        hook.remove()


def answer(model: PreTrainedModel, ids: torch.Tensor, cache: object, mask: torch.Tensor | None = None) -> torch.Tensor:
    """`ids` `[n, length]` and the answer to them; nothing is padded if there is no mask.

    Without any, transformers would take every token of a prompt that is the padding token for padding.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)


def expected(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return answer(model, ids, DynamicCache(config=model.config), mask)


def test_a_second_turn_with_the_same_cache_computes_what_is_new_and_asks_for_nothing(
    model: PreTrainedModel, options: dict, tmp_path: Path
) -> None:
    document = draw(200, seed=0)
    kvsched.publish(model, document, config=options)
    with Faulty(tmp_path).running() as server:
        cache = SparKVCache(model.config, {**options, "store": server.url, "planner": "stream"})
        first = answer(model, join(document, draw(10, seed=1)), cache)
        assert cache.report().loaded_tokens == 192 and cache.report().fallback is None
        asked, turn = len(server.requests), join(first, draw(25, seed=2))
        with counted(model) as tokens:
            second = answer(model, turn, cache)
        assert len(server.requests) == asked, "the store was asked for what the cache holds already"
        # The answer's last token never entered the cache, so it is new as well.
        assert tokens == [26] + [1] * 39
    assert torch.equal(second, expected(model, turn))


def test_a_second_turn_with_a_new_cache_loads_what_was_appended(
    model: PreTrainedModel, options: dict, tmp_path: Path
) -> None:
    turn = join(draw(200, seed=0), draw(10, seed=1))
    assert kvsched.publish(model, turn, config=options).chunks_written == 6
    first = answer(model, turn, SparKVCache(model.config, options))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with counted(model) as tokens:
        report = kvsched.publish(model, first, config=options)
    assert (report.chunks, report.chunks_written, sum(tokens)) == (7, 1, CHUNK), "the beginning was computed again"
    assert all(path.read_bytes() == data for path, data in before.items())

    longer = join(first, draw(25, seed=2))
    with Faulty(tmp_path).running() as server:
        cache = SparKVCache(model.config, {**options, "store": server.url, "planner": "stream"})
        with counted(model) as tokens:
            second = answer(model, longer, cache)
    assert cache.report().loaded_tokens == 224 and tokens[0] == 275 - 224
    assert torch.equal(second, expected(model, longer))


@pytest.mark.parametrize("planner", ["optimal", "token_split", "greedy"])
def test_many_turns_each_published_after_it_was_answered(model: PreTrainedModel, options: dict, planner: str) -> None:
    conversation, published = draw(70, seed=0), 0
    for turn in range(4):
        cache = SparKVCache(model.config, {**options, "planner": planner})
        answered = answer(model, conversation, cache)
        assert torch.equal(answered, expected(model, conversation))
        assert cache.report().loaded_tokens == published
        report = kvsched.publish(model, answered, config=options)
        assert report.chunks_written == answered.shape[1] // CHUNK - published // CHUNK
        published = report.tokens
        conversation = join(answered, draw(15, seed=turn + 1))


def test_another_conversation_loads_what_it_shares(model: PreTrainedModel, options: dict) -> None:
    system = draw(100, seed=0)
    kvsched.publish(model, join(system, draw(100, seed=1)), config=options)
    other = join(system, draw(60, seed=2))
    cache = SparKVCache(model.config, options)
    assert torch.equal(answer(model, other, cache), expected(model, other))
    assert cache.report().loaded_tokens == 96, "three of the shared 100 tokens' chunks are whole"


def test_an_answer_is_taken_back_and_asked_for_again(tiny_model, options: dict) -> None:
    model = tiny_model("qwen2")
    document = draw(200, seed=0)
    kvsched.publish(model, document, config=options)
    cache = SparKVCache(model.config, options)
    answer(model, join(document, draw(10, seed=1)), cache)
    cache.crop(200 - cache.get_seq_length())
    again = join(document, draw(30, seed=2))
    with counted(model) as tokens:
        answered = answer(model, again, cache)
    assert tokens[0] == 30 and torch.equal(answered, expected(model, again))


def test_a_reset_cache_loads_the_next_conversation(model: PreTrainedModel, options: dict) -> None:
    first, second = draw(100, seed=0), draw(150, seed=1)
    for prompt in (first, second):
        kvsched.publish(model, prompt, config=options)
    cache = SparKVCache(model.config, options)
    for prompt, loaded in ((first, 96), (second, 128)):
        answered = answer(model, prompt, cache)
        assert torch.equal(answered, expected(model, prompt)) and cache.report().loaded_tokens == loaded
        cache.reset()


def padded(*prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of prompts `[1, n]`, padded on the left, and its mask."""
    width = max(prompt.shape[1] for prompt in prompts)
    rows = [torch.nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts]
    masks = [torch.nn.functional.pad(torch.ones_like(prompt), (width - prompt.shape[1], 0)) for prompt in prompts]
    return torch.cat(rows), torch.cat(masks)


@pytest.mark.parametrize("over_http", [False, True])
def test_conversations_of_a_batch_stand_at_different_turns(
    model: PreTrainedModel, options: dict, tmp_path: Path, over_http: bool
) -> None:
    """One at its third turn, one at its first, one that was never published, padded to one length."""
    third = join(draw(70, seed=0))
    for turn in range(2):
        answered = expected(model, third)
        kvsched.publish(model, answered, config=options)
        third = join(answered, draw(15, seed=turn + 1))
    first, fresh = join(draw(80, seed=5), draw(7, seed=6)), draw(120, seed=7)
    kvsched.publish(model, first[:, :80], config=options)
    ids, mask = padded(third, first, fresh)
    with Faulty(tmp_path).running() as server:
        cache = SparKVCache(model.config, {**options, "store": server.url if over_http else str(tmp_path)})
        answers = answer(model, ids, cache, mask)
        report = cache.report()
        assert torch.equal(answers, expected(model, ids, mask))
        assert report.loaded_tokens == 160 + 64 and "no prefix" in str(report.fallback)
        # The next turn of all three, on the same cache: answers stand side by side, so nothing more is padded.
        mask = torch.cat([mask, torch.ones(3, 40 + 9, dtype=torch.long)], dim=1)
        turn = torch.cat([answers, draw(27, seed=8).view(3, 9)], dim=1)
        with counted(model) as tokens:
            second = answer(model, turn, cache, mask)
        assert tokens[0] == 3 * 10
    assert torch.equal(second, expected(model, turn, mask))


def test_rows_of_a_batch_share_a_beginning_of_different_length(model: PreTrainedModel, options: dict) -> None:
    """The same conversation at two lengths, of which the longer was published."""
    whole = draw(230, seed=0)
    kvsched.publish(model, whole, config=options)
    ids, mask = padded(join(whole, draw(20, seed=1)), join(whole[:, :140], draw(20, seed=2)))
    cache = SparKVCache(model.config, options)
    answers = answer(model, ids, cache, mask)
    assert torch.equal(answers, expected(model, ids, mask))
    assert cache.report().loaded_tokens == 224 + 128 and cache.report().fallback is None


@pytest.mark.parametrize("codec", ["balanced", "progressive"])
def test_a_lossy_conversation_grows_as_well(model: PreTrainedModel, options: dict, codec: str) -> None:
    """Tokens may differ; what is loaded, and what the model is asked to compute, may not."""
    lossy = {**options, "codec": codec, "planner": "stream"}
    document = draw(200, seed=0)
    kvsched.publish(model, document, config=lossy)
    cache = SparKVCache(model.config, lossy)
    first = answer(model, document, cache)
    assert cache.report().loaded_tokens == 192 and cache.report().fallback is None
    with counted(model) as tokens:
        second = answer(model, join(first, draw(25, seed=2)), cache)
    assert tokens[0] == 26 and second.shape == (1, 200 + 40 + 25 + 40)
    cache.reset()
    report = kvsched.publish(model, second, config=lossy)
    assert report.chunks_written == 305 // CHUNK - 6
    later = SparKVCache(model.config, lossy)
    answer(model, join(second, draw(5, seed=3)), later)
    assert later.report().loaded_tokens == report.tokens
    later.reset()
