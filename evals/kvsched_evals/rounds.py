"""Round trips, counted on the wire (target S9): a server that answers in rounds.

It holds back every answer until nobody has asked anything for a while, then gives all of them at once. What a client
asks without waiting for an answer comes in the same round, so rounds are round trips, whatever link and machine do.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

QUIET_SECONDS = 0.5


class Rounds:
    """The requests for the files of `folder`, as `"GET manifests"`: method and first part of the path, round by round.

    It is an ASGI application; `running()` serves it.
    """

    def __init__(self, folder: Path) -> None:
        self.rounds: list[list[str]] = []
        self._files = Starlette(routes=[Mount("/", StaticFiles(directory=folder))])
        self._waiting, self._latest = 0, 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self._waiting:
            self.rounds.append([])
        self.rounds[-1].append(f"{scope['method']} {scope['path'].split('/')[1]}")
        self._waiting, self._latest = self._waiting + 1, time.monotonic()
        while time.monotonic() - self._latest < QUIET_SECONDS:
            await asyncio.sleep(QUIET_SECONDS / 10)
        self._waiting -= 1
        await self._files(scope, receive, send)

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Answer on a free loopback port for as long as the block runs; yields the URL."""
        config = uvicorn.Config(self, port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, name="kvsched-rounds")
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

    def before_bytes_flow(self) -> dict[str, int]:
        """Round trips and requests before the first bytes of a chunk were asked for; all of them if none were."""
        rounds = self.rounds
        for index, asked in enumerate(rounds):
            if "GET chunks" in asked:
                rounds = rounds[:index]
                break
        return {"round_trips": len(rounds), "requests": sum(map(len, rounds))}
