"""How many tokens a query needs."""

from __future__ import annotations

import torch

from kvsched.dynakv.choice import tokens_that_hold


def test_tokens_that_hold_a_mass():
    worth = torch.tensor([[0.01, 0.1, float("nan"), 0.05], [0.2, 0.0, 0.1, 0.1]])
    tokens = torch.tensor([[5, 4, 0, 2], [2, 1, 3, 1]], dtype=torch.uint8)
    # What lies in DRAM holds .45 and .2 of attention.
    for mass, expected in (
        (0.4, [0, 2]),
        (0.5, [4, 2]),
        (0.91, [6, 6]),
        (0.94, [6, 6]),
        (0.96, [11, 6]),
        (1.0, [11, 6]),
    ):
        assert tokens_that_hold(mass, worth, tokens).flatten().tolist() == expected, mass
