"""A slow network link shaped by the kernel, where one is root: a server in a network namespace behind `tc`."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import typer

_BENCHMARKS = ipaddress.ip_network("198.18.0.0/15")  # no host of any network has these addresses (RFC 2544)
_PORT = 8000
_BURST_SECONDS = 0.01  # of the rate may pass at once
_LEAST_BURST = 5000  # bytes, for slow links: the largest packets have to fit
_QUEUE_SECONDS = 1.0  # that a packet may wait before it is dropped
_START_SECONDS = 60.0


class Namespace:
    """A network namespace that is reached over one shaped link.

    ```python
    with Namespace() as namespace, namespace.serving("/srv/chunks") as url:
        namespace.shape(mbit=8)  # what the server sends passes at that rate from now on
    ```

    Unlike the relay (`link.py`) it has real packets, queues and congestion control, but no round trip of its own.

    Raises:
        typer.BadParameter: this is not Linux, one is not root, or `ip` or `tc` is not installed.
        subprocess.CalledProcessError: the kernel refuses a namespace, a link or its shaping.
    """

    def __init__(self) -> None:
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        if not hasattr(os, "geteuid") or os.geteuid() != 0 or missing:
            raise typer.BadParameter(
                "links shaped by the kernel need Linux, root, and ip and tc (Debian's iproute2): use --shaper relay."
            )
        # Names of interfaces hold 15 characters; processes side by side get networks of their own.
        number = os.getpid()
        self.name, self._outer, self._inner = f"kvsched-{number}", f"kvs{number}o", f"kvs{number}i"
        first = 4 * number % _BENCHMARKS.num_addresses
        self._here, self.host = str(_BENCHMARKS[first + 1]), str(_BENCHMARKS[first + 2])

    def __enter__(self) -> Namespace:
        _run("ip", "netns", "add", self.name)
        try:
            _run("ip", "link", "add", self._outer, "type", "veth", "peer", "name", self._inner, "netns", self.name)
            _run("ip", "addr", "add", f"{self._here}/30", "dev", self._outer)
            _run("ip", "link", "set", self._outer, "up")
            self._inside("ip", "addr", "add", f"{self.host}/30", "dev", self._inner)
            self._inside("ip", "link", "set", self._inner, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # With the namespace the link would go too, but some time later: its name would still be taken.
        with contextlib.suppress(subprocess.CalledProcessError):
            _run("ip", "link", "delete", self._outer)
        _run("ip", "netns", "delete", self.name)

    def shape(self, mbit: float) -> None:
        """Let what the namespace sends pass at `mbit` (10^6 bit/s, above 0) from now on."""
        rate = mbit * 1e6 / 8
        burst = max(int(rate * _BURST_SECONDS), _LEAST_BURST)
        tbf = [
            "tbf",
            "rate",
            f"{int(mbit * 1e6)}bit",
            "burst",
            f"{burst}b",
            "latency",
            f"{int(_QUEUE_SECONDS * 1e3)}ms",
        ]
        self._inside("tc", "qdisc", "replace", "dev", self._inner, "root", *tbf)

    @contextlib.contextmanager
    def serving(self, folder: str | os.PathLike[str]) -> Iterator[str]:
        """Serve `folder` from inside; yields the URL.

        Raises:
            typer.BadParameter: the server does not answer.
        """
        serve = f"from kvsched.sparkv.serve import serve; serve({str(folder)!r}, {self.host!r}, {_PORT})"
        command = ["ip", "netns", "exec", self.name, sys.executable, "-c", serve]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._wait_for(server)
            yield f"http://{self.host}:{_PORT}"
        finally:
            server.terminate()
            server.wait()

    def _wait_for(self, server: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection((self.host, _PORT), timeout=1):
                return
            time.sleep(0.05)
        raise typer.BadParameter("the server in the network namespace does not answer: use --shaper relay.")

    def _inside(self, *command: str) -> None:
        _run("ip", "netns", "exec", self.name, *command)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
