"""The index of one layer: what is known about its clusters without their bytes (the paper's Algorithm 1).

A cluster has a mean key, a size, the sum of squared deviations from the mean, the positions of its tokens and the
address of its bytes. The threshold tau of a head is `split_variance` times the mean variance of the clusters that its
stream started with; the paper leaves it open. A variance is the mean squared distance to the centroid, summed over
channels.
"""

from __future__ import annotations

import torch

from kvsched_kernels import moments, nearest


class ClusterIndex:
    """Clusters of `streams` streams (batch rows x KV heads), numbered from 0 in each.

    Tensors have room for C clusters; `width` of them are in use in the fullest stream.

    Attributes:
        centroid: float32 `[S, C, D]`.
        size: int32 `[S, C]`, 0 where there is no cluster.
        deviation: float32 `[S, C]`, sum of squared deviations.
        position: int32 `[S, C, max_size]`, places of the tokens in the sequence, in the order of their entries.
        address: int64 `[S, C]`, where the entries lie.
        count: int64 `[S]`, clusters of each stream.
        threshold: float32 `[S]`, tau; infinite until the stream has clusters.
    """

    def __init__(self, streams: int, dim: int, max_size: int, split_variance: float, device: torch.device) -> None:
        self.max_size, self.split_variance = max_size, split_variance
        self.width = 0
        self.centroid = torch.zeros(streams, 0, dim, device=device)
        self.size = torch.zeros(streams, 0, dtype=torch.int32, device=device)
        self.deviation = torch.zeros(streams, 0, device=device)
        self.position = torch.zeros(streams, 0, max_size, dtype=torch.int32, device=device)
        self.address = torch.zeros(streams, 0, dtype=torch.long, device=device)
        self.count = torch.zeros(streams, dtype=torch.long, device=device)
        self.threshold = torch.full((streams,), float("inf"), device=device)

    _PER_CLUSTER = ("centroid", "size", "deviation", "position", "address")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, name).nbytes for name in (*self._PER_CLUSTER, "count", "threshold"))

    def clusters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Stream and number of every cluster, int64 `[N]` each, in ascending order."""
        stream, cluster = self.size[:, : self.width].nonzero(as_tuple=True)
        return stream, cluster

    def nearest(self, keys: torch.Tensor) -> torch.Tensor:
        """The nearest cluster of each key: int64 `[S, m]` for float32 `[S, m, D]`; anything in a stream without."""
        return nearest(keys, self.centroid[:, : self.width], self.size[:, : self.width] > 0)[0]

    def create(
        self,
        stream: torch.Tensor,
        centroid: torch.Tensor,
        size: torch.Tensor,
        deviation: torch.Tensor,
        position: torch.Tensor,
        address: torch.Tensor,
    ) -> torch.Tensor:
        """Add N clusters, with one value each of what the attributes hold; `stream` ascends.

        Returns:
            int64 `[N]`, their numbers.
        """
        cluster = self.count[stream] + ranks(stream)
        self.count += torch.bincount(stream, minlength=len(self.count))
        self.width = int(self.count.max())
        if (capacity := self.size.shape[1]) < self.width:
            more = max(2 * capacity, self.width, 16) - capacity
            for name in self._PER_CLUSTER:
                old = getattr(self, name)
                setattr(self, name, torch.cat([old, old.new_zeros(old.shape[0], more, *old.shape[2:])], dim=1))
        self.centroid[stream, cluster] = centroid
        self.size[stream, cluster] = size.to(self.size)
        self.deviation[stream, cluster] = deviation
        self.position[stream, cluster] = position.to(self.position)
        self.address[stream, cluster] = address
        return cluster

    def calibrate(self, fresh: torch.Tensor) -> None:
        """Set the threshold of the streams marked in `fresh` (bool `[S]`) from the clusters they have now."""
        size = self.size[:, : self.width]
        variance = torch.where(size > 0, self.deviation[:, : self.width] / size.clamp_min(1), 0.0)
        mean = variance.sum(1) / self.count.clamp_min(1)
        fresh = fresh & (self.count > 0)
        self.threshold = torch.where(fresh, self.split_variance * mean, self.threshold)

    def append(
        self,
        stream: torch.Tensor,
        cluster: torch.Tensor,
        offset: torch.Tensor,
        keys: torch.Tensor,
        position: torch.Tensor,
    ) -> None:
        """Take M tokens into their clusters at `offset`, which continues each cluster without gaps.

        Mean and squared deviations are merged by Chan's formula, the form of Welford's update for several points at
        once: no difference of large squares, so float32 stays accurate however far the keys lie from the origin.

        Args:
            stream, cluster, offset, position: integer `[M]`.
            keys: float32 `[M, D]`.
        """
        flat, group = torch.unique(stream * self.size.shape[1] + cluster, return_inverse=True)
        of, which = flat // self.size.shape[1], flat % self.size.shape[1]
        mean, count, deviation = (x[0] for x in moments(keys.unsqueeze(0), group.unsqueeze(0), len(flat)))
        before = self.size[of, which]
        after = before + count
        delta = mean - self.centroid[of, which]
        self.deviation[of, which] += deviation + delta.square().sum(-1) * before * count / after
        self.centroid[of, which] += delta * (count / after).unsqueeze(-1)
        self.size[of, which] = after.to(self.size)
        self.position[stream, cluster, offset] = position.to(self.position)

    def too_wide(self, stream: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
        """bool `[N]`: which clusters have a variance above their head's threshold and more than one token."""
        size = self.size[stream, cluster]
        return (size > 1) & (self.deviation[stream, cluster] > self.threshold[stream] * size)

    def replace(
        self,
        stream: torch.Tensor,
        cluster: torch.Tensor,
        centroid: torch.Tensor,
        size: torch.Tensor,
        deviation: torch.Tensor,
        position: torch.Tensor,
    ) -> None:
        """Give N clusters other tokens; their addresses stay."""
        self.centroid[stream, cluster] = centroid
        self.size[stream, cluster] = size.to(self.size)
        self.deviation[stream, cluster] = deviation
        self.position[stream, cluster] = position.to(self.position)

    def select(self, streams: torch.Tensor) -> None:
        """Keep `streams` (int64, repeats allowed) in this order. Repeated clusters have the same addresses."""
        for name in (*self._PER_CLUSTER, "count", "threshold"):
            setattr(self, name, getattr(self, name)[streams])
        self.width = int(self.count.max())


def ranks(group: torch.Tensor) -> torch.Tensor:
    """How many equal values stand before each value: int64 `[N]` for integers `[N]` in any order."""
    order = group.argsort(stable=True)
    position = torch.arange(len(group), device=group.device)
    ordered = group[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(first, position, 0).cummax(0).values if len(group) else position
    return torch.empty_like(position).scatter_(0, order, position - start)
