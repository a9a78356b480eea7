"""Vectors that the index keeps of every cluster, in 2, 4, 8, 16 or 32 bits a channel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvsched_kernels import Vectors, moments, pack, rows

_REACH = {2: 1.5, 4: 3.0, 8: 8.0}
"""Standard deviations from the mean to the outermost code. Beyond them numbers are clipped, which costs less recall on
a recorded model than the coarser steps that would reach them."""

_SHIFT = 0.25
"""Steps, over all channels on average, that the mean may wander before the codes are moved."""

_MOVED_AT_ONCE = 256
"""Clusters of every stream whose codes are moved together: they are unpacked for it."""

_RESCALE = 0.2
"""Share by which steps may be off, on average, before codes are made anew. It rounds them once more, so it is rare."""


class VectorTable:
    """One vector of `width` numbers for each of C clusters of S streams.

    With 32 bits they are float32, with 16 float16. With fewer, a channel's codes are evenly spaced around the mean of
    all vectors that the stream was given so far, and are moved with it.

    Attributes:
        data: floating `[S, C, width]`, or uint8 `[S, C, packed width]`.
        changed: whether `data` did, since it was last set to False.
    """

    def __init__(self, streams: int, width: int, bits: int, device: torch.device) -> None:
        self.width, self.bits = width, bits
        columns = width if bits >= 16 else -(-width * bits // 8)
        dtype = {16: torch.float16, 32: torch.float32}.get(bits, torch.uint8)
        self.data = torch.zeros(streams, 0, columns, dtype=dtype, device=device)
        self.changed = False
        # Offset and step of the codes, and count, mean and summed squared deviations of what was written.
        self.offset, self.step, self._mean, self._squares = torch.zeros(4, streams, 1, width, device=device).unbind()
        self._count = torch.zeros(streams, 1, 1, device=device)

    _PER_STREAM = ("offset", "step", "_mean", "_squares", "_count")

    @property
    def nbytes(self) -> int:
        """Bytes of what grows with the clusters."""
        return self.data.nbytes

    def grow(self, clusters: int) -> None:
        """Make room for `clusters` of each stream."""
        self.changed = True
        streams, now, columns = self.data.shape
        self.data = torch.cat([self.data, self.data.new_zeros(streams, clusters - now, columns)], dim=1)

    def write(self, stream: torch.Tensor, cluster: torch.Tensor, vectors: torch.Tensor) -> None:
        """Put float32 `[N, width]` at int64 `[N]`, `[N]`."""
        self.changed = True
        if self.bits >= 16:
            self.data[stream, cluster] = vectors.to(self.data.dtype)
        elif len(stream):
            self._follow(stream, vectors)
            self.data[stream, cluster] = self._encode(vectors, self.offset[stream, 0], self.step[stream, 0])

    def vectors(self, clusters: int, start: int = 0) -> Vectors:
        """The first `clusters` of every stream but those before `start`, in place."""
        data = self.data[:, start:clusters]
        return Vectors(data) if self.bits >= 16 else Vectors(data, self.bits, self.step, self.offset)

    def read(self, clusters: int, start: int = 0) -> torch.Tensor:
        """The first `clusters` of every stream but those before `start`: float32 `[S, clusters - start, width]`."""
        return self.vectors(clusters, start).read(self.width)

    def at(self, stream: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
        """Those at int64 `[N]`, `[N]`, as they are kept: float32 `[N, width]`."""
        data = self.data[stream, cluster].unsqueeze(1)
        some = Vectors(data) if self.bits >= 16 else Vectors(data, self.bits, self.step[stream], self.offset[stream])
        return some.read(self.width)[:, 0]

    def dot(self, query: torch.Tensor, clusters: int) -> torch.Tensor:
        """Products with `query` `[S, G, width]`: float32 `[S, G, clusters]`."""
        return self.vectors(clusters).dot(query)

    def mix(self, weight: torch.Tensor) -> torch.Tensor:
        """Sums of vectors by float32 `weight` `[S, G, clusters]`: float32 `[S, G, width]`."""
        return self.vectors(weight.shape[-1]).mix(weight, self.width)

    def select(self, streams: torch.Tensor) -> None:
        """Keep `streams` (int64, repeats allowed) in this order."""
        self.changed = True
        for name in ("data", *self._PER_STREAM):
            setattr(self, name, getattr(self, name)[streams])

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that it is made of, by name."""
        return {name.strip("_"): getattr(self, name) for name in ("data", *self._PER_STREAM)}

    def restore(self, take: Callable[..., torch.Tensor], clusters: int) -> None:
        """Become what `state` gave, of `clusters` clusters; `take(name, dtype, *shape)` hands the tensors out."""
        self.changed = True
        streams, _, columns = self.data.shape
        self.data = take("data", self.data.dtype, streams, clusters, columns)
        for name in self._PER_STREAM:
            setattr(self, name, take(name.strip("_"), torch.float32, *getattr(self, name).shape))

    def permute(self, order: torch.Tensor, streams: slice = slice(None)) -> None:
        """Let the first vectors of `streams` be those at int64 `[S, n]`; the rest stay."""
        self.changed = True
        data = self.data[streams]
        data[:, : order.shape[1]] = rows(data, order)

    def _encode(self, vectors: torch.Tensor, offset: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        codes = ((vectors - offset) / step).round_().clamp_(0, 2**self.bits - 1)
        return pack(codes.to(torch.uint8), self.bits)

    def _follow(self, stream: torch.Tensor, vectors: torch.Tensor) -> None:
        streams = len(self._count)
        mean, count, squares = moments(vectors[None], stream[None], streams, by_channel=True)
        mean, count, squares = mean[0].unsqueeze(1), count[0].view(-1, 1, 1), squares[0].unsqueeze(1)
        total = (self._count + count).clamp_min(1)
        delta = mean - self._mean
        self._squares += squares + delta.square() * self._count * count / total
        self._mean += delta * count / total
        self._count += count

        levels, reach = 2**self.bits - 1, _REACH[self.bits]
        wanted = (2 * reach / levels) * (self._squares / total).sqrt().clamp_min(1e-6)
        rescaled = (self._count > 0) & ((self.step / wanted - 1).abs().mean(-1, keepdim=True) > _RESCALE)
        step = torch.where(rescaled, wanted, self.step)
        offset = self._mean - step * levels / 2
        # By whole steps, so that codes are moved without being rounded again.
        shift = ((offset - self.offset) / step.clamp_min(1e-30)).round()
        shifted = (self._count > 0) & (shift.abs().mean(-1, keepdim=True) > _SHIFT)
        stale = (rescaled | shifted).flatten()
        if not stale.any():
            return
        moved = torch.where(rescaled, offset, torch.where(shifted, self.offset + shift * self.step, self.offset))
        for start in range(0, self.data.shape[1], _MOVED_AT_ONCE):
            part = slice(start, start + _MOVED_AT_ONCE)
            before = self.read(part.stop, start)[stale]
            self.data[stale, part] = self._encode(before, moved[stale], step[stale])
        self.offset, self.step = moved, step
