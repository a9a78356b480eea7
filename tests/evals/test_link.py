"""The shaped link: that it is as slow as asked, no slower, and gone afterwards."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from kvsched.errors import ConfigError
from kvsched_evals.link import apart, shaped_link


class Source:
    """Answers every 8 bytes with as many bytes as they say; ends when its client does."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/base"
        self.received = 0
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.threads.append(threading.Thread(target=self._answer, args=(client,)))
            self.threads[-1].start()

    def _answer(self, client: socket.socket) -> None:
        with client:
            try:
                while request := client.recv(8):
                    self.received += len(request)
                    client.sendall(bytes(int.from_bytes(request, "big")))
            except OSError:
                return

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source()
    yield source
    source.close()


def connect(url: str) -> socket.socket:
    parts = urllib.parse.urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def ask(client: socket.socket, size: int) -> None:
    client.sendall(size.to_bytes(8, "big"))


def receive(client: socket.socket, size: int) -> None:
    while size:
        data = client.recv(min(size, 65536))
        assert data, f"the connection ended {size} bytes early"
        size -= len(data)


def fetch(client: socket.socket, size: int) -> float:
    """Seconds from asking for `size` bytes to having them all."""
    start = time.perf_counter()
    ask(client, size)
    receive(client, size)
    return time.perf_counter() - start


def takes(seconds: float, measure: Callable[[], float]) -> None:
    """Check what `measure()` returns, to 5 % or 20 ms. A busy machine may be late, so one of three in time will do; a
    link that is too fast is wrong at once."""
    tolerance = max(0.05 * seconds, 0.02)
    times = []
    for _ in range(3):
        times.append(measure())
        assert times[-1] > seconds - tolerance
        if times[-1] < seconds + tolerance:
            return
    pytest.fail(f"took {times} s, expected {seconds} s")


@pytest.mark.parametrize("mbit", [4, 16, 64])
def test_goodput_is_the_rate_asked_for(source: Source, mbit: int) -> None:
    size = int(mbit * 1e6 / 8 * 1.5)
    with shaped_link(source.url, mbit=mbit) as url, connect(url) as client:
        takes(1.5, lambda: fetch(client, size))


def test_short_transfers_are_shaped_too(source: Source) -> None:
    with shaped_link(source.url, mbit=4) as url, connect(url) as client:
        takes(0.1, lambda: fetch(client, 50_000))


def test_connections_share_the_link(source: Source) -> None:
    with (
        shaped_link(source.url, mbit=16) as url,
        connect(url) as one,
        connect(url) as two,
        ThreadPoolExecutor(2) as pool,
    ):

        def both() -> float:
            times = list(pool.map(fetch, (one, two), (1_000_000, 1_000_000)))
            assert min(times) > 0.7 * max(times), "neither goes first"
            return max(times)

        takes(1.0, both)


def test_the_round_trip_delays_and_does_not_limit(source: Source) -> None:
    with shaped_link(source.url, mbit=32, rtt_ms=200) as url:

        def first() -> float:
            with connect(url) as client:
                return fetch(client, 1)

        takes(0.4, first)  # a new connection costs one round trip more
        with connect(url) as client:
            fetch(client, 1)
            takes(0.2, lambda: fetch(client, 1))
            takes(1.2, lambda: fetch(client, 4_000_000))


def test_the_rate_changes_while_bytes_flow(source: Source) -> None:
    link = shaped_link(source.url, mbit=8)
    with link as url, connect(url) as client:

        def slow_then_fast() -> float:
            link.mbit = 8
            start = time.perf_counter()
            ask(client, 2_500_000)
            receive(client, 500_000)
            link.mbit = 32
            receive(client, 2_000_000)
            return time.perf_counter() - start

        takes(0.5 + 0.5 + 0.04, slow_then_fast)  # 50 ms were on their way at the old rate, and would take 12 at the new


def test_a_stalled_link_passes_nothing_and_then_goes_on(source: Source) -> None:
    link = shaped_link(source.url, mbit=8)
    with link as url, connect(url) as client:
        ask(client, 1_000_000)
        receive(client, 100_000)
        link.mbit = 0
        time.sleep(0.2)
        stalled_at = link.bytes_down
        time.sleep(0.3)
        assert link.bytes_down == stalled_at < 1_000_000
        link.mbit = 64
        receive(client, 900_000)


def test_bytes_and_connections_are_counted(source: Source) -> None:
    link = shaped_link(source.url, mbit=64)
    with link as url:
        assert urllib.parse.urlsplit(url).path == "/base"
        for size in (1000, 20_000):
            with connect(url) as client:
                fetch(client, size)
                fetch(client, 1)
    assert (link.connections, link.bytes_up, link.bytes_down) == (2, 4 * 8, 21_002)
    assert source.received == link.bytes_up


def test_an_end_is_passed_on_both_ways(source: Source) -> None:
    with shaped_link(source.url, mbit=64, rtt_ms=20) as url, connect(url) as client:
        ask(client, 100_000)
        client.shutdown(socket.SHUT_WR)
        receive(client, 100_000)
        assert client.recv(1) == b""


def test_a_server_that_is_gone_ends_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with shaped_link(target, mbit=8) as url, connect(url) as client, contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""


def test_the_end_is_clean_in_the_middle_of_a_transfer(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), shaped_link(source.url, mbit=1) as url:
        client = connect(url)
        ask(client, 10_000_000)
        receive(client, 1000)
        idle = connect(url)
    assert not [thread for thread in threading.enumerate() if thread.name == "kvsched-link"]
    assert caplog.text == "", "no task was left pending"
    with pytest.raises(ConnectionRefusedError):
        connect(url)
    client.close()
    idle.close()


@pytest.mark.parametrize(
    ("target", "numbers"),
    [
        ("127.0.0.1", {"mbit": 1}),
        ("http://host", {"mbit": 1}),
        ("http://host:1", {"mbit": -1}),
        ("http://host:1", {"mbit": 1, "rtt_ms": -1}),
    ],
)
def test_what_cannot_be_a_link_is_refused(target: str, numbers: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        shaped_link(target, **numbers)


def test_a_link_in_a_process_of_its_own_serves_and_is_gone_afterwards(source: Source) -> None:
    with apart(partial(shaped_link, source.url, mbit=100)) as url:
        assert urllib.parse.urlsplit(url).path == "/base"
        with connect(url) as client:
            fetch(client, 1000)
    with pytest.raises(ConnectionRefusedError):
        connect(url)


def test_what_a_process_of_its_own_refuses_is_raised_here() -> None:
    with pytest.raises(ConfigError, match="mbit=-1"), apart(partial(shaped_link, "http://127.0.0.1:1", mbit=-1)):
        pass
