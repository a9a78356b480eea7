"""Which tokens lie together, and which of these groups a query needs: DynaKV's way, and those it is compared with.

A policy is a subclass of `Policy` that overrides what it does differently, entered in `POLICIES`; the layer does the
rest (waiting, storage, attention). All are given the same budget of tokens, the same sinks and the same recent window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from kvsched_kernels import choose_clusters, divide, kmeans, nearest

from ..config import DynaKVConfig
from ..errors import ConfigError
from .clusters import ClusterIndex
from .dense import BATCH
from .retrieval import Retrieval

Vectors = dict[str, torch.Tensor]

_NUMBERS_AT_ONCE = 1 << 18
"""Of mean keys that are unpacked, 1 MiB in float32: what is held beside the index is the same for any context."""


class Policy:
    """Groups of about `cluster_size` tokens by k-means, each with its mean key; the base of all others.

    Attributes:
        cluster_size: mean tokens in a group, unless the configuration names another.
        intake: what becomes of tokens that leave the recent window. `own`: every `segment` of them are grouped by
            themselves; until then every 16 of them make a group. `split`: each joins the nearest group, and the widest
            groups are split. `chain`: each joins the nearest group, which grows without end.
        segment: a multiple of 16.
        together: tokens of a prompt that are grouped at a time, at most; `None` for all of them.
        ordered: the groups of a prompt lie on flash in the order of `affinity`.
        estimated: share of the groups left out, best scores first, that take part by their size and mean value.
        residual_bits: bits a channel in which the index keeps how each token's key differs from the mean key, so that
            tokens are chosen within groups, not groups whole; 0 to keep nothing. It needs the intake `split`.
        patience: where tokens are chosen, the share of the attention, mean over the query heads, that must lie in
            groups on flash beyond what tokens in DRAM would hold in their stead before a step reads any.
        dense_layers: first layers whose tokens all take part and stay in DRAM.
    """

    cluster_size: float = 16
    intake: Literal["own", "split", "chain"] = "own"
    segment: int = 512
    together: int | None = None
    ordered: bool = False
    estimated: float = 0.0
    corrects: bool = False
    residual_bits: int = 0
    patience: float = 0.0
    dense_layers: int = 0

    def __init__(self, config: DynaKVConfig) -> None:
        self.config = config
        self.cluster_size = self.cluster_size if config.cluster_size is None else config.cluster_size

    def forms(self, dim: int, value_dim: int) -> Mapping[str, tuple[int, int]]:
        """What the index keeps of a group, by name: how many numbers, and in how many bits each (2, 4, 8, 16, 32)."""
        return {"key": (dim, 16)}

    def group(self, keys: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Group tokens that come together.

        Args:
            keys: float32 `[S, n, D]`.
            mask: bool `[S, n]`, True for those to group.

        Returns:
            label int64 `[S, n]`, -1 where masked, and groups of each stream, int64 `[S]`; no group is empty.
        """
        count = torch.ceil(mask.sum(1) / self.cluster_size).long()
        return kmeans(keys, mask, count), count

    def summarise(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> Vectors:
        """What the index keeps of N groups, `[N, numbers]` for each name in `forms`.

        Args:
            keys: float32 `[N, m, D]`, values: float32 `[N, m, Dv]`.
            mask: bool `[N, m]`, True where there is a token.
        """
        return {"key": masked_mean(keys, mask)}

    def nearest(self, keys: torch.Tensor, index: ClusterIndex) -> torch.Tensor:
        """The group that each of `keys` (float32 `[S, m, D]`) would join: int64 `[S, m]`."""
        table, found = index.tables["key"], []
        step = max(1, _NUMBERS_AT_ONCE // (len(keys) * table.width))
        for start in range(0, index.width, step):
            part = slice(start, min(start + step, index.width))
            label, distance = nearest(keys, table.read(part.stop, start), index.size[:, part] > 0)
            found.append((label + start, distance))
        closest = torch.stack([distance for _, distance in found]).argmin(0, keepdim=True)
        return torch.stack([label for label, _ in found]).gather(0, closest)[0]

    def score(self, query: torch.Tensor, index: ClusterIndex) -> torch.Tensor:
        """Score of each group for each query head, float32 `[S, G, C]` for `[S, G, D]`: query times mean key."""
        return index.tables["key"].dot(query, index.width)

    def tokens(self, index: ClusterIndex) -> torch.Tensor:
        """How many tokens each score stands for: integer `[S, C]`."""
        return index.size[:, : index.width]

    def choose(self, worth: torch.Tensor, index: ClusterIndex, budget: torch.Tensor) -> Retrieval:
        """The groups to attend to.

        Args:
            worth: float32 `[S, C]`, a token's share of attention, summed over the query heads, for each score.
            budget: int64 `[S, 1]`, tokens.
        """
        return Retrieval.of_clusters(choose_clusters(worth, index.size[:, : index.width], budget))


class DynaKV(Policy):
    """Clusters that follow the decode, of which a query takes single tokens.

    Of every cluster the index keeps the mean key in 8 bits a channel and the mean value in 4, of every token the
    residual of its key in 2. Together these take 7.9 % of what keys and values take in 16 bits, and find .98 of what
    exact scores would (docs/policies.md).
    """

    cluster_size = 24
    intake = "split"
    together = 2048
    ordered = True
    estimated = 1.0
    corrects = True
    residual_bits = 2
    patience = 0.02

    def forms(self, dim: int, value_dim: int) -> Mapping[str, tuple[int, int]]:
        return {"key": (dim, 8), "value": (value_dim, 4)}

    def group(self, keys: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k-means for half of the clusters, then splits of the widest, and of those that are too large."""
        wanted = torch.ceil(mask.sum(1) / self.cluster_size).long()
        count = torch.ceil(wanted / 2).long()
        return divide(keys, kmeans(keys, mask, count), count, wanted, self.config.max_cluster_size)

    def summarise(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> Vectors:
        return {"key": masked_mean(keys, mask), "value": masked_mean(values, mask)}


class Static(Policy):
    """After "static update" of the DynaKV paper: the prompt's clusters, which new keys join by a running mean."""

    intake = "chain"

    def forms(self, dim: int, value_dim: int) -> Mapping[str, tuple[int, int]]:
        return {"key": (dim, 32)}


class Local(Policy):
    """After "local update" of the DynaKV paper: every 512 new tokens are clustered by themselves."""


class RetroInfer(Policy):
    """RetroInfer: spherical clusters of centred keys, 1 for 16 tokens, every 1,024; an estimate for the next 23.2 %."""

    segment = 1024
    estimated = 0.232

    def forms(self, dim: int, value_dim: int) -> Mapping[str, tuple[int, int]]:
        return {"key": (dim, 16), "value": (value_dim, 16)}

    def group(self, keys: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        centred = keys - masked_mean(keys, mask).unsqueeze(1)
        labels, counts = [], torch.zeros(len(keys), dtype=torch.long, device=keys.device)
        for part, inside in zip(centred.split(8192, dim=1), mask.split(8192, dim=1), strict=True):
            label, count = super().group(torch.nn.functional.normalize(part, dim=-1), inside)
            labels.append(torch.where(inside, label + counts.unsqueeze(1), -1))
            counts = counts + count
        return torch.cat(labels, dim=1), counts

    def summarise(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> Vectors:
        return {"key": masked_mean(keys, mask), "value": masked_mean(values, mask)}


class ClusterKV(Policy):
    """ClusterKV: clusters by cosine, one for 80 tokens of the prompt and 8 for 320 new ones; two dense layers."""

    cluster_size = 80
    segment = 320
    dense_layers = 2
    _NEW = 40

    def group(self, keys: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = self._NEW if keys.shape[1] <= self.segment + BATCH else self.cluster_size
        count = torch.ceil(mask.sum(1) / size).long()
        return kmeans(torch.nn.functional.normalize(keys, dim=-1), mask, count, iterations=20), count


class Quest(Policy):
    """Quest: pages of 16 tokens with the least and greatest number in each channel, scored by the bound on q.k."""

    segment = BATCH
    dense_layers = 2

    def forms(self, dim: int, value_dim: int) -> Mapping[str, tuple[int, int]]:
        return {"low": (dim, 16), "high": (dim, 16)}

    def group(self, keys: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pages(mask, self.cluster_size)

    def summarise(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> Vectors:
        out = ~mask.unsqueeze(-1)
        low, high = keys.masked_fill(out, float("inf")), keys.masked_fill(out, float("-inf"))
        return {"low": low.amin(1), "high": high.amax(1)}

    def score(self, query: torch.Tensor, index: ClusterIndex) -> torch.Tensor:
        low, high = index.tables["low"], index.tables["high"]
        return low.dot(query.clamp_max(0), index.width) + high.dot(query.clamp_min(0), index.width)


class TokenTopK(Policy):
    """No clusters: exact scores of all tokens, whose keys stay in DRAM, and the best of them fetched from flash."""

    segment = BATCH

    def __init__(self, config: DynaKVConfig) -> None:
        super().__init__(config)
        self.cluster_size = min(BATCH, config.max_cluster_size)

    def forms(self, dim: int, value_dim: int) -> Mapping[str, tuple[int, int]]:
        return {"key": (dim * int(self.cluster_size), 16)}

    def group(self, keys: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pages(mask, self.cluster_size)

    def summarise(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> Vectors:
        room = int(self.cluster_size) - keys.shape[1]
        return {"key": torch.nn.functional.pad(keys * mask.unsqueeze(-1), (0, 0, 0, room)).flatten(1)}

    def score(self, query: torch.Tensor, index: ClusterIndex) -> torch.Tensor:
        """Of each token, not of each page: float32 `[S, G, C * cluster_size]`."""
        keys = index.tables["key"].data[:, : index.width].unflatten(2, (int(self.cluster_size), -1)).flatten(1, 2)
        return torch.bmm(query.float(), keys.float().transpose(1, 2))

    def tokens(self, index: ClusterIndex) -> torch.Tensor:
        each = torch.arange(int(self.cluster_size), device=index.size.device)
        return (each < index.size[:, : index.width].unsqueeze(-1)).flatten(1).long()

    def choose(self, worth: torch.Tensor, index: ClusterIndex, budget: torch.Tensor) -> Retrieval:
        size = index.size[:, : index.width]
        tokens = self.tokens(index).view(*size.shape, -1)
        kept = choose_clusters(worth, tokens.flatten(1), budget).view_as(tokens)
        every = torch.arange(index.width, device=size.device).expand_as(size)
        return Retrieval.of_tokens(every, kept)


POLICIES: dict[str, type[Policy]] = {
    "dynakv": DynaKV,
    "static": Static,
    "local": Local,
    "retroinfer": RetroInfer,
    "clusterkv": ClusterKV,
    "quest": Quest,
    "token-topk": TokenTopK,
}


def policy_named(name: str) -> type[Policy]:
    """The policy of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in POLICIES:
        raise ConfigError(f"policy={name!r}: choose one of {', '.join(map(repr, POLICIES))}.")
    return POLICIES[name]


def masked_mean(vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`[N, D]`, the mean of those of `[N, m, D]` that bool `[N, m]` marks; 0 where there is none."""
    inside = mask.unsqueeze(-1)
    return (vectors * inside).sum(1) / inside.sum(1).clamp_min(1)


def pages(mask: torch.Tensor, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of `size` neighbours in the text; see `Policy.group`."""
    place = mask.cumsum(1) - 1
    label = torch.where(mask, torch.div(place, size, rounding_mode="floor").long(), -1)
    return label, torch.ceil(mask.sum(1) / size).long()
