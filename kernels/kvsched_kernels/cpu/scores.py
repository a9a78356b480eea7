"""What all that attends does with scores in float32."""

from __future__ import annotations

import math

import numpy as np

from . import compiled

_LN2, _LN2_HIGH, _LN2_LOW = (np.float32(x) for x in (math.log(2), 0.693359375, math.log(2) - 0.693359375))
LOWEST, TINY = np.finfo(np.float32).min, np.finfo(np.float32).tiny
_SERIES = tuple(np.float32(1 / math.factorial(n)) for n in range(7, -1, -1))


@compiled
def cap(score, softcap):
    """Cap scores, in place, but for -inf, where nothing is; the highest."""
    highest = np.float32(-np.inf)
    for i in range(len(score)):
        if softcap > 0 and score[i] > -np.inf:
            score[i] = math.tanh(score[i] / softcap) * softcap
        highest = max(highest, score[i])
    return highest


@compiled
def exponentials(numbers, highest):
    """exp(numbers - highest), in place, of numbers up to `highest`; 0 where it is below exp(-87), as float32 ends.

    It runs in vector registers: with number = n ln 2 + x, 2^n is put together from its bits and exp(x) is the Taylor
    series.
    """
    bits = numbers.view(np.int32)
    for i in range(len(numbers)):
        number = numbers[i] - highest
        inside = max(number, np.float32(-87))
        whole = np.floor(inside / _LN2 + np.float32(0.5))
        x = (inside - whole * _LN2_HIGH) - whole * _LN2_LOW
        series = _SERIES[0]
        for factor in _SERIES[1:]:
            series = series * x + factor
        numbers[i] = series
        bits[i] += np.int32(whole) << 23
        if number <= -87:
            numbers[i] = 0
