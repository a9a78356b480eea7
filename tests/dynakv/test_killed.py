"""Processes that are killed while they decode or save: a save is the one before, the new one, or refused."""

from __future__ import annotations

import errno
import os
import signal
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvsched import DynaKVCache
from kvsched.dynakv import storage
from kvsched.errors import FlashError

OPTIONS = {"budget": 10_000, "sinks": 4, "recent": 12, "cluster_size": 3.5, "max_cluster_size": 12, "io_threads": 2}


def prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 256, (1, tokens), generator=torch.Generator().manual_seed(seed))


def turn(model: PreTrainedModel, cache: DynaKVCache, ids: torch.Tensor, seed: int) -> torch.Tensor:
    """A question of 20 tokens after `ids`, and the answer."""
    ids = torch.cat([ids, prompt(20, seed)], dim=1)
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=12)


def forked(work: Callable[[], Any]) -> int:
    """The id of a process that does `work`."""
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def outcome(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Dots:
    """A streamer that writes a byte for the prompt, and one for each token."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def put(self, tokens: torch.Tensor) -> None:
        os.write(self.pipe, b".")

    def end(self) -> None:
        pass


@pytest.mark.parametrize("nameless", [True, False])
def test_killed_while_decoding_it_leaves_nothing(tiny_model, tmp_path, monkeypatch, nameless):
    model, original = tiny_model("llama", num_hidden_layers=1), os.open

    def without_nameless_files(path, flags, *args, **kwargs):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return original(path, flags, *args, **kwargs)

    if not nameless:
        monkeypatch.setattr(os, "open", without_nameless_files)
    for tokens in (0, 1, 40):
        read, write = os.pipe()

        def decode(pipe: int = write) -> None:
            cache = DynaKVCache(model.config, OPTIONS, directory=tmp_path, dram="100kB")
            model.generate(prompt(200), past_key_values=cache, max_new_tokens=3000, streamer=Dots(pipe))

        child = forked(decode)
        os.close(write)
        for _ in range(tokens + 1):
            assert os.read(read, 1) == b".", "it ended by itself"
        os.kill(child, signal.SIGKILL)
        assert outcome(child) == -signal.SIGKILL
        os.close(read)
        assert list(tmp_path.iterdir()) == []


def deadly(nth: int) -> None:
    """Let this process be killed at the `nth` of the calls by which a save is written, before it does anything."""
    left = nth

    def instead_of(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **kwargs)

        return counted

    for owner, name in ((zlib, "crc32"), (os, "fsync"), (os, "replace"), (Path, "unlink")):
        setattr(owner, name, instead_of(getattr(owner, name)))


@pytest.mark.parametrize("older", [True, False])
def test_killed_anywhere_in_a_save_it_leaves_the_one_before_or_none(tiny_model, tmp_path, monkeypatch, older):
    monkeypatch.setattr(storage, "SAVED_PART", 8 << 10)  # so that entries come in several parts
    model, folder = tiny_model("llama", num_hidden_layers=1), tmp_path / "saved"
    cache = DynaKVCache(model.config, OPTIONS)
    ids = model.generate(prompt(100), past_key_values=cache, do_sample=False, max_new_tokens=12)
    cache.save(tmp_path / "first")
    if older:
        cache.save(folder)
    before = cache.get_seq_length()
    more = turn(model, cache, ids, seed=1)
    after = cache.get_seq_length()
    expected = {after: turn(model, cache, more, seed=2)}
    cache.close()
    cache = DynaKVCache.load(tmp_path / "first", model.config)
    expected[before] = turn(model, cache, ids, seed=2)
    cache.close()

    def save(nth: int) -> None:
        cache = DynaKVCache.load(tmp_path / "first", model.config)
        turn(model, cache, ids, seed=1)
        deadly(nth)
        cache.save(folder)

    found = []
    for nth in range(100):
        if outcome(forked(lambda at=nth: save(at))) == 0:
            break
        try:
            loaded = DynaKVCache.load(folder, model.config)
        except FlashError as error:
            assert not older and ("cut short" in str(error) or not folder.exists())
            found.append(0)
            continue
        found.append(loaded.get_seq_length())
        assert torch.equal(turn(model, loaded, more if found[-1] == after else ids, seed=2), expected[found[-1]])
        loaded.close()
    assert found == sorted(found) and set(found) == {before if older else 0, after}
    assert len(list(folder.iterdir())) == 3, "what earlier saves left is gone"
