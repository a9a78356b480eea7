"""The streaming path: one background thread that fetches, checks and decodes what the plan wants."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from ..errors import ChunkError, StoreError
from .codec import ChunkHeader, Coder
from .cost import LinkRate
from .grid import Grid
from .manifest import Manifest, chunk_path
from .store import Store

logger = logging.getLogger("kvsched")


def _nothing() -> object:
    return None


class Progress:
    """How far each chunk is, shared by both paths: layers `[0, computed)` and `[streamed, layers)` are in place.

    `target` is the plan: the depth at which computing and streaming of a chunk are to meet. `changed` guards it all.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.changed = threading.Condition()
        self.computed = np.zeros(grid.chunks, dtype=int)
        self.streamed = np.full(grid.chunks, grid.layers)
        self.target = np.zeros(grid.chunks, dtype=int)
        self.damaged: set[int] = set()
        self.link_error: StoreError | None = None

    def is_missing(self, chunk: int) -> bool:
        """Whether a layer of `chunk` is in place by neither route."""
        return bool(self.computed[chunk] < self.streamed[chunk])

    def next_to_stream(self) -> int | None:
        """The last chunk of which the plan still wants layers streamed; `None` if there is none."""
        wanted = [t for t in np.flatnonzero(self.streamed > self.target).tolist() if t not in self.damaged]
        return wanted[-1] if wanted else None


class Streamer:
    """Streams a prefix from the back: last chunk first, in each chunk the last layer first, down to its target.

    Args:
        store, manifest, coder: where and what is published, and how it is read.
        progress: shared with the computing path.
        rate: told of every byte that arrives.
        stall_timeout: seconds of silence after which the link counts as dead.
        check: called with a chunk and its header; raises `ChunkError` if the header does not fit the model.
        deliver: called with a chunk, a layer, its keys and its values `[heads, tokens, head_dim]`.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        coder: Coder,
        progress: Progress,
        rate: LinkRate,
        stall_timeout: float,
        check: Callable[[int, ChunkHeader], None],
        deliver: Callable[..., None],
    ) -> None:
        self.store, self.manifest, self.coder = store, manifest, coder
        self.progress, self.rate, self.stall_timeout = progress, rate, stall_timeout
        self.check, self.deliver = check, deliver
        self.bytes_streamed, self.seconds = 0, 0.0
        self._headers: dict[int, ChunkHeader] = {}
        self._wake, self._stop = _nothing, _nothing

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Stream in the background for as long as the block runs; afterwards no thread and no connection is left."""
        started = threading.Event()

        async def main() -> None:
            loop, plan_changed = asyncio.get_running_loop(), asyncio.Event()
            streaming = loop.create_task(self._stream(plan_changed))
            self._wake = lambda: loop.call_soon_threadsafe(plan_changed.set)
            self._stop = lambda: loop.call_soon_threadsafe(streaming.cancel)
            started.set()
            await streaming

        def body() -> None:
            try:
                asyncio.run(main())
            except asyncio.CancelledError:
                pass  # the computing path has all it needs
            except Exception as error:  # whatever it was, the prefix can still be computed
                logger.exception("streaming has failed, the rest is computed")
                self._give_up(StoreError(f"streaming failed: {error!r}"))
            finally:
                started.set()

        thread = threading.Thread(target=body, name="kvsched-stream", daemon=True)
        thread.start()
        started.wait()
        try:
            yield
        finally:
            # Before Python 3.12 wait_for() loses a cancellation that meets its result, so it may take another.
            while thread.is_alive():
                with contextlib.suppress(RuntimeError):  # raised when the loop has ended by itself
                    self._stop()
                thread.join(timeout=0.1)
            self._wake, self._stop = _nothing, _nothing

    def wake(self) -> None:
        """Look at the plan again: it has changed."""
        with contextlib.suppress(RuntimeError):
            self._wake()

    async def _stream(self, plan_changed: asyncio.Event) -> None:
        begin = time.monotonic()
        while True:
            plan_changed.clear()
            with self.progress.changed:
                chunk = self.progress.next_to_stream()
            if chunk is None:
                await plan_changed.wait()
                continue
            try:
                await self._fetch(chunk)
            except ChunkError as error:
                logger.warning("a published chunk is refused and will be computed: %s", error)
                with self.progress.changed:
                    self.progress.damaged.add(chunk)
                    self.progress.changed.notify_all()
            except StoreError as error:
                logger.warning("streaming has stopped, the rest is computed: %s", error)
                self._give_up(error)
                return
            self.seconds = time.monotonic() - begin

    def _give_up(self, error: StoreError) -> None:
        with self.progress.changed:
            self.progress.link_error = error
            self.progress.changed.notify_all()

    async def _fetch(self, chunk: int) -> None:
        """Stream layers of one chunk from where it stands down to its target, which may move meanwhile."""
        entry, progress = self.manifest.chunks[chunk], self.progress
        with progress.changed:
            upper, lower = int(progress.streamed[chunk]), int(progress.target[chunk])
        start, stop = entry.payload_span(upper, lower)
        if chunk not in self._headers:
            start = 0  # the header lies before the last layer's payload, so both come in one request
        received = bytearray()
        self.rate.observe(0, time.monotonic())
        async with contextlib.aclosing(self.store.read(chunk_path(entry.address), start, stop)) as pieces:
            while True:
                try:
                    piece = await asyncio.wait_for(anext(pieces), self.stall_timeout)
                except StopAsyncIteration:
                    raise ChunkError(f"chunk {chunk} ends early, in layer {upper - 1}") from None
                except asyncio.TimeoutError:
                    raise StoreError(f"not one byte from {self.store.uri} in {self.stall_timeout} seconds") from None
                received += piece
                self.bytes_streamed += len(piece)
                self.rate.observe(len(piece), time.monotonic())
                if chunk not in self._headers:
                    if len(received) < entry.header_bytes:
                        continue
                    self._headers[chunk] = self._read_header(chunk, bytes(received[: entry.header_bytes]))
                    del received[: entry.header_bytes]
                upper = self._take_payloads(chunk, upper, received)
                with progress.changed:
                    if upper <= max(lower, int(progress.target[chunk])):
                        return

    def _read_header(self, chunk: int, data: bytes) -> ChunkHeader:
        entry = self.manifest.chunks[chunk]
        if hashlib.sha256(data).hexdigest() != entry.header_sha256:
            raise ChunkError(f"the header of chunk {chunk} is not the one that was published")
        header = ChunkHeader.from_bytes(data)
        if [layer.length for layer in header.layers] != list(entry.payload_bytes):
            raise ChunkError(f"the header of chunk {chunk} contradicts its manifest")
        self.check(chunk, header)
        return header

    def _take_payloads(self, chunk: int, upper: int, received: bytearray) -> int:
        """Decode every payload that has arrived whole; the lowest layer that is in place now."""
        header = self._headers[chunk]
        while upper > 0 and len(received) >= (entry := header.layers[len(header.layers) - upper]).length:
            keys, values = self.coder.decode(header, entry, bytes(received[: entry.length]))
            del received[: entry.length]
            self.deliver(chunk, entry.layer, keys, values)
            upper -= 1
            with self.progress.changed:
                self.progress.streamed[chunk] = upper
                self.progress.changed.notify_all()
        return upper
