"""Nearest centroids, moments of clusters and splits in two as Triton kernels. Nothing is summed by atomics, so the same
input gives the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import columns, launches, precision

_POINTS, _CENTROIDS, _CHANNELS = 32, 64, 32


@triton.jit
def _nearest_kernel(
    points, centroid, mask, label_out, distance_out,
    points_stride, point_row, centroid_stride, centroid_row, mask_stride, n, clusters, dim,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(0).to(tl.int64)
    point = tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.arange(0, BLOCK_D)
    centroid += stream * centroid_stride
    points += stream * points_stride + point[:, None] * point_row
    own = tl.zeros([BLOCK_P], tl.float32)
    best = tl.full([BLOCK_P], float("inf"), tl.float32)
    label = tl.zeros([BLOCK_P], tl.int32)
    for begin in range(0, clusters, BLOCK_C):
        cluster = begin + tl.arange(0, BLOCK_C)
        live = tl.load(mask + stream * mask_stride + cluster, mask=cluster < clusters, other=0) != 0
        row = centroid + cluster.to(tl.int64)[:, None] * centroid_row
        own, norm = tl.zeros([BLOCK_P], tl.float32), tl.zeros([BLOCK_C], tl.float32)
        product = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for first in range(0, dim, BLOCK_D):
            channel = first + column
            there = (channel < dim)[None, :]
            # Keys with a large common offset lose nothing when squares are expanded around a centroid.
            origin = tl.load(centroid + channel, mask=channel < dim, other=0.0)[None, :]
            here = (point < n)[:, None] & there
            p = tl.where(here, tl.load(points + channel[None, :], mask=here, other=0.0) - origin, 0.0)
            known = live[:, None] & there
            c = tl.where(known, tl.load(row + channel[None, :], mask=known, other=0.0) - origin, 0.0)
            own += tl.sum(p * p, 1)
            norm += tl.sum(c * c, 1)
            product = tl.dot(p, tl.trans(c), product, input_precision=PRECISION)
        square = tl.where(live, norm, float("inf"))[None, :] - 2.0 * product
        least, where = tl.min(square, 1, return_indices=True)
        label = tl.where(least < best, begin + where, label)
        best = tl.minimum(best, least)
    distance = tl.where(own != own, own, tl.maximum(best + own, 0.0))
    tl.store(label_out + stream * n + point, label.to(tl.int64), mask=point < n)
    tl.store(distance_out + stream * n + point, distance, mask=point < n)


@triton.jit
def _moments_kernel(
    points, order, bounds, old_centroid, old_size, old_deviation, centroid, size, deviation,
    points_stride, point_row, n, clusters, dim,
    BY_CHANNEL: tl.constexpr, RUNNING: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One cluster, in two passes over its points; with `RUNNING` put together with what it held before."""
    stream, cluster = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
    there = channel < dim
    first = tl.load(bounds + stream * (clusters + 1) + cluster)
    last = tl.load(bounds + stream * (clusters + 1) + cluster + 1)
    points += stream * points_stride
    total = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(first, last, BLOCK_P):
        inside = begin + lane < last
        point = tl.load(order + stream * n + begin + lane, mask=inside, other=0)
        row = points + point[:, None] * point_row + channel[None, :]
        total += tl.sum(tl.load(row, mask=inside[:, None] & there[None, :], other=0.0), 0)
    count = (last - first).to(tl.float32)
    mean = total / tl.maximum(count, 1.0)
    squares = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(first, last, BLOCK_P):
        inside = begin + lane < last
        point = tl.load(order + stream * n + begin + lane, mask=inside, other=0)
        row = points + point[:, None] * point_row + channel[None, :]
        mask = inside[:, None] & there[None, :]
        gap = tl.where(mask, tl.load(row, mask=mask, other=0.0) - mean[None, :], 0.0)
        squares += tl.sum(gap * gap, 0)
    place = stream * clusters + cluster
    tokens = last - first
    if RUNNING:
        before = tl.load(old_size + place).to(tl.float32)
        tokens += tl.load(old_size + place).to(tl.int64)
        both = tl.maximum(before + count, 1.0)
        old = tl.load(old_centroid + place * dim + channel, mask=there, other=0.0)
        gap = tl.where(count > 0, mean - old, 0.0)
        mean = old + gap * (count / both)
        squares += gap * gap * (before * count / both)
    tl.store(centroid + place * dim + channel, mean, mask=there)
    tl.store(size + place, tokens)
    if BY_CHANNEL:
        if RUNNING:
            squares += tl.load(old_deviation + place * dim + channel, mask=there, other=0.0)
        tl.store(deviation + place * dim + channel, squares, mask=there)
    else:
        whole = tl.sum(tl.where(there, squares, 0.0), 0)
        if RUNNING:
            whole += tl.load(old_deviation + place)
        tl.store(deviation + place, whole)


@triton.jit
def _farthest(points, centre, mask):
    """The point of `[M, D]` farthest from `centre` among those marked, the first of several: `[D]`."""
    gap = points - centre[None, :]
    index = tl.argmax(tl.where(mask, tl.sum(gap * gap, 1), -1.0), 0)
    return tl.sum(tl.where((tl.arange(0, points.shape[0]) == index)[:, None], points, 0.0), 0)


@triton.jit
def _two_means_kernel(
    points, mask, least, second_out, set_stride, point_row, mask_stride, m, dim, iterations,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One set of points, which stays in registers from the first centres to the cut."""
    which = tl.program_id(0).to(tl.int64)
    index, channel = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    live = tl.load(mask + which * mask_stride + index, mask=index < m, other=0) != 0
    inside = live[:, None] & (channel < dim)[None, :]
    x = tl.load(points + which * set_stride + index[:, None] * point_row + channel[None, :], mask=inside, other=0.0)
    count = tl.sum(live.to(tl.int32), 0)
    x = tl.where(inside, x - (tl.sum(x, 0) / count)[None, :], 0.0)
    one = _farthest(x, tl.zeros([BLOCK_D], tl.float32), live)
    two = _farthest(x, one, live)
    side = live & (index < 0)
    for _ in range(iterations):
        to_one, to_two = x - one[None, :], x - two[None, :]
        side = live & (tl.sum(to_two * to_two, 1) < tl.sum(to_one * to_one, 1))
        inside_two = tl.sum(side.to(tl.int32), 0)
        sum_two = tl.sum(tl.where(side[:, None], x, 0.0), 0)
        one = (tl.sum(x, 0) - sum_two) / tl.maximum(count - inside_two, 1)
        two = sum_two / tl.maximum(inside_two, 1)
    inside_two = tl.sum(side.to(tl.int32), 0)
    smaller = tl.minimum(inside_two, count - inside_two).to(tl.float32)
    along = tl.where(live, tl.sum(x * (two - one)[None, :], 1), float("inf"))
    ahead = (along[None, :] < along[:, None]) | ((along[None, :] == along[:, None]) & (index[None, :] < index[:, None]))
    upper = live & (tl.sum(ahead.to(tl.int32), 1) >= count // 2)
    cut = smaller < tl.maximum(tl.load(least + which) * count.to(tl.float32), 1.0)
    tl.store(second_out + which * m + index, tl.where(cut, upper, side).to(tl.uint8), mask=index < m)


@launches
def nearest(points: torch.Tensor, centroid: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kvsched_kernels.nearest`."""
    streams, n, dim = points.shape
    points, centroid, mask = points.contiguous(), centroid.contiguous(), mask.contiguous().view(torch.uint8)
    label = torch.empty(streams, n, dtype=torch.long, device=points.device)
    distance = torch.empty(streams, n, device=points.device)
    if n:
        _nearest_kernel[(streams, triton.cdiv(n, _POINTS))](
            points, centroid, mask, label, distance,
            points.stride(0), points.stride(1), centroid.stride(0), centroid.stride(1), mask.stride(0),
            n, centroid.shape[1], dim,
            PRECISION=precision(), BLOCK_P=_POINTS, BLOCK_C=_CENTROIDS, BLOCK_D=_CHANNELS, num_warps=8,
        )  # fmt: skip
    return label, distance


@launches
def moments(
    points: torch.Tensor,
    label: torch.Tensor,
    clusters: int,
    by_channel: bool,
    before: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kvsched_kernels.moments`; `before` is what `kvsched_kernels.update` is given of earlier points."""
    streams, n, dim = points.shape
    points = points.contiguous()
    ordered, order = label.sort(dim=1, stable=True)
    each = torch.arange(clusters + 1, device=points.device).expand(streams, -1).contiguous()
    bounds = torch.searchsorted(ordered.contiguous(), each)
    centroid = torch.empty(streams, clusters, dim, device=points.device)
    size = torch.empty(streams, clusters, dtype=torch.long, device=points.device)
    deviation = torch.empty(streams, clusters, *([dim] if by_channel else []), device=points.device)
    old = (centroid, size, deviation) if before is None else tuple(part.contiguous() for part in before)
    if clusters:
        _moments_kernel[(streams, clusters)](
            points, order, bounds, *old, centroid, size, deviation,
            points.stride(0), points.stride(1), n, clusters, dim,
            BY_CHANNEL=by_channel, RUNNING=before is not None, BLOCK_P=_POINTS, BLOCK_D=columns(dim, 16),
        )  # fmt: skip
    return centroid, size, deviation


@launches
def two_means(points: torch.Tensor, mask: torch.Tensor, least: torch.Tensor, iterations: int) -> torch.Tensor:
    """See `kvsched_kernels.two_means`; `least` is float32 `[N]`."""
    sets, m, dim = points.shape
    points, mask = points.contiguous(), mask.contiguous().view(torch.uint8)
    second = torch.empty(sets, m, dtype=torch.uint8, device=points.device)
    if sets:
        _two_means_kernel[(sets,)](
            points, mask, least.contiguous(), second, points.stride(0), points.stride(1), mask.stride(0), m, dim,
            iterations, BLOCK_M=triton.next_power_of_2(m), BLOCK_D=columns(dim, 16), num_warps=8,
        )  # fmt: skip
    return second.view(torch.bool)
