"""Which tokens a query takes part in, and for which of them flash is read."""

from __future__ import annotations

import torch

CLOSE = 6
"""Tokens that are looked at one by one, in multiples of the budget. The demo's long answer, its tokens given, has a KL
divergence of .0013 from the full cache with 4, .0008 with 6, .0006 with 8 and with all."""

REACH = 2.0
"""Standard deviations from its mean key at which the best token of a cluster is expected: that of 24 lies there. With 0
clusters are ranked as wholes, and tokens of great weight are missed (KL .032 where this has .0013; 1 to 3 do alike)."""

LEFT = 0.25
"""Of a policy's patience: what a step that reads leaves on flash at most. The rest costs a quarter of all reads and
more, and drives out of DRAM what is missed later: with it, recall of a recorded run was .001 lower."""


def tokens_that_hold(mass: float, worth: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens of the smallest set of clusters which, with all that lies in DRAM, holds `mass` of attention, estimated.

    Args:
        mass: share of all attention, above 0, up to 1.
        worth: float32 `[S, C]`, a token's share of attention, mean over the query heads; tokens: integer `[S, C]`.

    Returns:
        int64 `[S, 1]`.
    """
    tokens = tokens.long()
    order = worth.masked_fill(tokens == 0, -1.0).argsort(dim=1, descending=True)
    size = tokens.gather(1, order)
    # What is left out has to hold no more than 1 - mass; summed from the small end, so that rounding stays small.
    share = worth.gather(1, order).masked_fill(size == 0, 0.0) * size
    left_out = share.flip(1).cumsum(1).flip(1)
    return (size * (left_out > 1 - mass)).sum(1, keepdim=True)
