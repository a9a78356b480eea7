"""How batches of reads and writes reach the device. Another engine (io_uring, NIXL) is one more class of this form.

The paper reads by io_uring. Here the kernel's older asynchronous calls do the same without a library (`aio`); threads
stand in where there are none.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

Request = tuple[int, memoryview]
"""Offset in the file and the memory to read into or write from, both aligned as the file asks."""


class Transfer(Protocol):
    """A batch under way."""

    def wait(self) -> None:
        """Return when no part of the batch uses its memory any more.

        Raises:
            OSError: a part of it failed or stopped early.
        """

    @property
    def seconds(self) -> float:
        """From start to end, once `wait` returned."""


class Engine(Protocol):
    """Starts batches. Memory belongs to the engine until `wait` of the batch returned."""

    def start(self, fd: int, requests: Sequence[Request], write: bool) -> Transfer:
        """Begin to move all of `requests`, in any order."""

    def close(self) -> None:
        """Finish what is under way and give threads and other means back."""


class ThreadEngine:
    """Blocking calls on a pool of threads: `depth` of them are in flight at once."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._pool = ThreadPoolExecutor(depth, thread_name_prefix="kvsched-flash")

    def start(self, fd: int, requests: Sequence[Request], write: bool) -> Transfer:
        """See `Engine`."""
        batch = ThreadTransfer(fd, requests, write)
        for _ in range(min(self._depth, len(requests))):
            self._pool.submit(batch.work)
        return batch

    def close(self) -> None:
        """See `Engine`."""
        self._pool.shutdown(wait=True)


class ThreadTransfer:
    """Requests that several threads, and whoever waits, take one after the other."""

    def __init__(self, fd: int, requests: Sequence[Request], write: bool) -> None:
        self._fd, self._move = fd, os.pwritev if write else os.preadv
        self._requests = list(requests)
        self._left = len(self._requests)
        self._errors: list[OSError] = []
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._started = self._ended = time.perf_counter()
        if not self._requests:
            self._finished.set()

    @property
    def seconds(self) -> float:
        """See `Transfer`."""
        return self._ended - self._started

    def work(self) -> None:
        """Move requests until none is left to begin."""
        while True:
            with self._lock:
                if not self._requests:
                    return
                offset, memory = self._requests.pop()
            error = None
            try:
                self._move_all(offset, memory)
            except OSError as caught:
                error = caught
            with self._lock:
                if error is not None:
                    self._errors.append(error)
                self._left -= 1
                if self._left == 0:
                    self._ended = time.perf_counter()
                    self._finished.set()

    def wait(self) -> None:
        """See `Transfer`."""
        self.work()
        self._finished.wait()
        if self._errors:
            raise self._errors[0]

    def _move_all(self, offset: int, memory: memoryview) -> None:
        # A call may move less than it was asked to, as when a signal arrives: the rest is asked for again.
        done = 0
        while done < len(memory):
            moved = self._move(self._fd, [memory[done:]], offset + done)
            if moved <= 0:
                raise OSError(errno.EIO, f"{len(memory)} bytes at {offset} stopped after {done}")
            done += moved
