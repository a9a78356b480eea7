"""Objects in a folder, behind an HTTP server or in S3: a thin asynchronous view of `obstore` with our errors."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from ..config import SparKVConfig
from ..errors import ConfigError, StoreError

# A stalled read is found out by whoever reads, so the client's own limit on a whole response is put out of the way.
_NO_LIMIT = "1 day"
# A connection on which nothing was asked for that long is closed, at the latest twice that long after the last answer.
# Usually it goes with the store; but obstore lets go of Python objects at times only in its next call.
_IDLE = "5 seconds"
_READ_BYTES = 64 * 1024
_IN_FLIGHT = 64
_Result = TypeVar("_Result")


class StoredObject(NamedTuple):
    """What a listing says of an object."""

    path: str
    size: int
    modified: datetime


class Store:
    """Where published chunks live.

    Args:
        uri: a folder, `file:///folder`, `http(s)://host/path` or `s3://bucket/path`. S3's credentials, region and
            endpoint come from the environment: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`,
            `AWS_ENDPOINT_URL`, and so on.
        connect_timeout: seconds after which a server that does not answer is given up.
        writable: for publishing: a folder is created if need be, and an HTTP server refused.
        token: sent to an HTTP server as `Authorization: Bearer`, never to one that it redirects to.
        certificate: a PEM file of certificate authorities to trust beside the system's.

    Raises:
        ConfigError: a token for a store that is not behind HTTP, or a certificate that cannot be read.
        StoreError: the URI is not understood, names a folder that does not exist, or cannot be written.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        connect_timeout: float = 5.0,
        writable: bool = False,
        token: str | None = None,
        certificate: str | os.PathLike[str] | None = None,
    ) -> None:
        self.uri, self.connect_timeout = os.fspath(uri), connect_timeout
        is_http = self.uri.startswith(("http://", "https://"))
        if token is not None and not is_http:
            raise ConfigError(f"a token is for HTTP stores; {self.uri!r} is none.")
        if writable and is_http:
            raise StoreError(
                f"{self.uri!r} cannot be written: HTTP stores are read-only. Publish into the folder or the bucket "
                "that this server serves."
            )
        is_local = "://" not in self.uri or self.uri.startswith("file://")
        client_options = _client_options(connect_timeout, token, certificate)
        try:
            if is_local:
                self._store: Any = LocalStore(Path(self.uri.removeprefix("file://")).absolute(), mkdir=writable)
            else:
                self._store = from_url(
                    self.uri,
                    client_options=client_options,
                    retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=connect_timeout)},
                )
        except (BaseError, ValueError, OSError) as error:
            raise StoreError(
                f"cannot open the store {self.uri!r}: {_first_line(error)}. Give a folder that exists, or "
                "file:///folder, http(s)://host/path or s3://bucket/path."
            ) from error

    @classmethod
    def of(cls, config: SparKVConfig, writable: bool = False) -> Store:
        """The store that a configuration names.

        Raises:
            ConfigError: it names none.
        """
        if config.store is None:
            raise ConfigError('sparkv needs a store: SparKVConfig(store="file:///folder"), or {"store": ...}.')
        return cls(config.store, config.stall_timeout, writable, config.token, config.certificate)

    async def exists(self, paths: Iterable[str]) -> list[bool]:
        """Whether each object is there; 64 are asked for at a time, so as many take one round trip.

        Raises:
            StoreError: the store does not answer.
        """
        turn = asyncio.Semaphore(_IN_FLIGHT)

        async def exists(path: str) -> bool:
            try:
                async with turn:
                    await self._patiently(obstore.head_async(self._store, path))
            except FileNotFoundError:
                return False
            return True

        return await asyncio.gather(*map(exists, paths))

    async def get(self, path: str, limit: int) -> bytes:
        """A whole small object.

        Args:
            limit: bytes above which it is refused, before they are read.

        Raises:
            StoreError: it is not there or too large, or the store does not answer.
        """

        async def whole() -> bytes:
            answer, data = await obstore.get_async(self._store, path), bytearray()
            if answer.meta["size"] <= limit:
                async for piece in answer.stream(min_chunk_size=_READ_BYTES):
                    data += piece
                return bytes(data)
            raise StoreError(f"{path} in {self.uri} has {answer.meta['size']} bytes: {limit} are allowed")

        try:
            return await self._patiently(whole())
        except FileNotFoundError as error:
            raise StoreError(f"{path} is not in {self.uri}") from error

    async def read(
        self, path: str, start: int, stop: int, piece_bytes: int = _READ_BYTES
    ) -> AsyncGenerator[bytes, None]:
        """Bytes `[start, stop)` of an object as they arrive, in pieces of `piece_bytes` or somewhat more; closing the
        iterator ends the request.

        Raises:
            StoreError: it is not there, the store breaks off, or sends other bytes than those asked for.
        """
        try:
            answer = await obstore.get_async(self._store, path, options={"range": (start, stop)})
            async for piece in answer.stream(min_chunk_size=piece_bytes):
                yield bytes(piece)
        except (BaseError, OSError) as error:
            raise self._error(error) from _released(error)

    def put(self, path: str, data: bytes, overwrite: bool = True) -> bool:
        """Write an object whole or not at all; `False` if it was there and is not to be overwritten.

        Raises:
            StoreError: it cannot be written.
        """
        try:
            obstore.put(self._store, path, data, mode="overwrite" if overwrite else "create", use_multipart=False)
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise StoreError(f"cannot write to the store {self.uri}: {_first_line(error)}") from error
        return True

    def list_objects(self, folder: str) -> list[StoredObject]:
        """Every object below `folder`.

        Raises:
            StoreError: the store cannot be listed; HTTP servers cannot.
        """
        try:
            pages = obstore.list(self._store, folder)
            return [StoredObject(item["path"], item["size"], item["last_modified"]) for page in pages for item in page]
        except (BaseError, OSError) as error:
            raise StoreError(f"cannot list the store {self.uri}: {_first_line(error)}") from error

    def delete(self, paths: Sequence[str]) -> None:
        """Delete objects; one that is gone already is no error.

        Raises:
            StoreError: one cannot be deleted.
        """
        try:
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, paths)  # in bulk where the store can
                return
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self._store, path)
        except (BaseError, OSError) as error:
            raise StoreError(f"cannot delete from the store {self.uri}: {_first_line(error)}") from error

    @staticmethod
    def wait(work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of asynchronous work, from code that is not: also where an event loop runs already (Jupyter)."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvsched-store") as thread:
            return thread.submit(asyncio.run, work).result()

    async def _patiently(self, request: Any) -> Any:
        try:
            return await asyncio.wait_for(request, self.connect_timeout)
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise FileNotFoundError(str(error)) from _released(error)
        except (BaseError, OSError, asyncio.TimeoutError) as error:
            raise self._error(error) from _released(error)

    def _error(self, error: Exception) -> StoreError:
        reason = _first_line(error) or f"no answer within {self.connect_timeout} seconds"
        return StoreError(f"cannot read from the store {self.uri}: {reason}")


def _client_options(connect_timeout: float, token: str | None, certificate: str | os.PathLike[str] | None) -> Any:
    options: dict[str, Any] = {
        "connect_timeout": f"{connect_timeout} seconds",
        "timeout": _NO_LIMIT,
        "allow_http": True,
    }
    if token is not None:
        options["default_headers"] = {"Authorization": f"Bearer {token}"}
    if certificate is not None:
        try:
            options["root_certificate"] = Path(certificate).read_bytes()
        except OSError as error:
            raise ConfigError(f"certificate={os.fspath(certificate)!r} cannot be read: {error}.") from error
    return options


def _released(error: Exception) -> Exception:
    """The error without its frames: obstore may hold on to it until its next call, and the frames hold the store, and
    the store its connections.
    """
    return error.with_traceback(None)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
