"""The development server: what a store asks of it, what it must not give away, and that nothing of it stays."""

from __future__ import annotations

import http.client
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvsched.errors import StoreError
from kvsched.sparkv.serve import running, serve

BODY = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    published = tmp_path / "published"
    (published / "deep").mkdir(parents=True)
    (published / "deep" / "chunk").write_bytes(BODY)
    (tmp_path / "secret").write_text("not published")
    (published / "link").symlink_to(tmp_path / "secret")
    return published


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    with running(folder) as url:
        yield urllib.parse.urlsplit(url).netloc


def request(address: str, method: str, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def test_a_whole_file(address: str) -> None:
    status, headers, body = request(address, "GET", "/deep/chunk")
    assert (status, body) == (200, BODY)
    assert headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("0-0", 0, 0),
        ("100-299", 100, 299),
        ("10000-", 10000, 10239),
        ("-5", 10235, 10239),
        ("10000-99999", 10000, 10239),
    ],
)
def test_a_range_of_bytes(address: str, asked: str, first: int, last: int) -> None:
    status, headers, body = request(address, "GET", "/deep/chunk", Range=f"bytes={asked}")
    assert (status, body) == (206, BODY[first : last + 1])
    assert headers["content-range"] == f"bytes {first}-{last}/{len(BODY)}"


def test_a_range_behind_the_end_is_refused(address: str) -> None:
    assert request(address, "GET", "/deep/chunk", Range="bytes=20000-20010")[0] == 416


def test_head_tells_the_size_alone(address: str) -> None:
    status, headers, body = request(address, "HEAD", "/deep/chunk")
    assert (status, headers["content-length"], body) == (200, str(len(BODY)), b"")


@pytest.mark.parametrize(
    "path", ["/none", "/deep", "/", "/../secret", "/deep/../../secret", "/%2e%2e/secret", "//etc/passwd", "/link"]
)
def test_nothing_but_files_inside_the_folder(address: str, path: str) -> None:
    status, _, body = request(address, "GET", path)
    assert status == 404
    assert b"not published" not in body


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE"])
def test_nothing_can_be_changed(address: str, folder: Path, method: str) -> None:
    assert request(address, method, "/deep/chunk")[0] == 405
    assert (folder / "deep" / "chunk").read_bytes() == BODY


def test_the_end_leaves_no_thread_and_no_socket_even_with_a_client_connected(folder: Path) -> None:
    before = set(threading.enumerate())
    with running(folder) as url:
        host, port = urllib.parse.urlsplit(url).netloc.split(":")
        client = http.client.HTTPConnection(host, int(port), timeout=5)
        client.request("GET", "/deep/chunk")
        assert client.getresponse().read() == BODY  # and the connection stays open
    deadline = time.monotonic() + 2  # the server's workers are told to end and do so on their own
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, f"threads outlived the server: {left}"
        time.sleep(0.01)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=1)
    client.close()


def test_an_error_inside_the_block_ends_the_server_too(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), running(folder):
        raise RuntimeError("mine")
    assert not [thread for thread in threading.enumerate() if thread.name == "kvsched-serve"]


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no folder"), running(tmp_path / "none"):
        pass


def test_a_port_in_use_is_named(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StoreError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve(folder, port=port)


def test_without_the_extra_the_error_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"pip install 'kvsched\[serve\]'"):
        serve(folder)
