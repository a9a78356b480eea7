"""What clusters are worth to a query, and a choice of them that keeps to a budget of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .attention import cap_scores, softmax_weights
from .codes import Vectors
from .dispatch import numba_runs, too_wide, triton_runs


def cluster_worth(
    query: torch.Tensor,
    means: Vectors,
    size: torch.Tensor,
    scaling: float,
    elsewhere: torch.Tensor,
    softcap: float | None = None,
) -> torch.Tensor:
    """What a token of each cluster is worth: its share of the attention, by the mean key, summed over the query heads.

    Args:
        query: `[S, G, D]`, floating.
        means: mean keys of C clusters.
        size: integer `[S, C]`, tokens; 0 where there is no cluster, which is worth 0.
        scaling, softcap: as in `decode_attention`.
        elsewhere: `[S, G]`, log of what the tokens hold that always take part, -inf if there are none. A head that
            looks at those alone has no say.

    Returns:
        float32 `[S, C]`.
    """
    if triton_runs("cluster_worth", query, too_wide(query.shape[2], dtype=query.dtype)):
        from .gpu.select import cluster_worth as kernel

        return kernel(query, means, size, scaling, elsewhere, softcap)
    score = means.dot(query).mul_(scaling)
    if numba_runs("cluster_worth", score, elsewhere):
        from .cpu.select import cluster_worth as compiled

        worth = torch.zeros(size.shape)
        compiled(
            score.numpy(), softcap or 0.0, size.contiguous().numpy(), elsewhere.contiguous().numpy(), worth.numpy()
        )
        return worth
    score = cap_scores(score, softcap).masked_fill_((size == 0).unsqueeze(1), float("-inf"))
    total = torch.logaddexp((score + size.unsqueeze(1).log()).logsumexp(-1), elsewhere.float())
    return softmax_weights(score, total).sum(1)


def choose_clusters(score: torch.Tensor, size: torch.Tensor, budget: torch.Tensor, mass: float = 1.0) -> torch.Tensor:
    """Take clusters from the highest score down while they fit the budget of each stream.

    A cluster that does not fit what is left is passed over, and smaller ones behind it still get their turn, down to
    as many clusters as the largest budget has tokens. Which of equal scores goes first is not defined.

    Args:
        score: float `[S, C]`.
        size: integer `[S, C]`, tokens in each cluster; 0 marks a place without a cluster, which is never chosen.
        budget: int64 `[S, 1]`, tokens of each stream.
        mass: end as soon as the chosen hold this share of the stream's sum of score times size (top-p), for scores that
            are no less than 0.

    Returns:
        bool `[S, C]`.
    """
    considered = min(int(budget.max()), score.shape[1])
    if triton_runs("choose_clusters", score):
        from .gpu.select import choose_clusters as kernel

        return kernel(score, size, budget, mass, considered)
    there = size > 0
    order = score.masked_fill(~there, float("-inf")).topk(considered, dim=1).indices
    sizes = asked = size.gather(1, order).tolist()
    wanted = [math.inf] * len(sizes)
    if mass < 1:
        held = torch.where(there, score * size, 0.0)
        wanted, asked = (held.sum(1) * mass).tolist(), held.gather(1, order).tolist()
    # One by one: few fit a budget, and a loop over plain numbers is faster than rounds over all at once.
    taken = b"".join(map(_fitting, sizes, budget[:, 0].tolist(), asked, wanted))
    chosen = torch.from_numpy(np.frombuffer(bytearray(taken), dtype=bool)).view_as(order).to(order.device)
    return torch.zeros_like(size, dtype=torch.bool).scatter_(1, order, chosen)


def _fitting(sizes: Sequence[int], room: int, held: Sequence[float], wanted: float) -> bytearray:
    """A byte for each cluster, 1 for those that are taken in turn while they fit `room`, until they hold `wanted`."""
    taken = bytearray(len(sizes))
    for i, size in enumerate(sizes):
        if room == 0 or wanted <= 0:
            break
        if 0 < size <= room:
            taken[i] = 1
            room -= size
            wanted -= held[i]
    return taken
