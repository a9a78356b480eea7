"""Objects in a folder, behind an HTTP server or in S3: a thin asynchronous view of `obstore` with our errors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from ..errors import StoreError

# A stalled read is found out by whoever reads, so the client's own limit on a whole response is put out of the way.
_NO_LIMIT = "1 day"
_READ_BYTES = 64 * 1024
_Result = TypeVar("_Result")


class Store:
    """Where published chunks live.

    Args:
        uri: a folder, `file:///folder`, `http(s)://host/path` or `s3://bucket/path`.
        connect_timeout: seconds after which a server that does not answer is given up.

    Raises:
        StoreError: the URI is not understood, or names a folder that does not exist (`create` makes it).
    """

    def __init__(self, uri: str | os.PathLike[str], connect_timeout: float = 5.0, create: bool = False) -> None:
        self.uri, self.connect_timeout = os.fspath(uri), connect_timeout
        is_local = "://" not in self.uri or self.uri.startswith("file://")
        try:
            if is_local:
                self._store: Any = LocalStore(Path(self.uri.removeprefix("file://")).absolute(), mkdir=create)
            else:
                self._store = from_url(
                    self.uri,
                    client_options={
                        "connect_timeout": f"{connect_timeout} seconds",
                        "timeout": _NO_LIMIT,
                        "allow_http": True,
                    },
                    retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=connect_timeout)},
                )
        except (BaseError, ValueError, OSError) as error:
            raise StoreError(
                f"cannot open the store {self.uri!r}: {_first_line(error)}. Give a folder that exists, or "
                "file:///folder, http(s)://host/path or s3://bucket/path."
            ) from error

    async def exists(self, paths: Iterable[str]) -> list[bool]:
        """Whether each object is there; all are asked at once, so it takes one round trip.

        Raises:
            StoreError: the store does not answer.
        """
        return await asyncio.gather(*map(self._exists, paths))

    async def _exists(self, path: str) -> bool:
        try:
            await self._patiently(obstore.head_async(self._store, path))
        except FileNotFoundError:
            return False
        return True

    async def get(self, path: str) -> bytes:
        """A whole small object.

        Raises:
            StoreError: it is not there, or the store does not answer.
        """

        async def whole() -> bytes:
            return bytes(await (await obstore.get_async(self._store, path)).bytes_async())

        try:
            return await self._patiently(whole())
        except FileNotFoundError as error:
            raise StoreError(f"{path} is not in {self.uri}") from error

    async def read(self, path: str, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """Bytes `[start, stop)` of an object, in pieces as they arrive; closing the iterator ends the request.

        Raises:
            StoreError: it is not there, or the store breaks off.
        """
        try:
            answer = await obstore.get_async(self._store, path, options={"range": (start, stop)})
            async for piece in answer.stream(min_chunk_size=_READ_BYTES):
                yield bytes(piece)
        except (BaseError, OSError) as error:
            raise self._error(error) from error

    def put(self, path: str, data: bytes) -> None:
        """Write an object whole or not at all.

        Raises:
            StoreError: it cannot be written.
        """
        try:
            obstore.put(self._store, path, data)
        except (BaseError, OSError) as error:
            raise StoreError(f"cannot write to the store {self.uri}: {_first_line(error)}") from error

    @staticmethod
    def wait(work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of asynchronous work, from code that is not: also where an event loop runs already (Jupyter)."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvsched-store") as thread:
            return thread.submit(asyncio.run, work).result()

    async def _patiently(self, request: Any) -> Any:
        try:
            return await asyncio.wait_for(request, self.connect_timeout)
        except FileNotFoundError:
            raise
        except (BaseError, OSError, asyncio.TimeoutError) as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> StoreError:
        reason = _first_line(error) or f"no answer within {self.connect_timeout} seconds"
        return StoreError(f"cannot read from the store {self.uri}: {reason}")


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
