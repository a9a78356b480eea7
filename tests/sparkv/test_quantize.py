"""The lossy codecs: errors within half a step, sinks kept, and nothing but ChunkError for bad bytes."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsched.errors import ChunkError, InputError
from kvsched.sparkv.calibration import SINKS
from kvsched.sparkv.codec import Coder
from kvsched.sparkv.entropy import Zstd
from kvsched.sparkv.quantize import COARSE, FINE_LAYERS, Place, Quantized, Symbols, dequantize
from kvsched.sparkv.rope import Rotation

CODECS = st.sampled_from(["int8", "balanced", "small", "progressive"])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
ROTATION = Rotation([(1.0, 0.1, 0.01, 0.001)] * 2)
EPSILON = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Channels of different size, with constant offsets far larger than their spread, as biases give them."""
    generator = torch.Generator().manual_seed(seed)
    channel = torch.randn((shape[0], 1, shape[2]), generator=generator)
    return torch.randn(shape, generator=generator) * channel.exp() + 50 * channel


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 9), st.sampled_from([0.01, 0.3, 7.0]))
def test_the_error_is_at_most_half_a_step(rows: int, count: int, seed: int, step: float) -> None:
    numbers = noise(1, rows, count, seed=seed)[0]
    steps = torch.full((rows, 1), step)
    back = dequantize(Symbols.of(numbers, steps).to_bytes(Zstd()), (rows, count), Zstd())
    error = (back.double() - numbers.double()).abs()
    assert bool((error <= step * 0.505 + numbers.double().abs() * 2**-22).all())


@given(st.integers(2, 30), st.integers(0, 9))
def test_a_multiple_of_the_step_nearest_to_the_number_comes_back(count: int, seed: int) -> None:
    numbers, steps = noise(1, 4, count, seed=seed)[0], torch.tensor([[0.5], [0.25], [2.0], [1.0]])
    back = dequantize(Symbols.of(numbers, steps).to_bytes(Zstd()), (4, count), Zstd())
    multiples = np.rint(numbers.double().numpy() / steps.double().numpy())
    near = np.abs(multiples - np.rint(multiples.mean(1, keepdims=True))) < 126
    assert np.array_equal(back.double().numpy()[near], (multiples * steps.double().numpy())[near])


def test_what_lies_far_out_is_kept_exactly() -> None:
    numbers = torch.zeros(3, 50)
    numbers[1, 7], numbers[2, 9] = 12345.678, -0.3e20
    steps = torch.full((3, 1), 0.125)
    assert torch.equal(dequantize(Symbols.of(numbers, steps).to_bytes(Zstd()), (3, 50), Zstd()), numbers)


@given(CODECS, DTYPES, st.integers(1, 3), st.integers(1, 40), st.sampled_from([8, 10]), st.integers(0, 70))
def test_every_shape_dtype_and_position(
    codec: str, dtype: torch.dtype, heads: int, tokens: int, width: int, position: int
) -> None:
    published = [
        (noise(heads, tokens, width, seed=n).to(dtype), noise(heads, tokens, 6, seed=n).to(dtype)) for n in (1, 2)
    ]
    coder = Coder(codec, dtype, ROTATION)
    header, data = coder.encode(position, published)
    stop = len(data)
    for entry in reversed(header.layers):  # the first layer's payload is the last
        keys, values = coder.decode(header, entry, data[stop - entry.length : stop])
        stop -= entry.length
        for back, tensor in zip((keys, values), published[entry.layer], strict=True):
            assert back.shape == tensor.shape and back.dtype == dtype
            assert (back.float() - tensor.float()).abs().max() <= tensor.float().abs().max() * (EPSILON[dtype] + 0.25)


@pytest.mark.parametrize("codec", ["int8", "balanced", "small"])
@pytest.mark.parametrize("part", ["keys", "values"])
def test_sinks_are_kept_in_half_precision_and_change_no_step(codec: str, part: str) -> None:
    tensor, coder, place = noise(2, 64, 8), Quantized(codec, ROTATION, None), Place(1, part, 0)
    plain = coder.decode(coder.encode(tensor, place), (2, 64, 8), tensor.dtype, place)
    tensor[:, :SINKS] *= 100
    back = coder.decode(coder.encode(tensor, place), (2, 64, 8), tensor.dtype, place)
    assert torch.equal(back[:, :SINKS], tensor[:, :SINKS].half().float())
    assert torch.equal(back[:, SINKS:], plain[:, SINKS:])


@pytest.mark.parametrize("codec", ["int8", "balanced", "small"])
@pytest.mark.parametrize("number", [0.0, 1.0, -2.5e-8, 3e4])
def test_constant_channels_come_back(codec: str, number: float) -> None:
    coder, place = Quantized(codec, Rotation([()]), None), Place(0, "keys", 4)
    tensor = torch.full((1, 20, 8), number)
    back = coder.decode(coder.encode(tensor, place), (1, 20, 8), tensor.dtype, place)
    torch.testing.assert_close(back, tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("codec", ["int8", "balanced", "small"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 100])
def test_what_is_not_finite_is_refused(codec: str, number: float, position: int) -> None:
    tensor = noise(1, 20, 8)
    tensor[0, 2, 3] = number
    with pytest.raises(InputError, match="lossless"):
        Quantized(codec, ROTATION, None).encode(tensor, Place(0, "values", position))


@given(CODECS, st.data())
def test_noise_behind_a_good_digest_is_refused_or_gives_the_right_shape(codec: str, data: st.DataObject) -> None:
    coder, place = Quantized(codec, ROTATION, None), Place(0, "keys", 0)
    payload = bytearray(coder.encode(noise(2, 16, 8), place))
    for _ in range(data.draw(st.integers(0, 8))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(0, len(payload)))]
    try:
        tensor = coder.decode(bytes(payload), (2, 16, 8), torch.float32, place)
    except ChunkError:
        return
    assert tensor.shape == (2, 16, 8)


def test_a_frame_that_claims_terabytes_is_refused_before_anything_is_allocated() -> None:
    place, coder = Place(0, "keys", 4), Quantized("balanced", ROTATION, None)
    with pytest.raises(ChunkError):
        coder.decode(coder.encode(noise(2, 16, 8), place), (1 << 20, 1 << 20, 8), torch.float32, place)


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    coder = Quantized("balanced", ROTATION, None)
    payload = coder.encode(noise(2, 16, 8), Place(0, "values", 4))
    with pytest.raises(ChunkError, match="no layer 2"):
        coder.decode(payload, (2, 16, 8), torch.float32, Place(2, "values", 4))


_WRITE = """
import hashlib, torch
from kvsched.sparkv.codec import Coder
from kvsched.sparkv.rope import Rotation
tensor = torch.arange(2 * 64 * 8).reshape(2, 64, 8).sin()
for codec in ("int8", "balanced", "small"):
    _, data = Coder(codec, torch.float32, Rotation([(1.0, 0.1)])).encode(0, [(tensor, tensor)])
    print(hashlib.sha256(data).hexdigest())
"""


def test_every_process_writes_the_same_bytes() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", _WRITE], capture_output=True, text=True, check=True).stdout for _ in "ab"
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0].split())) == 3 and all(
        len(line) == hashlib.sha256().digest_size * 2 for line in runs[0].split()
    )


@given(DTYPES, st.integers(1, 3), st.integers(1, 40), st.integers(0, 70), st.integers(0, 9))
def test_base_and_residual_give_the_bits_of_balanced(
    dtype: torch.dtype, heads: int, tokens: int, position: int, seed: int
) -> None:
    rotation = Rotation([(1.0, 0.1, 0.01, 0.001)] * (FINE_LAYERS + 1))
    balanced, progressive = (Quantized(codec, rotation, None) for codec in ("balanced", "progressive"))
    for layer in range(FINE_LAYERS + 1):
        for part in ("keys", "values"):
            place, tensor = Place(layer, part, position), noise(heads, tokens, 8, seed=seed).to(dtype)
            expected = balanced.decode(balanced.encode(tensor, place), (heads, tokens, 8), dtype, place)
            base, residual = progressive.encode(tensor, place), progressive.encode_residual(tensor, place)
            assert torch.equal(progressive.decode(base, (heads, tokens, 8), dtype, place, residual), expected)
            if layer < FINE_LAYERS:
                assert residual == b"" and torch.equal(
                    progressive.decode(base, (heads, tokens, 8), dtype, place), expected
                )


def test_a_base_is_off_by_a_coarse_step_at_most() -> None:
    rows, steps = noise(1, 6, 200)[0], torch.full((6, 1), 0.25)
    symbols = Symbols.of(rows, steps)
    fine = dequantize(symbols.to_bytes(Zstd()), (6, 200), Zstd())
    coarse = dequantize(symbols.to_bytes(Zstd(), COARSE), (6, 200), Zstd(), COARSE)
    assert 0 < float((coarse - fine).abs().max()) <= 0.2501 * (COARSE // 2)
    assert len(symbols.to_bytes(Zstd(), COARSE)) < len(symbols.to_bytes(Zstd()))


@given(st.data())
def test_noise_as_a_residual_is_refused_or_stays_within_a_coarse_step(data: st.DataObject) -> None:
    symbols = Symbols.of(noise(1, 4, 30)[0], torch.full((4, 1), 0.25))
    base, residual = symbols.to_bytes(Zstd(), COARSE), bytearray(symbols.residual(COARSE))
    for _ in range(data.draw(st.integers(0, 8))):
        residual[data.draw(st.integers(0, len(residual) - 1))] = data.draw(st.integers(0, 255))
    residual = residual[: data.draw(st.integers(0, len(residual)))]
    coarse = dequantize(base, (4, 30), Zstd(), COARSE)
    try:
        refined = dequantize(base, (4, 30), Zstd(), COARSE, bytes(residual))
    except ChunkError:
        return
    assert float((refined - coarse).abs().max()) <= 0.2501 * (COARSE // 2)
