"""The numeric operations of kvsched, one module each, as plain torch functions.

Throughout, `S` counts streams: batch rows x KV heads. Every operation runs over all streams at once.
"""

from .attention import decode_attention
from .kmeans import kmeans, members, moments, nearest, split_oversized, two_means
from .select import choose_clusters, cluster_scores

__all__ = [
    "choose_clusters",
    "cluster_scores",
    "decode_attention",
    "kmeans",
    "members",
    "moments",
    "nearest",
    "split_oversized",
    "two_means",
]
