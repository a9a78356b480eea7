"""The wire: tokens, certificates, S3, round trips and connections; and servers that break the rules."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import logging
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from faults import Answer, EndConnection, Faulty, Request, Send, honest
from moto.server import ThreadedMotoServer
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

import kvsched
from kvsched.errors import ConfigError, StoreError
from kvsched.sparkv.gc import collect
from kvsched.sparkv.store import Store
from kvsched_evals.link import shaped_link

CHUNK, TOKENS, ANSWER = 16, 96, 6
OPTIONS = {"codec": "lossless", "chunk_tokens": CHUNK}
IDS = torch.randint(1, 256, (1, TOKENS + 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_record_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest keeps every record that is logged, with the error in it and all that the error refers to."""
    for name in ("kvsched", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)


@pytest.fixture(scope="module")
def published(tiny_model, tmp_path_factory) -> tuple[object, Path]:
    """A model, and a folder with the six chunks of `IDS`."""
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("published")
    kvsched.publish(model, IDS, store=folder, config=OPTIONS)
    return model, folder


def load(model, store: str, **options: object) -> kvsched.SparKVCache:
    """A cache that has loaded `IDS`; whatever the store did, the model goes on from it as from a full prefill."""
    cache = kvsched.SparKVCache(model.config, store=store, **OPTIONS, **options)
    cache.load(model, IDS)
    with torch.no_grad():
        logits = model(IDS[:, cache.get_seq_length() :], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, -1], model(IDS).logits[:, -1], atol=1e-4, rtol=0)
    return cache


def expect_streamed(cache: kvsched.SparKVCache) -> None:
    report = cache.report()
    assert report.fallback is None and report.loaded_tokens == TOKENS and set(report.depths) == {0}


# Tokens and certificates.


def needs_token(request: Request, send: Send) -> None:
    allowed = "authorization: bearer the-token" in request.headers.lower()
    send(request.honest() if allowed else b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")


def test_a_token_opens_the_store(published) -> None:
    model, folder = published
    with Faulty(folder, needs_token).running() as server:
        expect_streamed(load(model, server.url, token="the-token", planner="stream"))
        assert "credentials" in str(load(model, server.url, token="another").report().fallback)
        assert "credentials" in str(load(model, server.url).report().fallback)


def test_a_token_is_not_sent_to_another_host_and_not_shown(
    published, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = published
    monkeypatch.setattr(logging.getLogger("kvsched"), "disabled", False)
    with Faulty(folder).running() as other:

        def elsewhere(request: Request, send: Send) -> None:
            send(f"HTTP/1.1 302 Found\r\nLocation: {other.url}{request.path}\r\nContent-Length: 0\r\n\r\n".encode())

        with Faulty(folder, elsewhere).running() as server, caplog.at_level(0):
            cache = load(model, server.url, token="the-token", tenant_secret="the tenant's secret")
            assert all("the-token" in request.headers for request in server.requests) and server.requests
            assert other.requests and not any("the-token" in request.headers for request in other.requests)
    shown = f"{cache.options!r} {cache.report()!r} {cache._store!r} {cache._store.__dict__!r} {caplog.text}"
    assert "the-token" not in shown and "the tenant's secret" not in shown


@pytest.mark.parametrize(
    "bad", [{"token": 7}, {"token": "gr\nim"}, {"tenant_secret": "grim"}, {"tenant_secret": b"grim"}]
)
def test_a_secret_that_is_refused_is_not_shown(bad: dict) -> None:
    with pytest.raises(ConfigError) as error:
        kvsched.SparKVConfig(**bad)
    assert "grim" not in str(error.value) and "7" not in str(error.value) and next(iter(bad)) in str(error.value)


def test_a_token_for_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for HTTP stores"):
        Store(tmp_path, token="x")


@contextlib.contextmanager
def tls_server(folder: Path, at: Path) -> Iterator[tuple[str, Path]]:
    """`folder` behind https on loopback; the URL and the certificate of the authority that vouches for it."""
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.timezone.utc)

    def certificate(name: str, public_key, *extensions: x509.ExtensionType) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")]))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=True)
        return builder.sign(authority_key, hashes.SHA256())

    authority = certificate("authority", authority_key.public_key(), x509.BasicConstraints(ca=True, path_length=0))
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    server_certificate = certificate("server", key.public_key(), loopback)
    pem = serialization.Encoding.PEM
    (at / "authority.pem").write_bytes(authority.public_bytes(pem))
    (at / "server.pem").write_bytes(server_certificate.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (at / "server.key").write_bytes(private)
    config = uvicorn.Config(
        Starlette(routes=[Mount("/", StaticFiles(directory=folder))]),
        port=0,
        log_level="critical",
        lifespan="off",
        ssl_keyfile=at / "server.key",
        ssl_certfile=at / "server.pem",
        ssl_version=ssl.PROTOCOL_TLS_SERVER,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"https://127.0.0.1:{port}", at / "authority.pem"
    finally:
        server.should_exit = True
        thread.join()


def test_tls_with_an_authority_of_ones_own(published, tmp_path: Path) -> None:
    model, folder = published
    with tls_server(folder, tmp_path) as (url, authority):
        expect_streamed(load(model, url, certificate=authority, planner="stream"))
        assert load(model, url).report().loaded_tokens == 0  # the system does not know this authority
    with pytest.raises(ConfigError, match="cannot be read"):
        Store(url, certificate=tmp_path / "none.pem")
    with pytest.raises(StoreError, match="cannot open"):
        Store(url, certificate=tmp_path / "server.key")


# S3.


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT"), timeout=30).close()
    yield "s3://bucket/some/path"
    server.stop()


def test_s3_publish_load_append_and_collect(published, bucket: str) -> None:
    model, _ = published
    config = {**OPTIONS, "store": bucket}
    assert kvsched.publish(model, IDS[:, :48], config=config).chunks_written == 3
    assert kvsched.publish(model, IDS, config=config).chunks_written == 3
    assert kvsched.publish(model, IDS, config=config).bytes_written == 0
    expect_streamed(load(model, bucket, planner="stream"))
    report = collect(Store(bucket), max_bytes=1)
    assert (report.manifests, report.chunks, report.bytes_kept) == (6, 6, 0)
    assert load(model, bucket).report().loaded_tokens == 0


# Round trips and connections.


def test_a_miss_costs_one_round_trip_and_a_hit_two(published) -> None:
    """Nothing is answered before everything that is to be asked at once has been: requests come in these rounds."""
    model, folder = published
    for tokens, rounds in ((IDS, [ANSWER, 1]), (IDS + 1, [ANSWER])):
        gate, seen = threading.Condition(), []

        def answer(request: Request, send: Send, gate=gate, seen=seen, rounds=rounds) -> None:
            with gate:
                seen.append(request)
                gate.notify_all()
                if "manifests" in request.path:
                    due = ANSWER if request.method == "HEAD" else sum(rounds)
                    assert gate.wait_for(lambda: len(seen) >= due, timeout=5)
            send(request.honest())

        with Faulty(folder, answer).running() as server:
            cache = kvsched.SparKVCache(model.config, store=server.url, planner="stream", **OPTIONS)
            cache.load(model, tokens % 256)
        kinds = [f"{request.method} {request.path.split('/')[1]}" for request in seen]
        assert kinds[:ANSWER] == ["HEAD manifests"] * ANSWER
        assert kinds[ANSWER : ANSWER + 2] == (["GET manifests", "GET chunks"] if len(rounds) == 2 else [])


def test_on_a_slow_link_a_miss_and_a_hit_take_as_long_as_their_round_trips(published) -> None:
    """At 200 ms of round trip: one to open the connections, one for a miss, two for a hit, then one to first bytes."""
    model, folder = published
    with Faulty(folder).running() as server, shaped_link(server.url, mbit=1000, rtt_ms=200) as url:
        options = {**OPTIONS, "store": url, "planner": "stream"}
        miss, hit = kvsched.SparKVCache(model.config, options), kvsched.SparKVCache(model.config, options)
        begin = time.monotonic()
        miss.load(model, (IDS + 1) % 256)
        assert 0.4 <= time.monotonic() - begin < 0.6
        first_bytes = []

        def note(request: Request, send: Send) -> None:
            if "chunks" in request.path:
                first_bytes.append(time.monotonic())
            send(request.honest())

        server.answer = note
        begin = time.monotonic()
        hit.load(model, IDS)
        assert 0.7 <= first_bytes[0] - begin < 0.9  # opened, asked, fetched, and half a round trip to arrive here


def test_connections_are_used_again(published) -> None:
    model, folder = published
    with Faulty(folder).running() as server:
        expect_streamed(cache := load(model, server.url, planner="stream"))
        assert len(server.requests) > 2 * ANSWER and server.connections <= ANSWER
        del cache
        server.expect_left()


# Servers that break the rules.


def status(line: str, where: str = "") -> Answer:
    def answer(request: Request, send: Send) -> None:
        if where in request.path:
            send(f"HTTP/1.1 {line}\r\nContent-Length: 0\r\n\r\n".encode())
        else:
            send(request.honest())

    return answer


def of_chunks(change) -> Answer:
    """An honest server whose answers for chunks are changed; `None` ends the connection after them."""

    def answer(request: Request, send: Send) -> None:
        if "chunks" not in request.path:
            return send(request.honest())
        send(change(request))
        raise EndConnection

    return answer


def redirected_to_itself(request: Request, send: Send) -> None:
    send(f"HTTP/1.1 302 Found\r\nLocation: {request.path}\r\nContent-Length: 0\r\n\r\n".encode())


def without_ranges(request: Request) -> bytes:
    assert request.body is not None
    head = "HTTP/1.1 200 OK\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
    return f"{head}Content-Length: {len(request.body)}\r\n\r\n".encode() + request.body


def length_off_by(more: int):
    def change(request: Request) -> bytes:
        size = request.stop - request.start
        return request.honest().replace(f"Content-Length: {size}".encode(), f"Content-Length: {size + more}".encode())

    return change


def dribble(request: Request, send: Send) -> None:
    """Slow loris: a byte now and then, for ever."""
    if "chunks" not in request.path:
        return send(request.honest())
    for byte in request.honest():
        send(bytes([byte]))
        time.sleep(0.05)


FAULTS: dict[str, Answer] = {
    "500 everywhere": status("500 Internal Server Error"),
    "500 for the manifest": status("500 Internal Server Error", "manifests"),
    "500 for chunks": status("500 Internal Server Error", "chunks"),
    "403 everywhere": status("403 Forbidden"),
    "403 for chunks": status("403 Forbidden", "chunks"),
    "404 for chunks": status("404 Not Found", "chunks"),
    "416 for chunks": status("416 Range Not Satisfiable", "chunks"),
    "redirects for ever": redirected_to_itself,
    "garbage": lambda request, send: send(b"\x00\xff no HTTP at all\r\n\r\n"),
    "hangs up": lambda request, send: (_ for _ in ()).throw(EndConnection),
    "garbage for chunks": of_chunks(lambda request: b"\x16\x03\x01 what is this\r\n\r\n" * 9),
    "zeros for chunks": of_chunks(lambda request: request.honest()[:-3000] + bytes(3000)),
    "ignores ranges": of_chunks(without_ranges),
    "another range": of_chunks(lambda request: request.honest().replace(b"bytes 0-", b"bytes 1-")),
    "content-length too long": of_chunks(length_off_by(1)),
    "content-length too short": of_chunks(length_off_by(-1)),
    "content-length much too short": of_chunks(length_off_by(-3000)),
    "slow loris": dribble,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_server_costs_a_local_computation_at_most(published, fault: str) -> None:
    model, folder = published
    before = set(threading.enumerate())
    with Faulty(folder, FAULTS[fault]).running() as server:
        begin = time.monotonic()
        cache = load(model, server.url, planner="stream", stall_timeout=0.5)
        assert time.monotonic() - begin < 10
        assert cache.report().fallback is not None
        del cache
        server.expect_left()
    deadline = time.monotonic() + 2
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, f"left: {left}"
        time.sleep(0.01)


def test_a_server_that_ignores_ranges_gives_no_wrong_byte(tmp_path: Path) -> None:
    (tmp_path / "chunks").write_bytes(bytes(range(256)) * 40)

    async def collected(store: Store) -> bytes:
        return b"".join([piece async for piece in store.read("chunks", 1000, 2000)])

    ignores_ranges = Faulty(tmp_path, of_chunks(without_ranges))
    with ignores_ranges.running(), pytest.raises(StoreError, match="Range request not supported"):
        Store.wait(collected(Store(ignores_ranges.url)))


def test_a_huge_manifest_is_refused_before_it_is_read(published) -> None:
    model, folder = published
    sent = 0

    def answer(request: Request, send: Send) -> None:
        nonlocal sent
        if request.method == "HEAD":
            return send(request.honest())
        send(b"HTTP/1.1 200 OK\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n")
        send(b"Content-Length: 104857600\r\n\r\n")
        for _ in range(100):
            send(bytes(1 << 20))
            sent += 1

    with Faulty(folder, answer).running() as server:
        report = load(model, server.url).report()
        assert report.loaded_tokens == 0 and "104857600 bytes" in str(report.fallback)
        server.expect_left()
    assert sent < 20


def test_the_faulty_server_is_right_when_nothing_is_wrong(published) -> None:
    model, folder = published
    with Faulty(folder, honest).running() as server:
        expect_streamed(load(model, server.url, planner="stream"))
