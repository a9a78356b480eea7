"""Loads a published prefix: computes it from the front and streams it from the back until the two meet.

Computing runs in the caller's thread, chunk by chunk, each to its planned depth; streaming runs beside it
(`stream.py`). The plan is made again, on what is left and with the rates measured so far, at layer boundaries of the
running forward: so either path takes over what the other turns out too slow for. What cannot be streamed after all (a
dead or stalled link, a damaged chunk) is computed at the end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..config import SparKVConfig
from ..errors import ChunkError
from .codec import ChunkHeader, Coder
from .cost import ComputeRate, DeviceProfile, LinkRate
from .forward import PrefixCache, kv_shapes
from .grid import Grid
from .manifest import Manifest
from .plan import PLANNERS, makespan
from .store import Store
from .stream import Progress, Streamer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REPLAN_SECONDS = 0.25


@dataclass(frozen=True)
class LoadResult:
    """A loaded prefix and the numbers of its loading.

    `depths` are layers computed of each chunk; the rest of each chunk was streamed. Seconds are wall time.
    `predicted_seconds` is what the first plan made with a measured or remembered goodput promised.
    """

    cache: PrefixCache
    depths: tuple[int, ...]
    seconds: float
    compute_seconds: float
    stream_seconds: float
    predicted_seconds: float | None
    bytes_streamed: int
    goodput: float | None
    plans: int
    fallback: str | None


class Loader:
    """One loading of one prefix.

    Args:
        model: computes the prefix's lower layers.
        token_ids: `[1, n]`, at least as many as the manifest's chunks cover.
        manifest, store: what is published, and where.
        config: options of the cache.
        goodput: bytes a second that the link gave last time, or `None`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        token_ids: torch.Tensor,
        manifest: Manifest,
        store: Store,
        config: SparKVConfig,
        goodput: float | None = None,
    ) -> None:
        self.model, self.token_ids, self.manifest = model, token_ids, manifest
        self.shapes = kv_shapes(model.config)
        self.grid = Grid(len(manifest.chunks), manifest.chunk_tokens, len(self.shapes))
        self.planner = PLANNERS[config.planner]
        self.cache = PrefixCache(model.config, self.grid.tokens)
        self.compute_table = DeviceProfile.of(model, self.grid.chunk_tokens).compute_seconds(self.grid)
        # layer_bytes[t, l]: bytes of layer l's payload; a chunk object lists them last layer first.
        self.layer_bytes = np.array([chunk.payload_bytes[::-1] for chunk in manifest.chunks], dtype=float)
        self.compute_rate, self.link_rate = ComputeRate(), LinkRate(goodput)
        self.progress = Progress(self.grid)
        self.streamer = Streamer(
            store,
            manifest,
            Coder.of(model, config.codec),
            self.progress,
            self.link_rate,
            config.stall_timeout,
            self._check,
            self._deliver,
        )
        self.plans, self.compute_seconds = 0, 0.0
        self.predicted_seconds: float | None = None
        self._begin = self._planned_at = time.monotonic()

    def run(self) -> LoadResult:
        """Load the prefix; returns when every chunk has every layer."""
        progress, chunk = self.progress, 0
        self._begin = time.monotonic()
        self._plan(0, 0)
        with self.streamer.running():
            while progress.link_error is None:
                if chunk < self.grid.chunks and progress.target[chunk] > 0:
                    self._compute_to_target(chunk)
                    chunk += 1
                    continue
                with progress.changed:
                    if progress.next_to_stream() is None:
                        break
                    progress.changed.wait(timeout=_REPLAN_SECONDS)
                if chunk < self.grid.chunks:
                    self._plan_if_due(chunk, 0)
        self._compute_what_is_missing()
        return LoadResult(
            cache=self.cache,
            depths=tuple(progress.computed.tolist()),
            seconds=time.monotonic() - self._begin,
            compute_seconds=self.compute_seconds,
            stream_seconds=self.streamer.seconds,
            predicted_seconds=self.predicted_seconds,
            bytes_streamed=self.streamer.bytes_streamed,
            goodput=self.link_rate.goodput(time.monotonic()),
            plans=self.plans,
            fallback=self._fallback(),
        )

    def _plan_if_due(self, chunk: int, layers_done: int) -> None:
        if time.monotonic() - self._planned_at >= _REPLAN_SECONDS:
            self._plan(chunk, layers_done)

    def _plan(self, chunk: int, layers_done: int) -> None:
        """Plan the chunks from `chunk` on, of which `layers_done` layers are computed; earlier ones are settled."""
        progress, layers = self.progress, self.grid.layers
        goodput = self.link_rate.goodput(time.monotonic())
        with progress.changed:
            streamed = progress.streamed.copy()
            # A chunk that cannot be streamed costs the stream nothing; it is computed at the end.
            open_bytes = np.where(
                np.isin(np.arange(self.grid.chunks), list(progress.damaged))[:, None], 0, self.layer_bytes
            )
        open_bytes = open_bytes * (np.arange(layers) < streamed[:, None])
        settled = sum(open_bytes[t, progress.computed[t] :].sum() for t in range(chunk))
        # Depth d needs the attention of layers below d - 1, so those of every earlier chunk have to be in place.
        waiting = [t for t in range(chunk) if progress.computed[t] < streamed[t]]
        reach = min([layers, *(progress.computed[t] + 1 for t in waiting)])
        rest = slice(chunk, self.grid.chunks)

        compute = self.compute_table[rest] * self.compute_rate.factor
        compute[0] -= compute[0, layers_done]
        compute[np.arange(layers + 1) > np.maximum(np.minimum(streamed[rest, None], reach), layers_done)] = np.inf
        compute[0, :layers_done] = np.inf
        # stream[t, d]: bytes of layers d.. that have not arrived, as seconds. Until anything is known of the link, it
        # is taken to be as fast as computing; the first bytes put that right.
        to_stream = np.zeros_like(compute)
        to_stream[:, :-1] = np.cumsum(open_bytes[rest, ::-1], axis=1)[:, ::-1]
        to_stream[0] += settled
        stream = to_stream / (goodput or self.layer_bytes.sum() / self.compute_table[:, -1].sum())

        depths = self.planner(compute, stream)
        self.plans += 1
        self._planned_at = time.monotonic()
        if self.predicted_seconds is None and goodput is not None:
            self.predicted_seconds = self._planned_at - self._begin + makespan(compute, stream, depths)
        with progress.changed:
            progress.target[rest] = depths
        self.streamer.wake()

    def _compute_to_target(self, chunk: int) -> None:
        begin = last = time.perf_counter()
        table, progress = self.compute_table[chunk], self.progress

        def go_on(layer: int) -> bool:
            nonlocal last
            now = time.perf_counter()
            self.compute_rate.observe(now - last, table[layer + 1] - table[layer])
            last = now
            with progress.changed:
                progress.computed[chunk] = layer + 1
                if progress.link_error is not None:
                    return False
            self._plan_if_due(chunk, layer + 1)
            return layer + 1 < progress.target[chunk]

        self.cache.compute(self.model, self.token_ids[:, self.grid.span(chunk)], self.grid.span(chunk).start, go_on)
        self.compute_seconds += time.perf_counter() - begin

    def _compute_what_is_missing(self) -> None:
        """Compute, from the first chunk on, whatever neither path has delivered.

        Every chunk before the one at hand is complete, so it can be computed to any depth.
        """
        begin, progress = time.perf_counter(), self.progress
        for chunk in filter(progress.is_missing, range(self.grid.chunks)):
            depth = progress.streamed[chunk]
            self.cache.compute(
                self.model,
                self.token_ids[:, self.grid.span(chunk)],
                self.grid.span(chunk).start,
                lambda layer, depth=depth: layer + 1 < depth,  # type: ignore[misc]
            )
            progress.computed[chunk] = depth
        self.compute_seconds += time.perf_counter() - begin

    def _check(self, chunk: int, header: ChunkHeader) -> None:
        if (header.position, header.tokens) != (self.grid.span(chunk).start, self.grid.chunk_tokens):
            raise ChunkError(f"chunk {chunk} holds other tokens than this prefix needs")
        for entry, layer in zip(header.layers, reversed(range(self.grid.layers)), strict=True):
            heads, head_dim = self.shapes[layer]
            shape = (heads, self.grid.chunk_tokens, head_dim)
            if (entry.layer, entry.keys, entry.values) != (layer, shape, shape):
                raise ChunkError(f"layer {entry.layer} of chunk {chunk} has a shape that this model does not have")

    def _deliver(self, chunk: int, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        device = self.model.device
        self.cache.layers[layer].write(self.grid.span(chunk).start, keys[None].to(device), values[None].to(device))

    def _fallback(self) -> str | None:
        if self.progress.link_error is not None:
            return str(self.progress.link_error)
        if self.progress.damaged:
            return f"chunks {sorted(self.progress.damaged)} were refused as damaged and computed instead"
        return None
