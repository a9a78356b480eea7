"""The numeric operations of kvsched, one module each, as plain torch functions.

Throughout, `S` counts streams: batch rows x KV heads. Every operation runs over all streams at once.
"""

from .attention import Part, cap_scores, decode_attention, merge_parts, softmax_weights
from .cluster_attention import Estimate, Pool, Runs, cluster_attention
from .codec import Waves, dequantize, quantize, rotate
from .codes import Vectors, dot, mix, pack, rows, unpack
from .gather import fullest, gather_entries
from .kmeans import Moments, divide, kmeans, lloyd_step, members, moments, nearest, two_means, update
from .select import choose_clusters, cluster_worth
from .tokens import ClusterMasses, TokenChoice, Tokens, choose_tokens, token_masses

__all__ = [
    "ClusterMasses",
    "Estimate",
    "Moments",
    "Part",
    "Pool",
    "Runs",
    "TokenChoice",
    "Tokens",
    "Vectors",
    "Waves",
    "cap_scores",
    "choose_clusters",
    "choose_tokens",
    "cluster_attention",
    "cluster_worth",
    "decode_attention",
    "dequantize",
    "divide",
    "dot",
    "fullest",
    "gather_entries",
    "kmeans",
    "lloyd_step",
    "members",
    "merge_parts",
    "mix",
    "moments",
    "nearest",
    "pack",
    "quantize",
    "rotate",
    "rows",
    "softmax_weights",
    "token_masses",
    "two_means",
    "unpack",
    "update",
]
