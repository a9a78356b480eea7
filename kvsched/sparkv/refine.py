"""Progressive loading: the first token comes from coarse bases, and what they lack arrives while decoding goes on.

Nothing of the sort is in the SparKV paper. A `Refiner` streams the residuals in the background and decodes them with
the bases they belong to; whoever owns the cache takes over what has come, layer by layer, in the thread that decodes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from .codec import Base, ChunkHeader, Coder, LayerEntry
from .cost import LinkRate
from .grid import Grid
from .manifest import Manifest
from .store import Store
from .stream import Progress, Streamer


class Refined(NamedTuple):
    """Keys and values `[heads, tokens, head_dim]` of the tokens from `start` on, as fine as they will be."""

    start: int
    keys: torch.Tensor
    values: torch.Tensor


class KeepingCoder:
    """Decodes bases and keeps them, compressed as they came, by position and layer."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self.bases: dict[tuple[int, int], Base] = {}

    def decode(self, header: ChunkHeader, entry: LayerEntry, payload: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Coder.decode`."""
        self.bases[header.position, entry.layer] = Base(header, entry, payload)
        return self.coder.decode(header, entry, payload)


class _RefiningCoder:
    def __init__(self, keeping: KeepingCoder) -> None:
        self.coder, self.bases = keeping.coder, keeping.bases

    def decode(self, header: ChunkHeader, entry: LayerEntry, payload: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        return self.coder.refine(header, entry, payload, self.bases.pop((header.position, entry.layer)))


class Refiner:
    """Streams what the streamed bases of a prefix lack; it ends by itself, with success or without.

    Args:
        store, manifest: where and what is published, refinements included.
        grid: the prefix.
        keeping: what has been streamed of it.
        check: as in `Streamer`.
        patience: seconds of silence after which the link counts as dead.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        grid: Grid,
        keeping: KeepingCoder,
        check: Callable[[int, ChunkHeader], None],
        patience: float,
    ) -> None:
        objects = manifest.refinements or ()
        self._grid, self._progress = grid, Progress(grid)
        for chunk, entry in enumerate(objects):
            for layer, size in enumerate(entry.payload_bytes[::-1]):
                needed = size > 0 and (grid.span(chunk).start, layer) in keeping.bases
                self._progress.arrived[chunk, layer] = not needed
        self._streamer = Streamer(
            store,
            replace(manifest, chunks=objects),
            _RefiningCoder(keeping),
            self._progress,
            LinkRate(),
            lambda: patience,
            check,
            self._deliver,
        )
        self._found: dict[int, list[Refined]] = defaultdict(list)
        self._lock = threading.Lock()
        self._running = contextlib.ExitStack()

    def start(self) -> None:
        """Begin, if there is anything to do."""
        if not self.ended:
            self._running.enter_context(self._streamer.running(once=True))

    def take(self, layer: int) -> list[Refined]:
        """What has come of `layer` since it was last asked for."""
        with self._lock:
            return self._found.pop(layer, [])

    def wait(self) -> None:
        """Return when nothing more will come."""
        with self._progress.changed:
            self._progress.changed.wait_for(lambda: self.ended)

    def close(self) -> None:
        """Stop; no thread and no connection is left."""
        self._running.close()

    @property
    def coarse(self) -> int:
        """Layers of chunks whose residuals have not come."""
        return int((~self._progress.arrived).sum())

    @property
    def bytes_streamed(self) -> int:
        """Bytes that have come."""
        return self._streamer.bytes_streamed

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        progress = self._progress
        return progress.link_error is not None or progress.next_to_stream() is None

    @property
    def failure(self) -> str | None:
        """Why something stays coarse."""
        progress = self._progress
        if progress.link_error is None and not progress.damaged:
            return None
        reason = progress.link_error or f"the refinements of chunks {sorted(progress.damaged)} were refused as damaged"
        return f"{self.coarse} layers of chunks stay coarse: {reason}"

    def _deliver(self, chunk: int, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        with self._lock:
            self._found[layer].append(Refined(self._grid.span(chunk).start, keys, values))
