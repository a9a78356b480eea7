"""Target S6 on the real model: what a codec loses hardly moves the next tokens, also where nothing was calibrated."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest

from kvsched.sparkv.codec import Coder
from kvsched.sparkv.rope import Rotation
from kvsched_evals.codec_bench import CONTEXT, FOLLOWING, compare, reading, through

pytestmark = pytest.mark.real_model


@pytest.mark.parametrize(
    ("codec", "refined", "divergence", "top1", "ratio"),
    [
        ("int8", False, 1e-4, 0.98, 1.9),
        ("balanced", False, 0.003, 0.98, 3.4),
        ("small", False, 0.005, 0.96, 3.8),
        ("progressive", False, 0.02, 0.9, 5.0),
        ("progressive", True, 0.003, 0.98, 3.0),
    ],
)
def test_the_next_tokens_hardly_change(
    real_model, codec: str, refined: bool, divergence: float, top1: float, ratio: float
) -> None:
    model, tokenizer = real_model
    ids = tokenizer(topics["compound"], return_tensors="pt").input_ids[:, : CONTEXT + FOLLOWING]
    _, layers = reading(model, ids[:, :CONTEXT])
    expected, _ = reading(model, ids[:, CONTEXT:], layers)
    back, costs = through(Coder(codec, model.dtype, Rotation.of(model, len(layers))), layers, refined)
    lost = compare(expected, reading(model, ids[:, CONTEXT:], back)[0])
    assert lost["kl"] <= divergence and lost["top1"] >= top1 and costs["ratio"] >= ratio, (lost, costs)
