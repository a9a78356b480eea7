"""Entries in 8 bits: off by no more than is said, read alone, and precise on keys as models have them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, GPT2Config, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvsched import DynaKVCache
from kvsched.dynakv.entries import CODES, EntryForm, Packing, packing_of
from kvsched.dynakv.rotary import rates_of, turn

CPU = torch.device("cpu")
FACTOR = 1 + 2**-8  # of what is said, for the factor's own rounding


def rates(width: int, base: float = 1e6) -> torch.Tensor:
    return base ** (-torch.arange(0, width, 2) / width)


def round_trip(packing: Packing, entries: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Entries `[S, n, width]` packed and unpacked."""
    stream = torch.arange(len(entries)).unsqueeze(1)
    return packing.unpack(packing.pack(entries, position, stream), position, stream)


@settings(max_examples=60, deadline=None)
@given(st.data())
@pytest.mark.parametrize("option", CODES)
def test_a_number_is_off_by_no_more_than_is_said(option, data):
    key_width, value_width = data.draw(st.sampled_from([(2, 2), (16, 16), (64, 64), (24, 9)]))
    streams, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    magnitude = [10.0 ** data.draw(st.integers(-3, 3)) for _ in range(3)]
    turned = rates(key_width) if data.draw(st.booleans()) else torch.zeros(0)
    bias = torch.randn(streams, 1, key_width, generator=draw) * magnitude[0]
    key = bias + torch.randn(streams, n, key_width, generator=draw) * magnitude[1]
    value = torch.randn(streams, n, value_width, generator=draw) * magnitude[2]
    value[:, 0] = 0
    position = torch.randint(0, 30_000, (streams, n), generator=draw)
    entries = torch.cat([turn(key, position, turned, 1.0), value], dim=-1)

    packing = packing_of(option, EntryForm(key_width, value_width, torch.float32, CPU), streams, turned.tolist())
    packing.begin(entries, position, torch.ones(streams, n, dtype=torch.bool))
    got_key, got_value = packing.form.apart(round_trip(packing, entries, position))
    none = packing.pack(entries[0, :0], position[0, :0], position[0, :0])
    assert none.shape == (0, packing.width)
    # What a key is rounded as: before it was turned, and without its stream's mean.
    inner = turn(entries[..., :key_width], position, turned, -1.0)
    inner = inner - inner.mean(1, keepdim=True)
    exact = 1e-5 * (magnitude[0] + magnitude[1])  # of float32 at the size of the whole key
    for off, of in ((turn(got_key, position, turned, -1.0) - key, inner), (got_value - value, value)):
        most = of.abs().amax(-1, keepdim=True)
        allowed = most / 254 if option == "int8" else torch.maximum(of.abs() / 16, most / 448 * 2**-10)
        assert (off.abs() <= allowed * FACTOR + exact).all()


@pytest.mark.parametrize("option", CODES)
def test_an_entry_is_read_without_its_neighbours(option):
    form = EntryForm(16, 16, torch.float32, CPU)
    packing, position = packing_of(option, form, 2, rates(16).tolist()), torch.arange(40).expand(2, -1)
    entries = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0)) * 20
    packing.begin(entries, position, position >= 10)
    whole, stream = round_trip(packing, entries, position), torch.tensor([1])
    packed = packing.pack(entries[1:, 7], position[1:, 7], stream)
    alone = packing.unpack(packed, position[1:, 7], stream)
    torch.testing.assert_close(alone[0], whole[1, 7], atol=1e-5, rtol=0)
    assert packed.shape == (1, packing.width) == (1, 32 + 4)
    # What comes later, rows that change places and another process read it the same way.
    packing.begin(entries + 5, position, position >= 0)
    packing.select(torch.tensor([1, 0, 1]))
    again = packing_of(option, form, 3, rates(16).tolist())
    again.restore(lambda name, dtype, *shape: packing.state()[name].to(dtype).view(shape))
    for stream in (0, 2):
        assert torch.equal(again.unpack(packed, position[1:, 7], torch.tensor([stream])), alone)


def test_keys_of_a_projection_with_a_bias_fit_8_bits():
    """As in Qwen2's first layers: some channels lie at 100 and more, and turn with the position."""
    draw = torch.Generator().manual_seed(0)
    bias = torch.randn(1, 1, 64, generator=draw) * 3
    bias[..., 40:46] = 120.0
    position = torch.arange(500).unsqueeze(0)
    key = turn(bias + torch.randn(1, 500, 64, generator=draw), position, rates(64), 1.0)
    entries = torch.cat([key, torch.zeros_like(key)], dim=-1)
    off = {}
    for name, known in (("turned back", rates(64).tolist()), ("as it comes", [])):
        packing = packing_of("int8", EntryForm(64, 64, torch.float32, CPU), 1, known)
        packing.begin(entries, position, position < 100)
        off[name] = (round_trip(packing, entries, position) - entries).square().mean().sqrt().item()
    assert off["turned back"] < off["as it comes"] / 10


def rotary_models(tiny_model) -> Iterator[tuple[str, PreTrainedModel, torch.Tensor]]:
    yield "full_attention", (model := tiny_model("qwen2")), model.model.rotary_emb.inv_freq
    yield "full_attention", (model := tiny_model("gemma3")), model.model.rotary_emb.full_attention_inv_freq


def test_rates_are_the_models_own(tiny_model):
    for kind, model, expected in rotary_models(tiny_model):
        torch.testing.assert_close(torch.tensor(rates_of(model.config, kind)), expected)
    scaled = LlamaConfig(
        head_dim=16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    expected = LlamaRotaryEmbedding(scaled).inv_freq
    torch.testing.assert_close(torch.tensor(rates_of(scaled, "full_attention")), expected)
    assert rates_of(GPT2Config(), "full_attention") == ()


@torch.no_grad()
def logits_of_a_long_answer(model: PreTrainedModel, cache: DynaKVCache | DynamicCache, answer: torch.Tensor):
    """Logits of every token of `answer` but the first 100, which are read in one go."""
    model(answer[:, :100], past_key_values=cache)
    return torch.cat([model(token, past_key_values=cache).logits for token in answer[:, 100:].split(1, dim=1)], dim=1)


@pytest.mark.parametrize(("option", "off"), [("int8", 0.02), ("fp8", 0.2)])
def test_logits_with_a_budget_for_all_are_off_by_little(tiny_model, option, off):
    model = tiny_model("qwen2", num_hidden_layers=2)
    # Keys as with Qwen2's biases.
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[5::16] = 60.0
    answer = torch.randint(3, 256, (1, 220), generator=torch.Generator().manual_seed(0))
    expected = logits_of_a_long_answer(model, DynamicCache(config=model.config), answer)
    small = {"budget": 10_000, "sinks": 4, "recent": 12, "max_cluster_size": 12, "dram": "120kB", "io_threads": 2}
    cache = DynaKVCache(model.config, small, storage=option)
    got = logits_of_a_long_answer(model, cache, answer)
    assert cache.report().bytes_read > 0
    cache.close()
    error = (got - expected).square().mean().sqrt() / expected.std()
    assert error < off
