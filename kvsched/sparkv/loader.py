"""Loads a published prefix: computes it from the front and streams it from the back until the two meet.

Computing runs in the caller's thread, chunk by chunk, each to its planned depth; streaming runs beside it
(`stream.py`). The division is planned again, on what is left and with the rates measured so far, at layer boundaries of
the running forward, and changed when that promises enough: so either path takes over what the other turns out too slow
for. What cannot be streamed after all (a dead or stalled link, a damaged chunk) is computed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from ..config import SparKVConfig
from ..errors import ChunkError
from .codec import ChunkHeader, Coder
from .cost import ComputeRate, DeviceProfile, LinkRate, Slowdown
from .energy import PowerProfile, objective_of
from .forward import PrefixCache, kv_shapes
from .grid import Grid
from .manifest import Manifest
from .plan import PLANNERS, local, makespan, stream_all, totals
from .predictor import LearnedProfile
from .refine import KeepingCoder, Refiner
from .store import Store
from .stream import Arrival, Progress, Streamer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REPLAN_SECONDS = 0.25
# Of the time that is left: a plan that promises less is not worth changing course for, nor is dividing at all worth
# leaving the better path alone for. Predictions err by as much, and both paths share the processor and the memory.
_MIN_GAIN = 0.1
_MAX_PLANS = 100
# Seconds that computing waits for an unknown link to settle, in all and after its first bytes: on a fast one it would
# only take the processor from the stream.
_FIRST_LOOK = 0.35, 0.2
_MOST_BANDS = 8  # each is a request for every chunk
_MIN_PATIENCE = 1.0  # seconds; what a sound link may well be silent for


@dataclass(frozen=True)
class LoadResult:
    """A loaded prefix and the numbers of its loading.

    `depths` are layers computed of each chunk; the rest of each chunk was streamed. Seconds are wall time;
    `compute_seconds` those in which the caller's thread did not wait for the stream. `predicted_seconds` is what the
    first plan made with a measured or remembered goodput promised. `slowdown` is what a next load may begin with.
    """

    cache: PrefixCache
    depths: tuple[int, ...]
    seconds: float
    compute_seconds: float
    stream_seconds: float
    predicted_seconds: float | None
    bytes_streamed: int
    goodput: float | None
    slowdown: Slowdown
    joules: float | None
    plans: int
    timeline: tuple[Arrival, ...]
    fallback: str | None


class Loader:
    """One loading of one prefix.

    ```python
    with loader.streaming():
        loader.compute()          # returns when the computing path has done its part
        loader.complete(layer)    # returns when every chunk has this layer; in any order, any number of times
    loader.result()
    ```

    Args:
        model: computes the prefix's lower layers.
        token_ids: `[1, n]`, at least as many as the manifest's chunks cover. What lies behind them is the model's to
            compute afterwards; it can begin while the last layers are still arriving, and is planned for.
        manifest, store: what is published, and where.
        config: options of the cache.
        goodput: bytes a second that the link gave last time, or `None`.
        slowdown: what the last load on this device found; `None` if there was none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        token_ids: torch.Tensor,
        manifest: Manifest,
        store: Store,
        config: SparKVConfig,
        goodput: float | None = None,
        slowdown: Slowdown | None = None,
    ) -> None:
        self.model, self.token_ids, self.manifest, self.config = model, token_ids, manifest, config
        self.shapes = kv_shapes(model.config)
        self.grid = Grid(len(manifest.chunks), manifest.chunk_tokens, len(self.shapes))
        self.planner, self.objective = PLANNERS[config.planner], objective_of(config)
        # Allocated here, as both paths write to it at once.
        self.cache = PrefixCache(model.config, self.grid.tokens).allocate(model)
        profile = DeviceProfile.of(model, self.grid.chunk_tokens)
        if config.cost_model == "learned":
            busy = psutil.cpu_percent() / 100  # since it was last asked
            self.compute_table = LearnedProfile.of(model, self.grid).compute_seconds(self.grid, busy)
        else:
            self.compute_table = profile.compute_seconds(self.grid)
        query_tokens = token_ids.shape[1] - self.grid.tokens
        self.query_seconds = profile.pass_seconds(query_tokens, self.grid.tokens) if query_tokens else 0.0
        # layer_bytes[t, l]: bytes of layer l's payload; a chunk object lists them last layer first.
        self.layer_bytes = np.array([chunk.payload_bytes[::-1] for chunk in manifest.chunks], dtype=float)
        slow_chunks, self.pass_slowdown = slowdown or Slowdown()
        self.compute_rate = ComputeRate(float(self.compute_table[0, -1]) / 4, slow_chunks)
        self._turns = list[tuple[float, float]]()  # when the pass asked for a layer, and when it went on
        self.link_rate = LinkRate(goodput)
        self.progress = Progress(self.grid)
        self.store, coder = store, Coder.of(model, config.codec)
        self._keeping = KeepingCoder(coder) if manifest.refinements else None
        self.streamer = Streamer(
            store,
            manifest,
            self._keeping or coder,
            self.progress,
            self.link_rate,
            self._patience,
            self._check,
            self._deliver,
        )
        self.plans, self._waited = 0, 0.0
        self.predicted_seconds: float | None = None
        self._begin = self._end = self._planned_at = time.monotonic()
        self._assumed_goodput, self._is_division_weighed = True, False
        self._best_goodput = 0.0

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        """Stream for as long as the block runs."""
        self._begin = time.monotonic()
        if self.link_rate.is_settled:
            self._plan(0, 0)
        with self.streamer.running():
            yield
        self._end = time.monotonic()

    def compute(self) -> None:
        """Compute the chunks from the front, each to its target, until the rest is left to the stream."""
        if not self.link_rate.is_settled:
            self._look_at_link()
        for chunk in range(self.grid.chunks):
            if self.progress.link_error is not None or self.progress.target[chunk] == 0:
                return
            self._compute_to_target(chunk)

    def _look_at_link(self) -> None:
        """Plan when the link has settled; until then everything is being streamed, from the back as in any plan."""
        begin, progress = time.monotonic(), self.progress
        deadline = self._begin + _FIRST_LOOK[0]

        def is_loading() -> bool:
            return progress.link_error is None and bool(progress.missing().any())

        with progress.changed:
            while (now := time.monotonic()) < deadline and not self.link_rate.is_settled and is_loading():
                if self.link_rate.latency and deadline > now + _FIRST_LOOK[1]:
                    deadline = now + _FIRST_LOOK[1]
                progress.changed.wait(timeout=0.005)
        self._waited += time.monotonic() - begin
        if is_loading():
            self._plan(0, 0)

    def complete(self, layer: int) -> None:
        """Wait until every chunk has `layer`, or compute what the stream owes where a new plan says so."""
        asked = time.monotonic()
        self._bring(layer)
        self._turns.append((asked, time.monotonic()))

    def _bring(self, layer: int) -> None:
        progress = self.progress
        while True:
            with progress.changed:
                missing = progress.missing()
                if not missing[:, layer].any():
                    return
                chunk = int(np.flatnonzero(missing.any(axis=1))[0])
                stranded = (
                    progress.link_error is not None or chunk in progress.damaged or progress.next_to_stream() is None
                )
                if not stranded:
                    begin = time.monotonic()
                    if self._plan_is_due():
                        self._plan(chunk, None, layer)
                    planned = (missing & (np.arange(self.grid.layers) < progress.target[:, None])).any(axis=1)
                    if not planned.any():
                        progress.changed.wait(timeout=_REPLAN_SECONDS)
                        self._waited += time.monotonic() - begin
                        continue
                    chunk = int(planned.argmax())
                else:
                    # Every chunk before this one is complete, so it can be computed to any depth. What is on its way of
                    # it is cut by the higher target.
                    depth = int(np.flatnonzero(missing[chunk])[-1]) + 1
                    progress.target[chunk] = self.grid.layers
            if not stranded:
                self._compute_to_target(chunk)
                continue
            self._compute_chunk(chunk, lambda done, depth=depth: done < depth)  # type: ignore[misc]

    def result(self) -> LoadResult:
        """The prefix and the numbers of its loading."""
        seconds = self._end - self._begin
        computing, streaming = seconds - self._waited, self.streamer.seconds
        joules = None
        if self.config.device is not None:
            power = PowerProfile.load(self.config.device)
            joules = power.joules(self.config.radio, computing, streaming, seconds)
        return LoadResult(
            cache=self.cache,
            depths=tuple(self.progress.computed.tolist()),
            seconds=seconds,
            compute_seconds=computing,
            stream_seconds=streaming,
            predicted_seconds=self.predicted_seconds,
            bytes_streamed=self.streamer.bytes_streamed,
            goodput=self.link_rate.goodput(time.monotonic()),
            slowdown=Slowdown(float(self.compute_rate.factor), self._observed_pass()),
            joules=joules,
            plans=self.plans,
            timeline=tuple(self.progress.timeline),
            fallback=self._fallback(),
        )

    def _observed_pass(self) -> float:
        """What to expect of the next pass over the rest of a prompt: the mean of what was expected and has come."""
        predicted = self.query_seconds * (len(self._turns) - 1) / self.grid.layers  # the last layer's end is not seen
        if predicted <= 0:
            return self.pass_slowdown
        actual = sum(asked - done for (_, done), (asked, _) in itertools.pairwise(self._turns))
        return (self.pass_slowdown + actual / predicted) / 2

    def refiner(self) -> Refiner | None:
        """What makes the loaded prefix as fine as it was published; `None` if it is already."""
        if self._keeping is None or not self._keeping.bases:
            return None
        timeout = self.config.stall_timeout
        return Refiner(self.store, self.manifest, self.grid, self._keeping, self._check, timeout)

    def _plan_is_due(self) -> bool:
        """Whether the last plan is of some age, or was made before anything was known of the link."""
        now = time.monotonic()
        shows = self._assumed_goodput and self.link_rate.goodput(now) is not None
        return (shows or now - self._planned_at >= _REPLAN_SECONDS) and self.plans < _MAX_PLANS

    def _plan(self, chunk: int, layers_done: int | None, layers_passed: int = 0) -> None:
        """Plan the chunks from `chunk` on; earlier ones are settled.

        Args:
            layers_done: of `chunk`, whose forward is running and can go on; `None` if none is. What is to be computed
                further then is computed from its first layer.
            layers_passed: through which the model's pass over the rest of the prompt has come.
        """
        progress, layers, rest = self.progress, self.grid.layers, slice(chunk, None)
        self._planned_at = time.monotonic()
        open_bytes, missing = self._open_bytes()
        # Depth d needs the attention of layers below d - 1, so those of every earlier chunk have to be in place.
        gaps = [int(row.argmax()) for row in missing[:chunk] if row.any()]
        reach = min([layers, *(gap + 1 for gap in gaps)])

        compute = self.compute_table[rest] * self.compute_rate.factor
        compute[np.arange(layers + 1) <= progress.computed[rest, None]] = 0
        if layers_done is not None:
            compute[0] = (self.compute_table[chunk] - self.compute_table[chunk, layers_done]) * self.compute_rate.factor
            compute[0, :layers_done] = np.inf
            compute[:, max(reach, layers_done) + 1 :] = np.inf
        to_pass = self.query_seconds * self.pass_slowdown * (1 - layers_passed / layers)
        compute[0] += to_pass
        # stream[t, d]: bytes of layers d.. that have not arrived, as seconds.
        to_stream = np.zeros_like(compute)
        to_stream[:, :-1] = np.cumsum(open_bytes[rest, ::-1], axis=1)[:, ::-1]
        to_stream[0] += (open_bytes * missing)[:chunk].sum()
        stream = to_stream / self._goodput()
        self._order_bands()  # those of the last plan may be of another goodput
        stream[0] += self._tail()

        depths = self.planner(compute, stream, self.objective)
        if self.link_rate.is_settled and not self._is_division_weighed:
            self._is_division_weighed = True
            alone = [plan(compute, stream, self.objective) for plan in (stream_all, local)]
            if not any(np.array_equal(depths, plan) for plan in alone):
                costs = [float(self.objective(*totals(compute, stream, plan))) for plan in (depths, *alone)]
                if costs[0] > (1 - _MIN_GAIN) * min(costs[1:]):
                    depths = alone[int(np.argmin(costs[1:]))]
        cost, kept = (self.objective(*totals(compute, stream, plan)) for plan in (depths, progress.target[rest]))
        if self.plans == 0 or cost <= (1 - _MIN_GAIN) * kept:
            self.plans += 1
            with progress.changed:
                progress.target[rest] = depths
        first_band = self._order_bands()
        # The pass over the rest of the prompt begins when its first layers have come, if not later.
        self._predict(max(makespan(compute, stream, progress.target[rest]), first_band / self._goodput() + to_pass))

    def _goodput(self) -> float:
        """Bytes a second, decoded. Until anything is known of the link it is taken to be as fast as computing."""
        measured = self.link_rate.throughput(time.monotonic())
        self._assumed_goodput = measured is None
        return measured or self.layer_bytes.sum() / self.compute_table[:, -1].sum()

    def _open_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """`[chunks, layers]`: bytes that have not arrived; and bool, what is in place by neither route."""
        progress = self.progress
        with progress.changed:
            open_bytes, missing = self.layer_bytes * ~progress.arrived, progress.missing()
            open_bytes[list(progress.damaged)] = 0  # cannot be streamed: computed at the end
        return open_bytes, missing

    def _predict(self, seconds: float) -> None:
        """Remember what the first plan promises that knows the link: `seconds` from now."""
        if self.predicted_seconds is None and self.link_rate.is_settled:
            self.predicted_seconds = time.monotonic() - self._begin + float(seconds)

    def _tail(self) -> float:
        """Seconds of the pass over the rest of the prompt that are left when the last byte has come."""
        bands = self.progress.bands
        last = self.grid.layers - (bands[-2] if len(bands) > 1 else 0)
        return self.query_seconds * self.pass_slowdown * last / self.grid.layers

    def _order_bands(self) -> float:
        """Have those layers arrive last that the pass over the rest of the prompt does not need before they can have.

        Earliest due date first, a few layers at a time, so that the pass hardly waits while they come and little of it
        is left when the last byte has; no fewer than what keeps the link busy. A link that gave more before may give it
        again: where it does not, the pass waits for layers, which is better than layers waiting for the pass.

        Returns:
            Bytes that have not arrived of the layers that come first.
        """
        progress, layers = self.progress, self.grid.layers
        goodput = self._goodput()
        if not self._assumed_goodput:
            self._best_goodput = goodput = max(self._best_goodput, goodput)
        owed = self._open_bytes()[0] * (np.arange(layers) >= progress.target[:, None])
        late = np.cumsum(owed.sum(axis=0)[::-1]) <= self.query_seconds * self.pass_slowdown * goodput
        first = layers - min(int(late.sum()), layers - 1)
        width = math.ceil(max(self.streamer.fewest_layers(), (layers - first) / _MOST_BANDS))
        with progress.changed:
            progress.bands = (*range(first, layers, width), layers)
        self.streamer.wake()
        return float(owed[:, : progress.bands[0]].sum())

    def _compute_to_target(self, chunk: int) -> None:
        def go_on(done: int) -> bool:
            if self.progress.link_error is not None:
                return False
            if self._plan_is_due():
                self._plan(chunk, done)
            return bool(done < self.progress.target[chunk])

        self._compute_chunk(chunk, go_on)

    def _compute_chunk(self, chunk: int, go_on: Callable[[int], bool]) -> None:
        """Compute a chunk's layers for as long as `go_on`, asked with the number of layers done, answers yes."""
        last = time.perf_counter()
        table, span = self.compute_table[chunk], self.grid.span(chunk)

        def note(layer: int) -> bool:
            nonlocal last
            now = time.perf_counter()
            self.compute_rate.observe(now - last, table[layer + 1] - table[layer])
            last = now
            self.progress.note(chunk, layer, "computed")
            return go_on(layer + 1)

        self.cache.compute(self.model, self.token_ids[:, span], span.start, note)

    def _patience(self) -> float:
        """Seconds of silence to bear: no more than what is owed takes to compute, within reason."""
        owed = np.flatnonzero(self.progress.missing().any(axis=1))
        seconds = float(self.compute_table[owed, -1].sum()) * self.compute_rate.factor
        return min(self.config.stall_timeout, max(_MIN_PATIENCE, seconds))

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
