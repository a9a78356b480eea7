"""Operations of many small steps, compiled for the CPU by Numba at their first call and kept compiled on disk.

Torch needs a call for every step and memory for every number in between; for the few numbers of one decoding step that
takes longer than the arithmetic. Numba brings its compiler along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """Compile for the CPU. Sums may be taken in any order, so that they run in vector registers; NaN and infinity keep
    their meaning."""
    options: Any = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder to keep it in: every process compiles it anew
        return numba.njit(**options)(function)
