"""What the C library keeps of freed memory, which no budget counts."""

from __future__ import annotations

import contextlib
import ctypes

_trim = None
with contextlib.suppress(OSError, AttributeError):  # only glibc has it
    _trim = ctypes.CDLL(None).malloc_trim


def give_back() -> None:
    """Return freed memory to the system, where the C library is glibc.

    It keeps up to twice the largest block that was ever freed, and all pages between blocks in use: after the
    temporaries of a prompt's chunk that is more than a small budget.
    """
    if _trim is not None:
        _trim(0)
