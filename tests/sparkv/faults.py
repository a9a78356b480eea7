"""A server that breaks the rules: raw sockets, one thread a connection, and whatever bytes a test wants to send."""

from __future__ import annotations

import contextlib
import gc
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from obstore.store import MemoryStore


@dataclass(frozen=True)
class Request:
    """A request as it came in: `start` and `stop` of the range, or of the whole object."""

    method: str
    path: str
    headers: str
    body: bytes | None
    start: int
    stop: int

    def honest(self) -> bytes:
        """What a correct server would answer."""
        if self.body is None:
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        part = self.body[self.start : self.stop]
        status = "200 OK"
        extra = "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
        if (self.start, self.stop) != (0, len(self.body)) or "range:" in self.headers.lower():
            status = "206 Partial Content"
            extra += f"Content-Range: bytes {self.start}-{self.start + len(part) - 1}/{len(self.body)}\r\n"
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(part)}\r\n{extra}\r\n".encode()
        return head + (b"" if self.method == "HEAD" else part)


Send = Callable[[bytes], None]
Answer = Callable[[Request, Send], None]
"""Gets a request and a function that sends bytes; the connection ends if it raises `EndConnection`."""


class EndConnection(Exception):
    """The server hangs up."""


def honest(request: Request, send: Send) -> None:
    """Answers as a correct server does."""
    send(request.honest())


FAULTS = ["killed", "silent", "truncated", "corrupted", "slow"]


class FailsAtByte:
    """An honest server until it has sent `byte` bytes, to all connections together; then it fails.

    Args:
        byte: the first that is not sent as it should be.
        fault: `killed`, every connection ends and so does every later one; `silent`, nothing is sent any more;
            `truncated`, this answer ends and later ones are whole; `corrupted`, one bit of this byte is wrong;
            `slow`, a byte now and then.

    Attributes:
        failed: whether that byte was reached.
        over: set it to end what is silent or slow.
    """

    def __init__(self, byte: int, fault: str) -> None:
        self.byte, self.fault = byte, fault
        self.failed, self.over = False, threading.Event()
        self._sent, self._lock = 0, threading.Lock()

    def __call__(self, request: Request, send: Send) -> None:
        whole = request.honest()
        with self._lock:
            good = self.byte - self._sent
            self._sent += len(whole)
            self.failed |= good < len(whole)
        if good >= len(whole) or (good < 0 and self.fault in ("truncated", "corrupted")):
            return send(whole)
        good = max(good, 0)
        if self.fault == "corrupted":
            return send(whole[:good] + bytes([whole[good] ^ 1 << self.byte % 8]) + whole[good + 1 :])
        send(whole[:good])
        if self.fault == "silent":
            self.over.wait(timeout=20)
        if self.fault == "slow":
            for byte in whole[good:]:
                if self.over.wait(timeout=0.05):
                    break
                send(bytes([byte]))
            return None
        raise EndConnection


@dataclass
class Faulty:
    """The files of `folder` on a loopback port, answered by `answer`.

    Attributes:
        url: where it listens.
        requests: everything that was asked.
        connections: how many were accepted.
        open: connections that the client has not closed.
        sent: bytes sent.
    """

    folder: Path
    answer: Answer = honest
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    sent: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self._lock, self._sockets = threading.Lock(), set[socket.socket]()

    @contextlib.contextmanager
    def running(self) -> Iterator[Faulty]:
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            acceptor = threading.Thread(target=self._accept, args=(listener,), name="faults")
            acceptor.start()
            try:
                yield self
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                acceptor.join()
                with self._lock:
                    for connection in self._sockets:
                        connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self.open += 1
                self._sockets.add(connection)
            threading.Thread(target=self._serve, args=(connection,), name="faults", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            received = b""
            while True:
                while b"\r\n\r\n" not in received:
                    data = connection.recv(65536)
                    if not data:
                        return
                    received += data
                head, received = received.split(b"\r\n\r\n", 1)
                request = self._read(head.decode())
                with self._lock:
                    self.requests.append(request)
                self.answer(request, lambda data: self._send(connection, data))
        except (EndConnection, OSError):
            return
        finally:
            with self._lock:
                self._sockets.discard(connection)
                self.open -= 1
            connection.close()

    def _send(self, connection: socket.socket, data: bytes) -> None:
        connection.sendall(data)
        with self._lock:
            self.sent += len(data)

    def expect_left(self) -> None:
        """Every connection is closed soon after the cache is gone, at the latest when it was idle for long enough, or
        with the next call to a store: what obstore drops of a cancelled request outside of Python it frees only then.
        """
        deadline = time.monotonic() + 30  # three times what a store's connections may idle
        while self.open:
            assert time.monotonic() < deadline, f"{self.open} connections were left open"
            gc.collect()  # an error and the frames that it came through refer to each other
            MemoryStore()
            time.sleep(0.02)

    def _read(self, head: str) -> Request:
        method, path, _ = head.split("\r\n")[0].split(" ")
        file = self.folder / path.lstrip("/")
        body = file.read_bytes() if file.is_file() else None
        start, stop = 0, len(body or b"")
        if asked := re.search(r"range: bytes=(\d+)-(\d+)", head, re.IGNORECASE):
            start, stop = int(asked[1]), min(int(asked[2]) + 1, stop)
        return Request(method, path, head, body, start, stop)
