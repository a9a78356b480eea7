"""The ways in which operations run on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvsched_kernels import dispatch
from kvsched_kernels.cpu import attention, gather, scores, select, tokens


@pytest.fixture(params=["torch", "compiled", "interpreted"])
def path(request, monkeypatch) -> Iterator[str]:
    """Plain torch or NumPy, what Numba compiles, and that interpreted, where an index outside its array raises."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "_numba", lambda: False)
    elif request.param == "interpreted":
        for module in (attention, gather, scores, select, tokens):
            for name, function in vars(module).copy().items():
                if hasattr(function, "py_func"):
                    monkeypatch.setattr(module, name, function.py_func)
    with np.errstate(all="ignore"):  # compiled code says nothing either
        yield request.param
