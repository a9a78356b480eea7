"""k-means over many streams at once: uneven numbers of points, no empty clusters, no random numbers."""

from __future__ import annotations

import torch

from .dispatch import too_wide, triton_runs

Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Mean, size and sum of squared deviations of clusters: see `moments`."""

_MOST_IN_A_SET = 64
"""Points of a set to split that a Triton kernel holds in registers."""

_NUMBERS_AT_ONCE = 1 << 19
"""Of distances, or of points in sets that are padded to the largest, 2 MiB in float32: they come part by part."""


def nearest(points: torch.Tensor, centroid: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centroid of each point by Euclidean distance.

    Keys of models with a bias on the key projection lie far from the origin and close together. Both sides are
    therefore moved by the first centroid before squares are expanded, which keeps float32 exact enough.

    Args:
        points: float32 `[S, n, D]`.
        centroid: float32 `[S, C, D]`, C >= 1.
        mask: bool `[S, C]`, True where there is a cluster.

    Returns:
        label int64 `[S, n]` and squared distance float32 `[S, n]` (infinite in a stream without clusters).
    """
    if triton_runs("nearest", points):
        from .gpu.kmeans import nearest as kernel

        return kernel(points, centroid, mask)
    origin = centroid[:, :1]
    moved = centroid - origin
    norm = moved.square().sum(-1).masked_fill(~mask, float("inf")).unsqueeze(1)
    rows = max(1, _NUMBERS_AT_ONCE // (centroid.shape[0] * centroid.shape[1]))
    labels, distances = [], []
    for part in points.split(rows, dim=1):
        part = part - origin
        closest = torch.baddbmm(norm, part, moved.transpose(1, 2), alpha=-2.0).min(dim=-1)
        labels.append(closest.indices)
        distances.append((closest.values + part.square().sum(-1)).clamp_min(0.0))
    return torch.cat(labels, dim=1), torch.cat(distances, dim=1)


def moments(points: torch.Tensor, label: torch.Tensor, clusters: int, by_channel: bool = False) -> Moments:
    """Mean, size and sum of squared deviations of each cluster, in two passes.

    Args:
        points: float32 `[S, n, D]`.
        label: int64 `[S, n]`, -1 for points that belong nowhere.
        clusters: C.
        by_channel: leave the deviations of the channels apart.

    Returns:
        centroid float32 `[S, C, D]`, size int64 `[S, C]`, deviation float32 `[S, C]` (summed over channels) or, by
        channel, `[S, C, D]`. A cluster without points has centroid 0.
    """
    if triton_runs("moments", points, too_wide(points.shape[2])):
        from .gpu.kmeans import moments as kernel

        return kernel(points, label, clusters, by_channel)
    streams, _, dim = points.shape
    label = torch.where(label < 0, clusters, label)
    size = torch.zeros(streams, clusters + 1, dtype=torch.long, device=points.device)
    size.scatter_add_(1, label, torch.ones_like(label))
    wide = label.unsqueeze(-1).expand(-1, -1, dim)
    centroid = points.new_zeros(streams, clusters + 1, dim).scatter_add_(1, wide, points)
    centroid /= size.clamp_min(1).unsqueeze(-1)
    spread = (points - centroid.gather(1, wide)).square()
    if by_channel:
        squares = torch.zeros_like(centroid).scatter_add_(1, wide, spread)
        return centroid[:, :clusters], size[:, :clusters], squares[:, :clusters]
    spread = spread.sum(-1)
    deviation = points.new_zeros(streams, clusters + 1).scatter_add_(1, label, spread)
    return centroid[:, :clusters], size[:, :clusters], deviation[:, :clusters]


def update(before: Moments, points: torch.Tensor, label: torch.Tensor) -> Moments:
    """The moments of clusters once new points have joined them, as exact as if all points were taken at once.

    Args:
        before: as `moments` gives them, of C clusters.
        points: float32 `[S, n, D]`, the new points.
        label: int64 `[S, n]`, -1 for points that belong nowhere.
    """
    centroid, size, deviation = before
    by_channel = deviation.ndim == 3
    if triton_runs("update", points, too_wide(points.shape[2])):
        from .gpu.kmeans import moments as kernel

        return kernel(points, label, centroid.shape[1], by_channel, before)
    mean, count, squares = moments(points, label, centroid.shape[1], by_channel)
    total = size + count
    gap = torch.where(count.unsqueeze(-1) > 0, mean - centroid, 0.0)
    share = (count / total.clamp_min(1)).unsqueeze(-1)
    between = gap.square() * (share * size.unsqueeze(-1))
    return centroid + gap * share, total, deviation + squares + (between if by_channel else between.sum(-1))


def lloyd_step(
    points: torch.Tensor, mask: torch.Tensor, centroid: torch.Tensor, live: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of k-means: every point to its nearest centroid, and centroids that ran empty to the farthest points.

    Args:
        points: float32 `[S, n, D]`, mask: bool `[S, n]`, the points to cluster.
        centroid: float32 `[S, C, D]`, live: bool `[S, C]`, the clusters; at most as many as points.

    Returns:
        label int64 `[S, n]`, -1 where masked, and the new centroids.
    """
    closest, distance = nearest(points, centroid, live)
    label = _fill_empty(torch.where(mask, closest, -1), distance, live)
    return label, moments(points, label, centroid.shape[1])[0]


def kmeans(points: torch.Tensor, mask: torch.Tensor, clusters: torch.Tensor, iterations: int = 10) -> torch.Tensor:
    """Lloyd's algorithm in every stream at once.

    It starts from points evenly spaced in their order, so the same input always gives the same clusters, and
    neighbours in the text, whose keys are alike, start apart. A cluster that runs empty takes the point that lies
    farthest from its centroid.

    Args:
        points: float32 `[S, n, D]`.
        mask: bool `[S, n]`, True for the points to cluster.
        clusters: int64 `[S]`, how many to make; at most as many as the stream has points.
        iterations: at most; it ends early when nothing moves.

    Returns:
        label int64 `[S, n]`, -1 where masked; every cluster below `clusters` has a point.
    """
    most = int(clusters.max())
    count = mask.sum(1)
    if bool((clusters > count).any()):
        raise ValueError("kmeans: more clusters than points in a stream")
    label = torch.full(mask.shape, -1, dtype=torch.long, device=points.device)
    if most == 0:
        return label
    each = torch.arange(most, device=points.device)
    live = each < clusters.unsqueeze(1)
    spaced = (2 * each + 1) * count.unsqueeze(1) // (2 * clusters.clamp_min(1)).unsqueeze(1)
    seed = (~mask).to(torch.uint8).argsort(dim=1, stable=True).gather(1, spaced.clamp_max(mask.shape[1] - 1))
    centroid = points.gather(1, seed.unsqueeze(-1).expand(-1, -1, points.shape[-1]))
    for _ in range(iterations):
        before = label
        label, centroid = lloyd_step(points, mask, centroid, live)
        if torch.equal(label, before):
            break
    return label


def _fill_empty(label: torch.Tensor, distance: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Give each empty cluster (bool `live` `[S, C]`) the farthest point that is not the last of its own cluster."""
    streams, n = label.shape
    clusters = live.shape[1]
    bin_ = torch.where(label < 0, clusters, label)
    index = torch.arange(n, device=label.device).expand(streams, n)
    # The first point of every cluster stays, so no cluster is emptied to fill another.
    keeper = torch.full((streams, clusters + 1), n, device=label.device).scatter_reduce_(1, bin_, index, "amin")
    empty = live & (keeper[:, :clusters] == n)
    if not empty.any():
        return label
    may_move = (label >= 0) & (keeper.gather(1, bin_) != index)
    farthest = torch.where(may_move, distance, -1.0).argsort(dim=1, descending=True, stable=True)
    stream, cluster = empty.nonzero(as_tuple=True)
    label = label.clone()
    label[stream, farthest[stream, (empty.cumsum(1) - 1)[stream, cluster]]] = cluster
    return label


def two_means(
    points: torch.Tensor, mask: torch.Tensor, least: float | torch.Tensor = 0.0, iterations: int = 8
) -> torch.Tensor:
    """Split each set of points in two, both halves non-empty.

    The two centres start at the point farthest from the mean and the point farthest from that one. Where the smaller
    half would hold less than `least` of the points (or none), the points are cut at the median along the line between
    the centres instead.

    Args:
        points: float32 `[N, m, D]`.
        mask: bool `[N, m]`, at least two True in each set.
        least: least share of the smaller half, up to 0.5; one for all or `[N, 1]`.

    Returns:
        bool `[N, m]`, True for the second half, False where masked.
    """
    refused = too_wide(points.shape[2])
    if points.shape[1] > _MOST_IN_A_SET:
        refused = f"sets of {points.shape[1]} points are larger than {_MOST_IN_A_SET}"
    if triton_runs("two_means", points, refused):
        from .gpu.kmeans import two_means as kernel

        least = torch.as_tensor(least, dtype=torch.float32, device=points.device).expand(len(points), 1)
        return kernel(points, mask, least[:, 0], iterations)
    count = mask.sum(1, keepdim=True)
    weight = mask.unsqueeze(-1).to(points.dtype)
    points = points - ((points * weight).sum(1) / count).unsqueeze(1)

    def farthest_from(centre: torch.Tensor) -> torch.Tensor:
        far = (points - centre).square().sum(-1).masked_fill(~mask, -1.0).argmax(1)
        return points[torch.arange(len(points), device=points.device), far].unsqueeze(1)

    first = farthest_from(points.new_zeros(len(points), 1, points.shape[-1]))
    second = farthest_from(first)
    side = torch.zeros_like(mask)
    for _ in range(iterations):
        nearer = ((points - second).square().sum(-1) < (points - first).square().sum(-1)) & mask
        if torch.equal(nearer, side):
            break
        side = nearer
        chosen = side.unsqueeze(-1).to(points.dtype)
        total = side.sum(1, keepdim=True)
        second = ((points * chosen).sum(1) / total.clamp_min(1)).unsqueeze(1)
        first = ((points * (weight - chosen)).sum(1) / (count - total).clamp_min(1)).unsqueeze(1)

    smaller = torch.minimum(side.sum(1, keepdim=True), (~side & mask).sum(1, keepdim=True))
    along = (points * (second - first)).sum(-1).masked_fill(~mask, float("inf"))
    rank = along.argsort(dim=1, stable=True).argsort(dim=1)
    return torch.where(smaller < (least * count).clamp_min(1.0), (rank >= count // 2) & mask, side)


def members(label: torch.Tensor, stream: torch.Tensor, cluster: torch.Tensor, most: int) -> torch.Tensor:
    """The points of given clusters, in their order.

    Args:
        label: int64 `[S, n]`, -1 for points that belong nowhere.
        stream, cluster: int64 `[N]`, which clusters are meant.
        most: columns of the answer; points beyond are left out.

    Returns:
        int64 `[N, most]`, indices into n, -1 behind the last.
    """
    clusters = int(label.max()) + 1
    size = torch.zeros(label.shape[0], clusters + 1, dtype=torch.long, device=label.device)
    size.scatter_add_(1, label + 1, torch.ones_like(label))  # the points that belong nowhere come first
    start = size.cumsum(1)[stream, cluster]
    order = label.argsort(dim=1, stable=True)
    column = torch.arange(most, device=label.device)
    place = (start.unsqueeze(1) + column).clamp_max(label.shape[1] - 1)
    return torch.where(column < size[stream, cluster + 1].unsqueeze(1), order[stream.unsqueeze(1), place], -1)


def divide(
    points: torch.Tensor, label: torch.Tensor, clusters: torch.Tensor, wanted: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split clusters in two until there are as many as wanted and none holds more than `most` points.

    Those with the largest sum of squared deviations go first, up to half of a stream's clusters at a time. A half of
    one that is too large gets at least a quarter of its points, so even a cluster that swallowed a whole stream is down
    to size in a few rounds.

    Args:
        points: float32 `[S, n, D]`.
        label: int64 `[S, n]`, -1 for points that belong nowhere.
        clusters: int64 `[S]`, clusters of each stream, none of them empty.
        wanted: int64 `[S]`, how many to reach where the points suffice and are not all equal.
        most: points a cluster may hold, at least 1.

    Returns:
        The new `label` and `clusters`.
    """
    label, clusters = label.clone(), clusters.clone()
    while True:
        _, size, deviation = moments(points, label, int(clusters.max()))
        large = size > most
        room = torch.minimum(wanted - clusters - large.sum(1), (clusters + 1) // 2)
        worth = torch.where((size > 1) & ~large, deviation, 0.0)
        rank = worth.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        stream, cluster = (large | ((rank < room.unsqueeze(1)) & (worth > 0))).nonzero(as_tuple=True)
        if len(stream) == 0:
            return label, clusters
        point = members(label, stream, cluster, int(size[stream, cluster].max()))
        mask = point >= 0
        rows = stream.unsqueeze(1).expand_as(point)
        least = torch.where(large[stream, cluster], 0.25, 0.0).unsqueeze(1)
        step = max(1, _NUMBERS_AT_ONCE // (point.shape[1] * points.shape[2]))
        sets = zip(rows.split(step), point.split(step), mask.split(step), least.split(step), strict=True)
        second = torch.cat([two_means(points[row, at.clamp_min(0)], inside, low) for row, at, inside, low in sets])
        grown = torch.bincount(stream, minlength=len(clusters))
        new = clusters[stream] + torch.arange(len(stream), device=label.device) - (grown.cumsum(0) - grown)[stream]
        label[rows[second], point[second]] = new.unsqueeze(1).expand_as(point)[second]
        clusters += grown
