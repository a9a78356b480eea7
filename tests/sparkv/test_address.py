from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsched.sparkv.address import chain, fingerprint

IDS = torch.arange(100)


def test_equal_models_have_equal_fingerprints(tiny_model) -> None:
    assert fingerprint(tiny_model("qwen2")) == fingerprint(tiny_model("qwen2"))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.layers[1].self_attn.k_proj.weight.data[3, 5].add_(1e-3),
        lambda model: model.model.rotary_emb.inv_freq.mul_(1.001),
        lambda model: model.to(torch.bfloat16),
        lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
    ],
    ids=["one weight", "rope", "dtype", "config"],
)
def test_any_change_to_the_model_changes_its_fingerprint(tiny_model, change) -> None:
    model = tiny_model("qwen2")
    changed = copy.deepcopy(model)
    change(changed)
    assert fingerprint(changed) != fingerprint(model)


def test_swapped_weights_change_the_fingerprint(tiny_model) -> None:
    model = tiny_model("qwen2")
    changed = copy.deepcopy(model)
    weight = changed.model.layers[0].self_attn.k_proj.weight.data
    weight[:] = weight.flip(0)
    assert fingerprint(changed) != fingerprint(model)


def test_whole_chunks_have_addresses() -> None:
    assert len(chain("f", "lossless", 32, IDS)) == 3
    assert chain("f", "lossless", 32, IDS[:31]) == []


@given(st.integers(0, 99), st.integers(1, 2**40))
def test_a_token_changes_its_chunk_and_all_later_ones(at: int, token: int) -> None:
    changed = IDS.clone()
    changed[at] += token
    same = [a == b for a, b in zip(chain("f", "lossless", 10, IDS), chain("f", "lossless", 10, changed), strict=True)]
    assert same == [chunk < at // 10 for chunk in range(10)]


def test_model_codec_and_chunk_size_are_part_of_an_address() -> None:
    base = chain("f", "lossless", 20, IDS)
    assert not set(base) & set(chain("g", "lossless", 20, IDS))
    assert not set(base) & set(chain("f", "other", 20, IDS))
    assert not set(base) & set(chain("f", "lossless", 10, IDS))


def test_the_same_tokens_later_in_the_sequence_are_another_chunk() -> None:
    addresses = chain("f", "lossless", 10, torch.zeros(40))
    assert len(set(addresses)) == 4
