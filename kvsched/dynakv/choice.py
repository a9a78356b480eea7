"""Which tokens a query takes part in, and for which of them flash is read."""

from __future__ import annotations

import torch

CLOSE = 4
"""Tokens that are looked at one by one, in multiples of the budget: more bring hardly any recall."""

LEFT = 0.25
"""Of a policy's patience: what a step that reads leaves on flash at most. The rest costs a quarter of all reads and
more, and drives out of DRAM what is missed later: with it, recall of a recorded run was .001 lower."""


def within(worth: torch.Tensor, budget: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best tokens of each stream.

    Args:
        worth: float32 `[S, k, m]`, below 0 where there is no token.
        budget: int64 `[S, 1]`, how many.

    Returns:
        bool `[S, k, m]`, and float32 `[S, 1]`: what another token has to be worth to be among them.
    """
    flat, most = worth.flatten(1), int(budget.max())
    if most == 0:
        return torch.zeros_like(worth, dtype=torch.bool), torch.full_like(flat[:, :1], float("inf"))
    best = flat.topk(min(most, flat.shape[1]), dim=1)
    fits = (torch.arange(best.values.shape[1], device=flat.device) < budget) & (best.values >= 0)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best.indices, fits)
    full = fits.sum(1, keepdim=True) == budget
    least = torch.where(fits, best.values, float("inf")).amin(1, keepdim=True)
    return kept.view_as(worth), torch.where(full, least, 0.0)


def fewest_to_read(gain: torch.Tensor, enough: torch.Tensor) -> torch.Tensor:
    """Clusters that are worth reading: where all together gain more than `enough`, the best but for `LEFT` of that.

    Args:
        gain: float32 `[S, k]`, by how much attention each would bring more than what it displaces.
        enough: `[S, 1]`.

    Returns:
        bool `[S, k]`.
    """
    asks = gain.sum(1, keepdim=True) > enough
    if not bool(asks.any()):
        return torch.zeros_like(gain, dtype=torch.bool)
    best = gain.sort(dim=1)
    left = best.values.cumsum(1)  # without it and all that gain less
    wanted = asks & (left > LEFT * enough) & (best.values > 0)
    return torch.zeros_like(wanted).scatter_(1, best.indices, wanted)


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
