"""A development server for a published folder: plain HTTP with byte ranges, read-only.

Any static web server or object store does the same in production.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StoreError

if TYPE_CHECKING:
    import uvicorn


def serve(directory: str | os.PathLike[str], host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve the files below `directory` until interrupted.

    Args:
        directory: the published folder.
        host: address to listen on; `0.0.0.0` lets other machines in.
        port: TCP port; 0 takes a free one.

    Raises:
        StoreError: there is no such folder, or the address cannot be listened on.
        ImportError: starlette or uvicorn is not installed.
    """
    server = _server(directory, log_level="info")
    listener = _listen(host, port)
    print(f"serving {Path(directory).resolve()} at {_url(listener)} (Ctrl+C stops)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after its own clean stop
        server.run(sockets=[listener])


@contextlib.contextmanager
def running(directory: str | os.PathLike[str]) -> Iterator[str]:
    """Serve `directory` from a thread on a free loopback port; yields the URL. Nothing is left after the block.

    Raises:
        StoreError: there is no such folder.
        ImportError: starlette or uvicorn is not installed.
    """
    server = _server(directory, log_level="warning")
    listener = _listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],), name="kvsched-serve")
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise StoreError(f"the server for {directory} ended before it accepted connections.")
            time.sleep(0.005)
        yield _url(listener)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _server(directory: str | os.PathLike[str], log_level: str) -> uvicorn.Server:
    try:
        import uvicorn
        from starlette.applications import Starlette
        from starlette.routing import Mount
        from starlette.staticfiles import StaticFiles
    except ImportError as error:
        raise ImportError(f"{error}. Serving a folder needs: pip install 'kvsched[serve]'.") from error
    if not Path(directory).is_dir():
        raise StoreError(f"there is no folder {directory} to serve. Publish into it first.")
    app = Starlette(routes=[Mount("/", StaticFiles(directory=directory))])
    # A client that keeps its connection open must not hold up the end: one second to finish what it is reading.
    return uvicorn.Server(uvicorn.Config(app, log_level=log_level, lifespan="off", timeout_graceful_shutdown=1))


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise StoreError(f"cannot listen on {host}:{port}: {error}. Choose another port, or 0 for any.") from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}"
