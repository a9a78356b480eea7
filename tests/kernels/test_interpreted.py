"""Starts the tests of the Triton kernels in a process of their own, where Triton interprets them on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_kernels_equal_their_references_under_the_interpreter() -> None:
    module = Path(__file__).parent / "interpreted" / "kernels.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", module],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},  # read when a kernel is defined
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
