"""What clusters hold of a query's attention, from products with their mean keys: one pass for each query head."""

from __future__ import annotations

import math

import numpy as np

from . import compiled
from .scores import LOWEST, TINY, cap, exponentials


@compiled
def cluster_worth(score, softcap, size, elsewhere, worth):
    """See `select.cluster_worth`; `score` is scaled and written over, `worth` is 0 before."""
    streams, group, clusters = score.shape
    for stream in range(streams):
        for head in range(group):
            own = score[stream, head]
            for cluster in range(clusters):
                if size[stream, cluster] == 0:
                    own[cluster] = -np.inf
            highest = max(cap(own, softcap), elsewhere[stream, head], LOWEST)
            exponentials(own, highest)
            total = np.float32(math.exp(elsewhere[stream, head] - highest))
            for cluster in range(clusters):
                total += own[cluster] * size[stream, cluster]
            share = np.float32(1) / max(total, TINY)
            for cluster in range(clusters):
                worth[stream, cluster] += own[cluster] * share


@compiled
def left_out(score, softcap, size, chosen, exact, corrects, total):
    """Scaled scores become the weights of clusters that were not chosen, `total` `[S, G]` the log of their sum.

    See `cluster_attention._estimate` for the rest.
    """
    streams, group, clusters = score.shape
    for stream in range(streams):
        for head in range(group):
            own = score[stream, head]
            cap(own, softcap)
            best = LOWEST  # of those that were chosen, which have a sum of their own
            for cluster in range(clusters):
                if chosen[stream, cluster] and size[stream, cluster] > 0:
                    best = max(best, own[cluster])
            known, highest = 0.0, LOWEST
            for cluster in range(clusters):
                if chosen[stream, cluster] or size[stream, cluster] == 0:
                    if corrects and size[stream, cluster] > 0:
                        known += math.exp(own[cluster] - best) * size[stream, cluster]
                    own[cluster] = -np.inf
                highest = max(highest, own[cluster])
            exponentials(own, highest)
            left = np.float32(0)
            for cluster in range(clusters):
                own[cluster] *= size[stream, cluster]
                left += own[cluster]
            share = np.float32(1) / max(left, TINY)
            for cluster in range(clusters):
                own[cluster] *= share
            total[stream, head] = highest + math.log(left) if left != 0 else -np.inf
            if corrects and known != 0:
                factor = exact[stream, head] - (best + math.log(known))
                if abs(factor) < np.inf:
                    total[stream, head] += min(max(factor, -1.0), 1.0)
