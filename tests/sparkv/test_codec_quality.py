"""Target S6 on the real model: what a codec loses hardly moves the next tokens, also where nothing was calibrated."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest

from kvsched.sparkv.codec import Coder
from kvsched.sparkv.rope import Rotation
from kvsched_evals.codec_bench import CONTEXT, FOLLOWING, compare, reading, through

pytestmark = pytest.mark.real_model


@pytest.mark.parametrize(("codec", "divergence", "ratio"), [("int8", 1e-4, 1.9), ("balanced", 0.003, 3.4)])
def test_the_next_tokens_hardly_change(real_model, codec: str, divergence: float, ratio: float) -> None:
    model, tokenizer = real_model
    ids = tokenizer(topics["compound"], return_tensors="pt").input_ids[:, : CONTEXT + FOLLOWING]
    _, layers = reading(model, ids[:, :CONTEXT])
    expected, _ = reading(model, ids[:, CONTEXT:], layers)
    back, costs = through(Coder(codec, model.dtype, Rotation.of(model, len(layers))), layers)
    lost = compare(expected, reading(model, ids[:, CONTEXT:], back)[0])
    assert lost["kl"] <= divergence and lost["top1"] >= 0.98 and costs["ratio"] >= ratio
