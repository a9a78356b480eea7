"""What a KV codec does to numbers: rotary positions taken off keys and put back, and rounding to whole steps."""

from __future__ import annotations

import torch

from .dispatch import triton_runs

Waves = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine of each token's angles, float32 `[n, pairs]`; channel `i` turns with channel `i + pairs`.

The rotation with the sine negated takes back what the rotation did.
"""


def rotate(keys: torch.Tensor, waves: Waves) -> torch.Tensor:
    """Keys `[H, n, D]` (any floating dtype) turned by their positions: float32. Channels beyond the pairs stay."""
    if triton_runs("rotate", keys):
        from .gpu.codec import code

        return code(keys, torch.empty(keys.shape, device=keys.device), waves)
    return _turn(keys.float(), waves)


def quantize(numbers: torch.Tensor, step: torch.Tensor, centre: torch.Tensor, waves: Waves | None) -> torch.Tensor:
    """Numbers as whole steps from a centre: `round(number / step) - centre`, halves to the even side.

    Args:
        numbers: `[H, n, D]`, floating and finite, within 2 ** 22 steps of 0.
        step: float32, positive, centre: float32, whole; each of a shape that expands to `[H, n, D]`, such as
            `[H, 1, D]` for steps by channel or `[H, n, 1]` for steps by token.
        waves: turn the numbers first, or `None`.

    Returns:
        int16 `[H, n, D]`; what lies further from the centre than int16 reaches is not defined.
    """
    if triton_runs("quantize", numbers):
        from .gpu.codec import code

        target = torch.empty(numbers.shape, dtype=torch.int16, device=numbers.device)
        return code(numbers, target, waves, (step.expand(numbers.shape), centre.expand(numbers.shape)))
    numbers = numbers.float() if waves is None else _turn(numbers.float(), waves)
    return (numbers / step).round_().sub_(centre).to(torch.int16)


def dequantize(
    symbols: torch.Tensor, step: torch.Tensor, centre: torch.Tensor, waves: Waves | None, dtype: torch.dtype
) -> torch.Tensor:
    """The inverse of `quantize`: `(symbol + centre) * step`, then turned.

    Args:
        symbols: integer `[H, n, D]`, of any strides.
        step, centre: as in `quantize`.
        dtype: of the result `[H, n, D]`; everything is computed in float32.
    """
    if triton_runs("dequantize", symbols):
        from .gpu.codec import code

        target = torch.empty(symbols.shape, dtype=dtype, device=symbols.device)
        return code(symbols, target, waves, (step.expand(symbols.shape), centre.expand(symbols.shape)), decode=True)
    numbers = symbols.float().add_(centre).mul_(step).contiguous()
    return (numbers if waves is None else _turn(numbers, waves)).to(dtype)


def _turn(numbers: torch.Tensor, waves: Waves) -> torch.Tensor:
    cos, sin = waves
    pairs = cos.shape[1]
    first, second = numbers[..., :pairs], numbers[..., pairs : 2 * pairs]
    turned = torch.empty(numbers.shape, device=numbers.device)
    torch.mul(first, cos, out=turned[..., :pairs]).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=turned[..., pairs : 2 * pairs]).addcmul_(first, sin)
    turned[..., 2 * pairs :] = numbers[..., 2 * pairs :]
    return turned
