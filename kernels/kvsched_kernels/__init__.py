"""The numeric operations of kvsched, one module each, as plain torch functions.

Throughout, `S` counts streams: batch rows x KV heads. Every operation runs over all streams at once.
"""

from .attention import Part, cap_scores, decode_attention, merge_parts, softmax_weights
from .codes import dot, mix, pack, unpack
from .kmeans import divide, kmeans, members, moments, nearest, two_means
from .select import choose_clusters

__all__ = [
    "Part",
    "cap_scores",
    "choose_clusters",
    "decode_attention",
    "divide",
    "dot",
    "kmeans",
    "members",
    "merge_parts",
    "mix",
    "moments",
    "nearest",
    "pack",
    "softmax_weights",
    "two_means",
    "unpack",
]
