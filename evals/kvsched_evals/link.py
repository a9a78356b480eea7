"""A slow network link on loopback, without privileges: a TCP relay that shapes what it passes on.

It models one serial link that all connections share. Bytes towards the client leave one after another at the link's
rate and arrive half a round trip later; bytes towards the server are only delayed. The round trip delays bytes and
never limits how many are under way, as a TCP window long since opened would not.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from types import TracebackType

from kvsched.errors import ConfigError

_PIECE_SECONDS = 0.005  # pieces are read so large that each holds the link this long
_PIECE_BYTES = (1460, 65536)  # but never smaller than a TCP segment, nor larger than one read
_AHEAD_SECONDS = 0.05  # how far ahead pieces are scheduled: what a late wake-up may cost without losing rate
_QUEUED = 1024  # pieces under way on one connection before its sender is held back

_Pieces = asyncio.Queue[tuple[float, bytes]]  # when each is due, on the loop's clock; an empty piece ends the stream


class shaped_link:  # lower case because it is read as a verb: `with shaped_link(...) as url`
    """A relay to `target` with the rate and the round-trip time of a slow link.

    ```python
    link = shaped_link("http://127.0.0.1:8000", mbit=8, rtt_ms=50)
    with link as url:  # use url as you would target
        link.mbit = 0  # the link stalls; takes effect within about 50 ms
    ```

    Args:
        target: URL of the server behind the link.
        mbit: rate towards the client in 10^6 bit/s, shared by all connections; 0 lets nothing through.
        rtt_ms: round-trip time in milliseconds, half of it each way. Opening a connection costs one more, as in TCP.

    Attributes:
        bytes_down: bytes handed to clients so far.
        bytes_up: bytes handed to the server so far.
        connections: connections accepted so far.

    Raises:
        ConfigError: `target` has no host and port, or a number is negative.
    """

    def __init__(self, target: str, *, mbit: float, rtt_ms: float = 0.0) -> None:
        self._target = urllib.parse.urlsplit(target)
        if self._target.hostname is None or self._target.port is None:
            raise ConfigError(f"{target!r} is no target: write a URL with host and port, as http://127.0.0.1:8000.")
        if rtt_ms < 0:
            raise ConfigError(f"rtt_ms={rtt_ms!r}: it must be at least 0.")
        self.mbit = mbit
        self.bytes_down = 0
        self.bytes_up = 0
        self.connections = 0
        self._rtt = rtt_ms / 1000
        self._free_at = 0.0  # when the last scheduled byte will have left the link, on the loop's clock

    @property
    def mbit(self) -> float:
        """Rate towards the client in 10^6 bit/s; may be set at any time, from any thread."""
        return self._mbit

    @mbit.setter
    def mbit(self, rate: float) -> None:
        if rate < 0:
            raise ConfigError(f"mbit={rate!r}: it must be at least 0.")
        self._mbit = rate

    def __enter__(self) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._turn = asyncio.Lock()  # served in the order of asking: no connection goes first
        self._thread = threading.Thread(target=self._run, args=(listener,), name="kvsched-link")
        self._thread.start()
        return self._target._replace(netloc=f"127.0.0.1:{listener.getsockname()[1]}").geturl()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self, listener: socket.socket) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._accept(listener))
        self._loop.close()

    async def _accept(self, listener: socket.socket) -> None:
        relays: set[asyncio.Task[None]] = set()

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            relay = asyncio.create_task(self._relay(reader, writer))
            relays.add(relay)
            relay.add_done_callback(relays.discard)

        server = await asyncio.start_server(accepted, sock=listener)
        await self._stop.wait()
        server.close()
        for relay in relays:
            relay.cancel()
        await asyncio.gather(*relays, return_exceptions=True)

    async def _relay(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """Pass bytes both ways until both sides have ended theirs, or either has broken off."""
        opened_at = self._loop.time() + self._rtt
        writers, flows = [to_client], []
        try:
            from_server, to_server = await asyncio.open_connection(self._target.hostname, self._target.port)
            writers.append(to_server)
            up, down = _Pieces(_QUEUED), _Pieces(_QUEUED)
            flows += [
                asyncio.create_task(self._delay_up(from_client, up, opened_at)),
                asyncio.create_task(self._shape_down(from_server, down)),
                asyncio.create_task(self._deliver(up, to_server, upwards=True)),
                asyncio.create_task(self._deliver(down, to_client, upwards=False)),
            ]
            await asyncio.gather(*flows)
        except BaseException as error:
            for writer in writers:
                writer.transport.abort()  # what is left unsent has no reader any more
            if not isinstance(error, OSError):  # one side broke off, as real peers do
                raise
        finally:
            for flow in flows:
                flow.cancel()
            await asyncio.gather(*flows, return_exceptions=True)
            for writer in writers:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def _delay_up(self, reader: asyncio.StreamReader, pieces: _Pieces, opened_at: float) -> None:
        while data := await reader.read(_PIECE_BYTES[1]):
            await pieces.put((max(self._loop.time(), opened_at) + self._rtt / 2, data))
        await pieces.put((self._loop.time() + self._rtt / 2, b""))

    async def _shape_down(self, reader: asyncio.StreamReader, pieces: _Pieces) -> None:
        while data := await reader.read(self._piece_bytes()):
            async with self._turn:
                # Waiting for the backlog alone, not for each piece to leave, lets a late wake-up be made good.
                while not (rate := self._mbit * 1e6 / 8) or self._free_at - self._loop.time() > _AHEAD_SECONDS:
                    await asyncio.sleep(_PIECE_SECONDS)
                self._free_at = max(self._free_at, self._loop.time()) + len(data) / rate
                due = self._free_at + self._rtt / 2
            await pieces.put((due, data))
        await pieces.put((max(self._free_at, self._loop.time()) + self._rtt / 2, b""))

    def _piece_bytes(self) -> int:
        smallest, largest = _PIECE_BYTES
        return min(max(int(self._mbit * 1e6 / 8 * _PIECE_SECONDS), smallest), largest)

    async def _deliver(self, pieces: _Pieces, writer: asyncio.StreamWriter, *, upwards: bool) -> None:
        while True:
            due, data = await pieces.get()
            await asyncio.sleep(due - self._loop.time())
            if not data:
                writer.write_eof()
                return
            if upwards:
                self.bytes_up += len(data)
            else:
                self.bytes_down += len(data)
            writer.write(data)
            await writer.drain()


@contextlib.contextmanager
def apart(enter: Callable[[], AbstractContextManager[str]]) -> Iterator[str]:
    """Run a server or a link in a process of its own, as it would on another machine: yields its URL.

    In the client's process its threads would contend with the client's for the interpreter: fast links would be slow.

    Args:
        enter: makes the context manager whose value is the URL; has to be picklable.

    Raises:
        ConfigError, StoreError: as `enter` does in its process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "kvsched.sparkv.serve"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(enter, theirs), name="kvsched-apart", daemon=True)
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
        if isinstance(answer, Exception):
            raise answer
        yield answer
    finally:
        ours.close()  # the other side ends when it can no longer be heard
        process.join()


def _hold(enter: Callable[[], AbstractContextManager[str]], client: Connection) -> None:
    try:
        with enter() as url:
            client.send(url)
            with contextlib.suppress(EOFError):
                client.recv()
    except Exception as error:
        client.send(error)
