from __future__ import annotations

from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch

from kvsched.sparkv.cost import ComputeRate, DeviceProfile, LinkRate, time_layers
from kvsched.sparkv.forward import PrefixCache
from kvsched.sparkv.grid import Grid

PROFILE = DeviceProfile(16, (0.0, 1.0, 3.0), (0.0, 0.01, 0.02), 1.5, 0.015)


def test_compute_table_grows_with_context_and_depth() -> None:
    table = PROFILE.compute_seconds(Grid(chunks=3, chunk_tokens=16, layers=2))
    np.testing.assert_allclose(table, [[0, 1, 3], [0, 1.16, 3.32], [0, 1.32, 3.64]])


def test_a_measured_profile_is_plausible(tiny_model) -> None:
    model = tiny_model("qwen2")
    profile = DeviceProfile.measure(model, 64)
    layers = model.config.num_hidden_layers
    assert len(profile.base) == len(profile.per_token) == layers + 1
    assert profile.base[0] == profile.per_token[0] == 0
    assert all(a < b for a, b in zip(profile.base, profile.base[1:], strict=False))
    assert min(profile.per_token) >= 0
    assert profile.short > 0 and profile.short_per_token >= 0


def test_a_far_context_that_is_no_multiple_of_a_chunk(tiny_model) -> None:
    profile = DeviceProfile.measure(tiny_model("qwen2", max_position_embeddings=100), 32)
    assert min(profile.per_token) >= 0


def test_each_depth_is_timed_and_computed(tiny_model) -> None:
    model = tiny_model("llama")
    cache = PrefixCache(model.config, 64)
    seconds = time_layers(cache, model, torch.arange(64)[None], 0)
    assert seconds.shape == (3,) and seconds[0] == 0 and (np.diff(seconds) > 0).all()
    assert all(layer.length == 64 for layer in cache.layers)


def test_a_profile_is_renewed_on_demand(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path))
    model = tiny_model("llama")
    profiles = iter([DeviceProfile(64, (0.0, n, n), (0.0, 0.0, 0.0), 0.0, 0.0) for n in (1.0, 2.0)])
    monkeypatch.setattr(DeviceProfile, "measure", classmethod(lambda cls, model, tokens: next(profiles)))
    first = DeviceProfile.of(model, 64)
    assert DeviceProfile.renew(model, 64) != first
    assert DeviceProfile.of(model, 64).base == (0.0, 2.0, 2.0)


@pytest.mark.parametrize("damage", [None, b"", b"{}", b'{"chunk_tokens":64,"base":[0],"per_token":[0]}'])
def test_a_profile_is_measured_once_and_damaged_ones_again(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path))
    model, measured = tiny_model("qwen2"), []
    monkeypatch.setattr(
        DeviceProfile,
        "measure",
        classmethod(
            lambda cls, model, tokens: measured.append(tokens) or cls(tokens, (0.0,) * 3, (0.0,) * 3, 0.0, 0.0)
        ),
    )
    model.config.num_hidden_layers, model.config.layer_types = 2, ["full_attention"] * 2
    first = DeviceProfile.of(model, 64)
    (kept,) = tmp_path.rglob("*.json")
    if damage is not None:
        kept.write_bytes(damage)
    assert DeviceProfile.of(model, 64) == first
    assert len(measured) == (1 if damage is None else 2)
    DeviceProfile.of(model, 32)
    assert measured[-1] == 32


def test_a_pass_costs_at_least_what_a_short_prompt_does() -> None:
    assert PROFILE.pass_seconds(16, 0) == 3.0 and PROFILE.pass_seconds(16, 100) == 5.0
    assert PROFILE.pass_seconds(10, 0) == 1.5 + 1.5 / 2
    assert PROFILE.pass_seconds(1, 0) == PROFILE.pass_seconds(4, 0) == 1.5
    assert PROFILE.pass_seconds(4, 100) == 3.0


def test_compute_rate_is_actual_over_predicted_of_late() -> None:
    rate = ComputeRate(prior=0.0)
    assert rate.factor == 1
    rate.observe(3.0, 1.0)
    rate.observe(1.0, 1.0)
    assert rate.factor == 2
    for _ in range(100):
        rate.observe(1.0, 2.0)
    assert rate.factor == 0.5


def test_compute_rate_begins_with_what_is_known_of_the_device() -> None:
    assert ComputeRate(0.0, 1.5).factor == ComputeRate(2.0, 1.5).factor == 1.5
    rate = ComputeRate(2.0, 1.5)
    rate.observe(1.0, 2.0)
    assert rate.factor == pytest.approx((2.0 * 1.5 + 1.0) / (2.0 + 2.0))


def test_the_first_layers_are_outweighed_by_the_prediction() -> None:
    rate = ComputeRate(prior=1.0)
    assert rate.factor == 1
    rate.observe(0.1, 0.01)
    assert rate.factor == pytest.approx(1.1 / 1.01)


def test_link_rate_is_measured_from_arrival_to_arrival() -> None:
    rate = LinkRate(goodput=7.0)
    assert rate.goodput(0.0) == 7.0
    for second in (11.0, 12.0):  # the first marks the beginning: what it took is latency too
        rate.observe(1000, second)
        assert rate.goodput(second) == 7.0
    rate.observe(1000, 13.0)
    assert rate.goodput(13.0) == rate.goodput(16.9) == 1000  # the next may be on its way
    assert rate.goodput(21.0) == 200  # silence counts


def test_throughput_is_bound_by_decoding() -> None:
    rate = LinkRate(goodput=100.0)
    assert LinkRate().throughput(0.0) is None and rate.throughput(0.0) == 100
    rate.decoded(30, 0.1)
    assert rate.throughput(0.0) == 100
    rate.decoded(30, 1.4)
    assert rate.throughput(0.0) == 60 / 1.5 and rate.goodput(0.0) == 100


def test_latency_is_that_of_the_quickest_answer() -> None:
    rate = LinkRate()
    assert rate.latency == 0
    for seconds in (0.3, 0.05, 0.2):
        rate.answered(seconds)
    assert rate.latency == 0.05


def test_a_link_has_settled_after_enough_arrivals_over_some_time() -> None:
    assert LinkRate(goodput=7.0).is_settled
    rate = LinkRate()
    for arrival in range(20):  # a burst
        rate.observe(1000, 1.0 + arrival / 1000)
    assert not rate.is_settled
    rate.observe(1000, 1.2)
    assert rate.is_settled
    slow = LinkRate()
    for second in range(9):
        slow.observe(1000, float(second))
    assert not slow.is_settled
    slow.observe(1000, 9.0)
    assert slow.is_settled


def test_link_rate_forgets() -> None:
    rate = LinkRate()
    for second in range(10):
        rate.observe(1_000_000 if second < 5 else 1000, float(second))
    assert rate.goodput(9.0) == 1000


def test_a_pause_is_no_silence() -> None:
    rate = LinkRate()
    for second in range(4):
        rate.observe(500, float(second))
    rate.pause(3.0)
    assert rate.goodput(60.0) == 500
    rate.observe(500, 61.0)
    assert rate.goodput(61.0) == 500
