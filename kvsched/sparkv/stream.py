"""The streaming path: one background thread that fetches, checks and decodes what the plan wants."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from ..errors import ChunkError, StoreError
from .codec import ChunkHeader, LayerEntry
from .cost import LinkRate
from .grid import Grid
from .manifest import Manifest, chunk_path
from .store import Store

logger = logging.getLogger("kvsched")

_REQUESTS = 2, 16  # at least and at most
_READER_SECONDS = 0.05  # what an answer may wait for its reader, on a processor that computes as well
# A piece of a response is what arrives in about that time: small enough to know the goodput soon, and no smaller, as
# each piece takes time from computing.
_PIECE_SECONDS = 0.02
_PIECE_BYTES = 16 * 1024, 256 * 1024


def _nothing() -> object:
    return None


class Arrival(NamedTuple):
    """A layer of a chunk came into place `seconds` after the load began, computed or streamed."""

    seconds: float
    chunk: int
    layer: int
    route: Literal["computed", "streamed"]


class Progress:
    """What is in place, shared by both paths and guarded by `changed`.

    Args:
        grid: the prefix.

    Attributes:
        computed: `[chunks]`, layers `[0, computed)` of each chunk are computed.
        arrived: bool `[chunks, layers]`, what has been streamed.
        target: `[chunks]`, the plan: layers from here on are to be streamed.
        bands: layers up to the first of these come first, then those up to the second, and so on to the last, which is
            the number of layers. The model's own pass over the rest of the prompt needs the upper ones later, so it can
            begin while they are still arriving.
        damaged: chunks that are not streamed any further.
        link_error: why nothing is streamed any more.
        timeline: what came into place when.
    """

    def __init__(self, grid: Grid) -> None:
        self.changed = threading.Condition()
        self.computed = np.zeros(grid.chunks, dtype=int)
        self.arrived = np.zeros((grid.chunks, grid.layers), dtype=bool)
        self.target = np.zeros(grid.chunks, dtype=int)
        self.bands: tuple[int, ...] = (grid.layers,)
        self.damaged: set[int] = set()
        self.link_error: StoreError | None = None
        self.timeline: list[Arrival] = []
        self._begin = time.monotonic()

    def note(self, chunk: int, layer: int, route: Literal["computed", "streamed"]) -> None:
        """A layer of a chunk is in place now."""
        with self.changed:
            if route == "streamed":
                self.arrived[chunk, layer] = True
            else:
                self.computed[chunk] = max(self.computed[chunk], layer + 1)
            self.timeline.append(Arrival(time.monotonic() - self._begin, chunk, layer, route))
            self.changed.notify_all()

    def missing(self) -> np.ndarray:
        """bool `[chunks, layers]`: what is in place by neither route."""
        return ~self.arrived & (np.arange(self.arrived.shape[1]) >= self.computed[:, None])

    def next_to_stream(self, busy: Iterable[int] = ()) -> tuple[int, int, int] | None:
        """The next run of layers to stream, as `(chunk, upper, lower)` for layers `[lower, upper)`.

        Lowest band first, in it the last chunk; `None` if the plan wants nothing more of chunks that are not `busy`.
        """
        layers = np.arange(self.arrived.shape[1])
        wanted = ~self.arrived & (layers >= self.target[:, None])
        wanted[[*self.damaged, *busy]] = False
        for upper in self.bands:
            part = wanted & (layers < upper)
            if part.any():
                chunk = int(np.flatnonzero(part.any(axis=1))[-1])
                upper = int(np.flatnonzero(part[chunk])[-1]) + 1
                gaps = np.flatnonzero(~part[chunk, :upper])
                return chunk, upper, int(gaps[-1]) + 1 if len(gaps) else 0
        return None


class Decoder(Protocol):
    """Reads payloads: a `Coder`, or what stands for one."""

    def decode(self, header: ChunkHeader, entry: LayerEntry, payload: bytes) -> tuple[torch.Tensor, torch.Tensor]: ...


class Streamer:
    """Streams a prefix from the back: last chunk first, in each chunk the last layer first, down to its target.

    Two requests are under way at any time, or more where their bytes take less than a round trip and the reader do, so
    that the link does not idle in between.

    Args:
        store, manifest, coder: where and what is published, and how it is read.
        progress: shared with the computing path.
        rate: told of every byte that arrives.
        patience: asked for the seconds of silence after which the link counts as dead.
        check: called with a chunk and its header; raises `ChunkError` if the header does not fit the model.
        deliver: called with a chunk, a layer, its keys and its values `[heads, tokens, head_dim]`.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        coder: Decoder,
        progress: Progress,
        rate: LinkRate,
        patience: Callable[[], float],
        check: Callable[[int, ChunkHeader], None],
        deliver: Callable[..., None],
    ) -> None:
        self.store, self.manifest, self.coder = store, manifest, coder
        self.progress, self.rate, self.patience = progress, rate, patience
        self.check, self.deliver = check, deliver
        self.bytes_streamed, self.seconds = 0, 0.0
        self._headers: dict[int, asyncio.Task[ChunkHeader]] = {}
        self._last_arrival = 0.0
        self._wake, self._stop = _nothing, _nothing

    @contextlib.contextmanager
    def running(self, once: bool = False) -> Iterator[None]:
        """Stream in the background for as long as the block runs; afterwards no thread and no connection is left.

        Args:
            once: the plan will not change, so streaming ends when everything that it wants has come.
        """
        started = threading.Event()

        async def main() -> None:
            loop, plan_changed = asyncio.get_running_loop(), asyncio.Event()
            streaming = loop.create_task(self._stream(plan_changed, once))
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
                if thread is threading.current_thread():  # garbage is collected in any thread, this one too
                    break
                thread.join(timeout=0.1)
            self._wake, self._stop = _nothing, _nothing

    def wake(self) -> None:
        """Look at the plan again: it has changed."""
        with contextlib.suppress(RuntimeError):
            self._wake()

    async def _stream(self, plan_changed: asyncio.Event, once: bool) -> None:
        begin = self._last_arrival = time.monotonic()
        fetches: dict[asyncio.Task[None], int] = {}
        try:
            while True:
                plan_changed.clear()
                with self.progress.changed:
                    piece = self.progress.next_to_stream(fetches.values())
                if piece is not None and len(fetches) < self._most_requests(*piece):
                    self._last_arrival = time.monotonic()  # silence counts from a request on
                    fetches[asyncio.create_task(self._fetch(*piece))] = piece[0]
                    continue
                if not fetches:
                    if once:
                        return
                    self.rate.pause(time.monotonic())
                waker = asyncio.create_task(plan_changed.wait())
                await asyncio.wait({waker, *fetches}, return_when=asyncio.FIRST_COMPLETED)
                waker.cancel()
                for fetch in [fetch for fetch in fetches if fetch.done()]:
                    chunk = fetches.pop(fetch)
                    try:
                        fetch.result()
                    except ChunkError as error:
                        self._refuse(chunk, error)
                    self.seconds = time.monotonic() - begin
        except StoreError as error:
            logger.warning("streaming has stopped: %s", error)
            self._give_up(error)
        finally:
            left = [*fetches, *self._headers.values()]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def fewest_layers(self) -> float:
        """Layers of a chunk that requests have to ask for so that as many as there may be keep the link busy."""
        payloads = [size for chunk in self.manifest.chunks for size in chunk.payload_bytes]
        return max(1.0, self._under_way() * len(payloads) / (_REQUESTS[1] * max(1, sum(payloads))))

    def _under_way(self) -> float:
        """Bytes to have asked for and not yet read, so that the link does not wait."""
        return (self.rate.latency + _READER_SECONDS) * (self.rate.goodput(time.monotonic()) or 0.0)

    def _most_requests(self, chunk: int, upper: int, lower: int) -> int:
        start, stop = self.manifest.chunks[chunk].payload_span(upper, lower)
        least, most = _REQUESTS
        return max(least, min(most, 1 + math.ceil(self._under_way() / max(1, stop - start))))

    def _piece_bytes(self) -> int:
        least, most = _PIECE_BYTES
        return int(max(least, min(most, (self.rate.goodput(time.monotonic()) or 0.0) * _PIECE_SECONDS)))

    def _refuse(self, chunk: int, error: ChunkError) -> None:
        logger.warning("a published chunk is refused: %s", error)
        with self.progress.changed:
            self.progress.damaged.add(chunk)
            self.progress.changed.notify_all()

    def _give_up(self, error: StoreError) -> None:
        with self.progress.changed:
            self.progress.link_error = error
            self.progress.changed.notify_all()

    async def _fetch(self, chunk: int, upper: int, lower: int) -> None:
        """Stream layers `[lower, upper)` of a chunk, or fewer when its target rises meanwhile."""
        entry, progress, received = self.manifest.chunks[chunk], self.progress, bytearray()
        if chunk not in self._headers:
            # Asked for beside the payloads, not before them: no round trip is spent on it.
            self._headers[chunk] = asyncio.create_task(self._fetch_header(chunk))
        async with contextlib.aclosing(self._pieces(entry.address, *entry.payload_span(upper, lower))) as pieces:
            async for piece in pieces:
                received += piece
                upper = self._take_payloads(chunk, await self._headers[chunk], upper, received)
                with progress.changed:
                    if upper <= max(lower, int(progress.target[chunk])):
                        return
        raise ChunkError(f"chunk {chunk} ends early, in layer {upper - 1}")

    async def _fetch_header(self, chunk: int) -> ChunkHeader:
        entry, data = self.manifest.chunks[chunk], bytearray()
        async with contextlib.aclosing(self._pieces(entry.address, 0, entry.header_bytes)) as pieces:
            async for piece in pieces:
                data += piece
        if hashlib.sha256(data).hexdigest() != entry.header_sha256:
            raise ChunkError(f"the header of chunk {chunk} is not the one that was published")
        header = ChunkHeader.from_bytes(bytes(data))
        if [layer.length for layer in header.layers] != list(entry.payload_bytes):
            raise ChunkError(f"the header of chunk {chunk} contradicts its manifest")
        self.check(chunk, header)
        return header

    async def _pieces(self, address: str, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """Bytes `[start, stop)` of a chunk object as they arrive, as long as anything arrives on any request.

        Raises:
            StoreError: the link is silent for too long.
        """
        asked: float | None = time.monotonic()
        read = self.store.read(chunk_path(address), start, stop, self._piece_bytes())
        async with contextlib.aclosing(read) as pieces:
            while True:
                piece = asyncio.ensure_future(anext(pieces))
                try:
                    while not piece.done():
                        patience = self.patience()
                        left = self._last_arrival + patience - time.monotonic()
                        if left <= 0:
                            raise StoreError(f"not one byte from {self.store.uri} in {patience:.1f} seconds")
                        await asyncio.wait({piece}, timeout=left)
                finally:
                    if not piece.done():  # closing the iterator has to wait for the read that is under way
                        piece.cancel()
                        await asyncio.wait({piece})
                try:
                    data = piece.result()
                except StopAsyncIteration:
                    return
                self._last_arrival = time.monotonic()
                if asked is not None:
                    self.rate.answered(self._last_arrival - asked)
                    asked = None
                self.bytes_streamed += len(data)
                self.rate.observe(len(data), self._last_arrival)
                yield data

    def _take_payloads(self, chunk: int, header: ChunkHeader, upper: int, received: bytearray) -> int:
        """Decode every payload that has arrived whole; the lowest layer that is in place now."""
        while upper > 0 and len(received) >= (entry := header.layers[len(header.layers) - upper]).length:
            begin = time.monotonic()
            keys, values = self.coder.decode(header, entry, bytes(received[: entry.length]))
            self.rate.decoded(entry.length, time.monotonic() - begin)
            del received[: entry.length]
            self.deliver(chunk, entry.layer, keys, values)
            upper -= 1
            self.progress.note(chunk, upper, "streamed")
            if not received:
                break
        return upper
