"""The file that clusters lie in: aligned direct I/O, in batches, on a pool of threads.

The file has no name (or loses it right after it was made), so nothing stays behind however the process ends.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import FlashError

ALIGNMENT = 4096
"""Offsets, lengths and addresses in memory are multiples of this: a page, and no less than any device's sector."""

Request = tuple[int, memoryview]
"""Offset in the file and the page-aligned memory to read into or write from."""


@dataclass
class FlashCounters:
    """What was asked of the file so far."""

    reads: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


def aligned(size: int) -> int:
    """`size` rounded up to `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class FlashFile:
    """A nameless file in `directory`, read and written by `threads` threads.

    `direct` says whether the page cache is bypassed. File systems that refuse it (some network and overlay ones) are
    used through the page cache instead, which costs DRAM that no budget counts.

    Raises:
        FlashError: the directory is missing, not writable or full. Reading, writing and growing raise it too.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, threads: int) -> None:
        self.directory = Path(directory if directory is not None else tempfile.gettempdir())
        self.counters = FlashCounters()
        self.size = 0
        self._threads = threads
        self._closing = threading.Lock()
        self._fd, self.direct = self._open()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvsched-flash")

    def _open(self) -> tuple[int, bool]:
        try:
            for direct in (True, False):
                try:
                    return self._open_nameless(os.O_DIRECT if direct else 0), direct
                except OSError as error:
                    if not direct or error.errno != errno.EINVAL:
                        raise
        except OSError as error:
            raise self._error("create", error) from error
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _open_nameless(self, flags: int) -> int:
        flags |= os.O_RDWR | os.O_CLOEXEC
        try:
            fd = os.open(self.directory, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
            name = self.directory / f".kvsched-{os.getpid()}-{os.urandom(8).hex()}"
            fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600)
            name.unlink()
        try:
            # Some file systems accept O_DIRECT and refuse the first transfer.
            page = mmap.mmap(-1, ALIGNMENT)
            os.pwritev(fd, [page], 0)
            os.preadv(fd, [page], 0)
        except OSError:
            os.close(fd)
            raise
        return fd

    def reserve(self, size: int) -> None:
        """Have the device set aside `size` bytes now, so that it cannot turn out full in the middle of decoding."""
        if size <= self.size:
            return
        try:
            os.posix_fallocate(self._fd, self.size, size - self.size)
        except OSError as error:
            raise self._error("grow", error) from error
        self.size = size

    def read(self, requests: Sequence[Request]) -> list[Future[None]]:
        """Start reading; the memory is valid once `wait` returned."""
        self.counters.reads += len(requests)
        self.counters.bytes_read += sum(len(memory) for _, memory in requests)
        return self._submit(os.preadv, "read", requests)

    def write(self, requests: Sequence[Request]) -> list[Future[None]]:
        """Start writing; the memory must stay as it is until `wait` returned."""
        self.counters.bytes_written += sum(len(memory) for _, memory in requests)
        return self._submit(os.pwritev, "write", requests)

    @staticmethod
    def wait(futures: Sequence[Future[None]]) -> None:
        """Wait for all of `futures`, so that no thread still uses the memory, then raise what any of them raised."""
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """Give the file's space and the threads back. Calling it twice changes nothing."""
        with self._closing:
            if self._fd >= 0:
                self._pool.shutdown(wait=True, cancel_futures=True)
                os.close(self._fd)
                self._fd = -1

    def _submit(
        self, transfer: Callable[[int, list[memoryview], int], int], verb: str, requests: Sequence[Request]
    ) -> list[Future[None]]:
        if self._fd < 0:
            raise FlashError("the cache was closed and its file is gone. Make a new DynaKVCache.")
        workers = min(self._threads, len(requests))
        return [self._pool.submit(self._transfer, transfer, verb, requests[i::workers]) for i in range(workers)]

    def _transfer(
        self, transfer: Callable[[int, list[memoryview], int], int], verb: str, requests: Sequence[Request]
    ) -> None:
        for offset, memory in requests:
            try:
                done = transfer(self._fd, [memory], offset)
            except OSError as error:
                raise self._error(verb, error) from error
            if done != len(memory):
                raise FlashError(
                    f"{verb} of {len(memory)} bytes at {offset} of the cluster file in {self.directory} stopped after "
                    f"{done}. Check the device and its free space, or choose another directory."
                )

    def _error(self, verb: str, error: OSError) -> FlashError:
        fix = {
            errno.ENOSPC: "Free some space there, or choose a directory on another device.",
            errno.EDQUOT: "Free some space there, or choose a directory on another device.",
            errno.ENOENT: "Create it, or choose an existing directory.",
            errno.ENOTDIR: "Choose a directory, not a file.",
            errno.EACCES: "Choose a directory that you may write to.",
            errno.EPERM: "Choose a directory that you may write to.",
            errno.EROFS: "Choose a directory that you may write to.",
        }.get(error.errno or 0, "Check the device, or choose another directory.")
        reason = os.strerror(error.errno) if error.errno else str(error)
        return FlashError(f"cannot {verb} the cluster file in {self.directory}: {reason}. {fix}")
