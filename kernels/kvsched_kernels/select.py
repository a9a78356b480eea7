"""A choice of clusters that keeps to a budget of tokens."""

from __future__ import annotations

import torch


def choose_clusters(score: torch.Tensor, size: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Take clusters from the highest score down while they fit the budget of each stream.

    A cluster that does not fit what is left is passed over, and smaller ones behind it still get their turn, down to
    as many clusters as the largest budget has tokens. Which of equal scores goes first is not defined.

    Args:
        score: float `[S, C]`.
        size: integer `[S, C]`, tokens in each cluster; 0 marks a place without a cluster, which is never chosen.
        budget: int64 `[S, 1]`, tokens of each stream.

    Returns:
        bool `[S, C]`.
    """
    score = score.masked_fill(size == 0, float("-inf"))
    order = score.topk(min(int(budget.max()), score.shape[1]), dim=1).indices
    sizes = size.gather(1, order).long()
    taken = torch.zeros_like(sizes, dtype=torch.bool)
    left = budget
    candidate = (sizes > 0) & (sizes <= left)
    while candidate.any():
        # All candidates up to the first that overflows are taken at once. That one exceeds what is then left, so each
        # round closes at least one candidate in every stream that has any.
        fits = candidate & (torch.where(candidate, sizes, 0).cumsum(1) <= left)
        taken |= fits
        left = left - torch.where(fits, sizes, 0).sum(1, keepdim=True)
        candidate = candidate & ~fits & (sizes <= left)
    return torch.zeros_like(size, dtype=torch.bool).scatter_(1, order, taken)
