"""Which clusters a query needs: scores, and a choice that keeps to a budget of tokens."""

from __future__ import annotations

import torch


def cluster_scores(query: torch.Tensor, centroid: torch.Tensor) -> torch.Tensor:
    """Score of each cluster: the sum over the query group of query . centroid.

    Summing over the group is the same as scoring the summed query, and on a recorded model it recalls slightly more
    attention than the group's maximum.

    Args:
        query: `[S, G, D]`, any floating dtype.
        centroid: float32 `[S, C, D]`.

    Returns:
        float32 `[S, C]`.
    """
    return torch.matmul(centroid, query.float().sum(dim=1).unsqueeze(-1)).squeeze(-1)


def choose_clusters(score: torch.Tensor, size: torch.Tensor, budget: int) -> torch.Tensor:
    """Take clusters from the highest score down while they fit the budget of each stream.

    A cluster that does not fit what is left is passed over, and smaller ones behind it still get their turn. Of equal
    scores the lower index goes first.

    Args:
        score: `[S, C]`.
        size: integer `[S, C]`, tokens in each cluster; 0 marks a place without a cluster, which is never chosen.
        budget: tokens per stream.

    Returns:
        bool `[S, C]`.
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    sizes = size.long().gather(1, order)
    left = torch.full_like(sizes[:, :1], budget)
    taken = torch.zeros_like(sizes, dtype=torch.bool)
    candidate = (sizes > 0) & (sizes <= left)
    while candidate.any():
        # All candidates up to the first that overflows are taken at once. That one exceeds what is then left, so each
        # round closes at least one candidate in every stream that has any.
        fits = candidate & (torch.where(candidate, sizes, 0).cumsum(1) <= left)
        taken |= fits
        left = left - torch.where(fits, sizes, 0).sum(1, keepdim=True)
        candidate = candidate & ~fits & (sizes <= left)
    return torch.zeros_like(taken).scatter(1, order, taken)
