"""Which clusters should lie side by side: those that the prompt's own queries retrieve together.

After the paper's co-retrieval matrix: f(i, j) counts how often clusters i and j are retrieved together, once, before
decode. It pairs clusters by P(ij) = f(i, j) / sum f; here they make one chain, of which neighbours are pairs, so that a
read can bring more than two.
"""

from __future__ import annotations

import numpy as np
import torch

ASKED = 256
"""Queries, every other one up to the end of a prompt."""

QUERIES_AT_ONCE = 32

FADE = 0.7
"""What each earlier cluster of the chain still counts when the next is chosen: a read brings several."""


def order(retrieved: np.ndarray) -> np.ndarray:
    """An order of clusters in which those that are retrieved together are near each other.

    A greedy chain: next comes the cluster that was retrieved most often with the last ones, relative to how often it
    was retrieved at all. Time grows with clusters squared, times the queries that a cluster is retrieved by.

    Args:
        retrieved: bool `[Q, C]`, which clusters each query retrieves.

    Returns:
        int64 `[C]`, a permutation. Clusters that no query retrieved come last, in the order they have.
    """
    times = retrieved.sum(0)
    asked = np.flatnonzero(times)
    hit = retrieved[:, asked].astype(np.float32)
    weight = 1 / np.sqrt(times[asked]).astype(np.float32)
    left = times[asked].astype(np.float32)
    together = np.zeros(len(asked), dtype=np.float32)
    chain = np.empty(len(asked), dtype=np.int64)
    for i in range(len(asked)):
        best = int(np.argmax(together * weight + left * 1e-6))
        chain[i] = best
        together = FADE * together + hit[hit[:, best] > 0].sum(0)
        left[best] = -np.inf
        together[best] = 0
    return np.concatenate([asked[chain], np.flatnonzero(times == 0)])


def telling(query: torch.Tensor) -> torch.Tensor:
    """The queries of a prompt, `[S, G, n, D]`, that say which clusters are retrieved together."""
    return query[:, :, -2 * ASKED :: 2]


def number(
    label: torch.Tensor, centroid: torch.Tensor, size: torch.Tensor, query: torch.Tensor, budget: int
) -> torch.Tensor:
    """Labels under which clusters that the queries retrieve together follow each other.

    Args:
        label: int64 `[S, n]`, the cluster of each token, -1 for none.
        centroid: float32 `[S, C, D]`, size: int64 `[S, C]`, 0 where there is no cluster.
        query: float32 `[S, G, Q, D]`, scaled as scores are; what `telling` takes of a prompt's.
        budget: tokens that a query retrieves.
    """
    retrieved = [_retrieved(part, centroid, size, budget) for part in query.split(QUERIES_AT_ONCE, dim=2)]
    together = torch.cat(retrieved, dim=1).cpu().numpy()
    chain = torch.from_numpy(np.stack([order(of) for of in together])).to(label.device)
    rank = torch.empty_like(chain).scatter_(
        1, chain, torch.arange(chain.shape[1], device=chain.device).expand_as(chain)
    )
    return torch.where(label < 0, -1, rank.gather(1, label.clamp_min(0)))


def _retrieved(query: torch.Tensor, centroid: torch.Tensor, size: torch.Tensor, budget: int) -> torch.Tensor:
    """Which clusters each query retrieves with the others of its group: bool `[S, Q, C]` for `[S, G, Q, D]`."""
    score = torch.bmm(query.flatten(1, 2), centroid.transpose(1, 2)).unflatten(1, query.shape[1:3])
    worth = (score + size.log()[:, None, None]).softmax(-1).sum(1) / size.unsqueeze(1)
    best = worth.nan_to_num_(-1.0).topk(min(budget, worth.shape[2]), dim=2)
    tokens = size.unsqueeze(1).expand_as(worth).gather(2, best.indices)
    fits = (tokens.cumsum(2) <= budget) & (tokens > 0)
    return torch.zeros_like(worth, dtype=torch.bool).scatter_(2, best.indices, fits)
