"""Which clusters should lie side by side: those that the prompt's own queries retrieve together.

After the paper's co-retrieval matrix: f(i, j) counts how often clusters i and j are retrieved together, once, before
decode. It pairs clusters by P(ij) = f(i, j) / sum f; here they make one chain, of which neighbours are pairs, so that a
read can bring more than two.
"""

from __future__ import annotations

import numpy as np

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
