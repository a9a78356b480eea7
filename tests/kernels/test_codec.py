"""Rotation and rounding against plain arithmetic in float64."""

from __future__ import annotations

import pytest
import torch

from kvsched_kernels import dequantize, quantize, rotate


def plainly_turned(keys: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    turned, pairs = keys.double().clone(), angles.shape[1]
    for i in range(pairs):
        number = torch.complex(keys[..., i].double(), keys[..., i + pairs].double())
        number = number * torch.polar(torch.ones_like(angles[:, i]).double(), angles[:, i].double())
        turned[..., i], turned[..., i + pairs] = number.real, number.imag
    return turned


@pytest.mark.parametrize(("dim", "pairs"), [(8, 4), (12, 3), (6, 1)])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_keys_are_turned_and_turned_back(dim, pairs, tokens):
    keys, angles = torch.randn(2, dim, tokens).transpose(1, 2), torch.rand(tokens, pairs) * 9
    before = keys.clone()
    turned = rotate(keys, (angles.cos(), angles.sin()))
    torch.testing.assert_close(turned.double(), plainly_turned(keys, angles), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(turned, (angles.cos(), -angles.sin())), keys, atol=1e-5, rtol=1e-5)
    assert torch.equal(keys, before)


@pytest.mark.parametrize("rows", ["channels", "tokens"])
@pytest.mark.parametrize("turned", [False, True])
def test_numbers_come_back_to_half_a_step(rows, turned):
    keys, angles = torch.randn(3, 20, 16) * 5 + 100, torch.rand(20, 8) * 50
    shape = (3, 1, 16) if rows == "channels" else (3, 20, 1)
    step, centre = torch.rand(shape) + 0.1, torch.full(shape, 90.0)
    back = (angles.cos(), -angles.sin()) if turned else None
    symbols = quantize(keys, step, centre, back)
    assert symbols.dtype == torch.int16
    numbers = dequantize(symbols, step, centre, None, torch.float32)
    off = (numbers - (plainly_turned(keys, -angles) if turned else keys)).abs()
    assert (off <= step / 2 + 1e-3).all()
    if turned:
        again = dequantize(symbols, step, centre, (angles.cos(), angles.sin()), torch.float32)
        torch.testing.assert_close(again.double(), plainly_turned(numbers, angles), atol=1e-3, rtol=1e-4)


def test_halves_go_to_the_even_side_and_small_types_are_read():
    numbers = torch.tensor([[[0.5, 1.5, 2.5, -0.5]]])
    one = torch.ones(1, 1, 1)
    assert quantize(numbers, one, torch.zeros(1, 1, 1), None).tolist() == [[[0, 2, 2, 0]]]
    symbols = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert dequantize(symbols, one * 0.5, one - 129, None, torch.float16).tolist() == [[[-64.0, 63.5]]]
