from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest

from kvsched.errors import StoreError
from kvsched.sparkv.serve import running
from kvsched.sparkv.store import Store

DATA = bytes(range(256)) * 2000


async def collect(store: Store, path: str, start: int, stop: int) -> bytes:
    return b"".join([piece async for piece in store.read(path, start, stop)])


@pytest.fixture(params=["folder", "file", "http"])
def store(request: pytest.FixtureRequest, tmp_path: Path):
    Store(tmp_path).put("a/b.bin", DATA)
    with contextlib.ExitStack() as stack:
        uri = {"folder": lambda: tmp_path, "file": lambda: f"file://{tmp_path}"}.get(
            request.param, lambda: stack.enter_context(running(tmp_path))
        )()
        yield Store(uri)


def test_existence_whole_objects_and_ranges(store: Store) -> None:
    assert store.wait(store.exists(["a/b.bin", "a/c.bin"])) == [True, False]
    assert store.wait(store.get("a/b.bin", 1 << 20)) == DATA
    assert store.wait(collect(store, "a/b.bin", 1000, 400_000)) == DATA[1000:400_000]


def test_what_is_not_there_is_an_error(store: Store) -> None:
    with pytest.raises(StoreError, match=r"a/c\.bin"):
        store.wait(store.get("a/c.bin", 9))
    with pytest.raises(StoreError):
        store.wait(collect(store, "a/c.bin", 0, 10))


def test_waiting_works_inside_a_running_event_loop(store: Store) -> None:
    """As in a notebook's cell."""

    async def cell() -> list[bool]:
        return store.wait(store.exists(["a/b.bin"]))

    assert asyncio.run(cell()) == [True]


@pytest.mark.parametrize("uri", ["foo://x", "/does/not/exist", "file:///does/not/exist"])
def test_a_store_that_cannot_be_opened(uri: str) -> None:
    with pytest.raises(StoreError, match="Give a folder that exists"):
        Store(uri)


def test_a_server_that_is_not_there_is_given_up() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    store = Store(f"http://127.0.0.1:{port}", connect_timeout=2)
    with pytest.raises(StoreError, match="cannot read from"):
        store.wait(store.exists(["x"]))
    assert time.monotonic() - begin < 10


def test_a_server_that_accepts_and_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        store = Store(f"http://127.0.0.1:{mute.getsockname()[1]}", connect_timeout=0.5)
        begin = time.monotonic()
        with pytest.raises(StoreError, match="no answer within"):
            store.wait(store.get("x", 9))
        assert time.monotonic() - begin < 5


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "chunks"
    blocked.write_text("a file where a folder is needed")
    with pytest.raises(StoreError, match="cannot write"):
        Store(tmp_path).put("chunks/aa/x.kv", b"data")


def test_all_existence_checks_are_in_flight_at_once() -> None:
    """A server that answers nobody until everybody has asked: one round trip, or none of them gets an answer."""
    paths, asked = [f"p{i}" for i in range(8)], threading.Barrier(8)

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.recv(4096)
            asked.wait(timeout=5)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        threads = []

        def accept() -> None:
            for _ in paths:
                threads.append(threading.Thread(target=answer, args=(server.accept()[0],)))
                threads[-1].start()

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        store = Store(f"http://127.0.0.1:{server.getsockname()[1]}", connect_timeout=10)
        assert store.wait(store.exists(paths)) == [False] * 8
        acceptor.join()
        for thread in threads:
            thread.join()
