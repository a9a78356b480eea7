"""Linux's asynchronous I/O: the kernel moves a whole batch after one call, with no thread and no library.

A thread that reads has to be woken, and takes turns with whoever decodes at Python's lock; many small reads cost more
that way than on the device. It works on files that bypass the page cache; on others `io_submit` would block.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from .engine import Request

DEPTH = 128
"""Requests of a batch that are with the kernel at once; the next follow when somebody waits."""

_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Numbers of io_setup, io_destroy, io_getevents and io_submit."""

_PREAD, _PWRITE = 0, 1

_REQUEST = np.dtype(
    [
        *(("data", "u8"), ("key", "u4"), ("rw_flags", "u4"), ("opcode", "u2"), ("priority", "i2"), ("file", "u4")),
        *(("buffer", "u8"), ("nbytes", "u8"), ("offset", "i8"), ("reserved", "u8"), ("flags", "u4"), ("event", "u4")),
    ]
)
_EVENT = np.dtype([("data", "u8"), ("request", "u8"), ("result", "i8"), ("result2", "i8")])

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int) -> int:
    """A system call by name; it is repeated when a signal interrupts it.

    Raises:
        OSError: it failed, or this platform has none of that name.
    """
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        raise OSError(errno.ENOSYS, "no asynchronous I/O on this platform")
    number = _CALLS[platform.machine()][("io_setup", "io_destroy", "io_getevents", "io_submit").index(name)]
    while True:
        result = int(_libc.syscall(*map(ctypes.c_long, (number, *arguments))))
        if result >= 0:
            return result
        if (code := ctypes.get_errno()) != errno.EINTR:
            raise OSError(code, os.strerror(code))


class _Context:
    """A queue in the kernel, with the memory that requests and their results are exchanged in."""

    def __init__(self) -> None:
        number = ctypes.c_ulong(0)
        call("io_setup", DEPTH, ctypes.addressof(number))
        self.number = number.value
        self.requests = np.zeros(DEPTH, dtype=_REQUEST)
        self.pointers = self.requests.ctypes.data + np.arange(DEPTH, dtype=np.uint64) * _REQUEST.itemsize
        self.events = np.zeros(DEPTH, dtype=_EVENT)


class KernelEngine:
    """An `Engine` that leaves the work to the kernel.

    Raises:
        OSError: the platform has no such calls, or does not let this process use them.
    """

    def __init__(self) -> None:
        self._contexts = [_Context()]
        self._idle = self._contexts.copy()

    def start(self, fd: int, requests: Sequence[Request], write: bool) -> KernelTransfer:
        """See `Engine`."""
        if not self._idle:
            self._contexts.append(_Context())
            self._idle.append(self._contexts[-1])
        return KernelTransfer(self._idle.pop(), self._idle, fd, requests, write)

    def close(self) -> None:
        """See `Engine`."""
        for context in self._contexts:
            with contextlib.suppress(OSError):  # a forked process does not have its parent's queues
                call("io_destroy", context.number)  # which waits for what is under way
        self._contexts = []


class KernelTransfer:
    """A batch that the kernel works on.

    Args:
        context: its queue, which goes back to `idle` at the end.
    """

    def __init__(
        self, context: _Context, idle: list[_Context], fd: int, requests: Sequence[Request], write: bool
    ) -> None:
        self._context, self._idle, self._fd = context, idle, fd
        self._opcode = _PWRITE if write else _PREAD
        self._requests = list(requests)
        self._done = [0] * len(self._requests)
        self._waiting = deque(range(len(self._requests)))
        self._flying = 0
        self._errors: list[OSError] = []
        self._started = self._ended = time.perf_counter()
        self._submit()
        if not self._flying:
            self._end()

    @property
    def seconds(self) -> float:
        """See `Transfer`; what ended before anybody waited counts up to the wait."""
        return self._ended - self._started

    def wait(self) -> None:
        """See `Transfer`."""
        while self._flying:
            self._reap()
            self._submit()
            if not self._flying:
                self._end()
        if self._errors:
            raise self._errors[0]

    def _submit(self) -> None:
        """Hand over what fits in the queue. A request that is refused becomes an error of the batch."""
        context = self._context
        while self._waiting and self._flying < DEPTH:
            batch = [self._waiting[i] for i in range(min(len(self._waiting), DEPTH - self._flying))]
            filled = context.requests[: len(batch)]
            memory = [self._requests[i][1][self._done[i] :] for i in batch]
            filled["data"], filled["opcode"], filled["file"] = batch, self._opcode, self._fd
            filled["buffer"] = [ctypes.addressof(ctypes.c_char.from_buffer(part)) for part in memory]
            filled["nbytes"] = [len(part) for part in memory]
            filled["offset"] = [self._requests[i][0] + self._done[i] for i in batch]
            try:
                taken = call("io_submit", context.number, len(batch), context.pointers.ctypes.data)
            except OSError as error:
                if error.errno == errno.EAGAIN and self._flying:
                    return
                self._errors.append(error)
                self._waiting.popleft()
                continue
            self._flying += taken
            for _ in range(taken):
                self._waiting.popleft()

    def _reap(self) -> None:
        """Wait for at least one request to end. What moved less than it was asked to is asked for the rest."""
        context = self._context
        ended = call("io_getevents", context.number, 1, DEPTH, context.events.ctypes.data, 0)
        self._flying -= ended
        for number, moved in zip(*(context.events[name][:ended].tolist() for name in ("data", "result")), strict=True):
            offset, memory = self._requests[number]
            if moved > 0:
                self._done[number] += moved
                if self._done[number] < len(memory):
                    self._waiting.append(number)
            elif moved == 0:
                stopped = f"{len(memory)} bytes at {offset} stopped after {self._done[number]}"
                self._errors.append(OSError(errno.EIO, stopped))
            else:
                self._errors.append(OSError(-moved, os.strerror(-moved)))

    def _end(self) -> None:
        self._ended = time.perf_counter()
        self._requests = []
        self._idle.append(self._context)
