"""The file that clusters lie in: aligned direct I/O, in batches.

The file has no name (or loses it right after it was made), so nothing stays behind however the process ends.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FlashError
from .aio import KernelEngine
from .engine import Engine, Request, ThreadEngine, Transfer

SECTOR = 512
"""The smallest alignment that a device may have."""

PAGE = 4096
"""The largest; memory that is mapped begins on a multiple of it."""


@dataclass
class FlashCounters:
    """What was asked of the file so far."""

    reads: int = 0
    bytes_read: int = 0
    writes: int = 0
    bytes_written: int = 0


class Buffer:
    """Memory for transfers that is used again and again.

    Attributes:
        memory: its bytes, beginning at a page.
    """

    def __init__(self, size: int) -> None:
        self.memory = memoryview(mmap.mmap(-1, size))


class FlashFile:
    """A nameless file in `directory`, read and written by the kernel itself or, where it cannot, by `threads` threads.

    `direct` says whether the page cache is bypassed. File systems that refuse it (some network and overlay ones) are
    used through the page cache instead, which costs DRAM that no budget counts. Offsets, lengths and addresses in
    memory must be multiples of `alignment`, which is tried out.

    Raises:
        FlashError: the directory is missing, not writable or full. Reading, writing and growing raise it too.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, threads: int) -> None:
        self.directory = Path(directory if directory is not None else tempfile.gettempdir())
        self.counters = FlashCounters()
        self.size = 0
        self._closing = threading.Lock()
        self._fd, self.direct, self.alignment = self._open()
        self._engine = self._fastest(threads)

    def _open(self) -> tuple[int, bool, int]:
        try:
            for direct in (True, False):
                try:
                    fd, alignment = self._open_nameless(os.O_DIRECT if direct else 0)
                    return fd, direct, alignment
                except OSError as error:
                    if not direct or error.errno != errno.EINVAL:
                        raise
        except OSError as error:
            raise self._error("create", error) from error
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _fastest(self, threads: int) -> Engine:
        if self.direct:
            with contextlib.suppress(OSError):  # sandboxes forbid it, and other systems do not have it
                return KernelEngine()
        return ThreadEngine(threads)

    def _open_nameless(self, flags: int) -> tuple[int, int]:
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
            return fd, self._probe(fd)
        except OSError:
            os.close(fd)
            raise

    @staticmethod
    def _probe(fd: int) -> int:
        """The smallest alignment that transfers work with. Some file systems take O_DIRECT and refuse all of them."""
        page = memoryview(mmap.mmap(-1, 2 * PAGE))
        size = SECTOR
        while True:
            try:
                for transfer in (os.pwritev, os.preadv):
                    transfer(fd, [page[size : 2 * size]], size)
                return size
            except OSError as error:
                if error.errno != errno.EINVAL or size == PAGE:
                    raise
                size *= 2

    def reserve(self, size: int) -> None:
        """Have the device set aside `size` bytes now, so that it cannot turn out full in the middle of decoding."""
        if size <= self.size:
            return
        try:
            os.posix_fallocate(self._fd, self.size, size - self.size)
        except OSError as error:
            raise self._error("grow", error) from error
        self.size = size

    def read(self, requests: Sequence[Request]) -> Transfer:
        """Start reading; the memory is valid once `wait` returned."""
        self.counters.reads += len(requests)
        self.counters.bytes_read += sum(len(memory) for _, memory in requests)
        return self._start(requests, write=False)

    def write(self, requests: Sequence[Request]) -> Transfer:
        """Start writing; the memory must stay as it is until `wait` returned."""
        self.counters.writes += len(requests)
        self.counters.bytes_written += sum(len(memory) for _, memory in requests)
        return self._start(requests, write=True)

    def wait(self, transfer: Transfer) -> None:
        """Wait for all of `transfer`, so that nothing still uses its memory, then raise what any part of it raised."""
        try:
            transfer.wait()
        except OSError as error:
            raise self._error("read or write", error) from error

    def close(self) -> None:
        """Give the file's space and the threads back. Calling it twice changes nothing."""
        with self._closing:
            if self._fd >= 0:
                self._engine.close()
                os.close(self._fd)
                self._fd = -1

    def _start(self, requests: Sequence[Request], write: bool) -> Transfer:
        if self._fd < 0:
            raise FlashError("the cache was closed and its file is gone. Make a new DynaKVCache.")
        try:
            return self._engine.start(self._fd, requests, write)
        except OSError as error:
            raise self._error("read or write", error) from error

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
        reason = error.strerror or str(error)
        return FlashError(f"cannot {verb} the cluster file in {self.directory}: {reason}. {fix}")
