from __future__ import annotations

import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import typer

from kvsched_evals.namespace import Namespace

BYTES = 1_500_000  # a second and a half at 8 Mbit/s


def can_be_made() -> bool:
    """Whether namespaces and shaped links are allowed here; in a container root alone is not enough."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        return False
    try:
        with Namespace() as namespace:
            namespace.shape(1)
    except subprocess.CalledProcessError:
        return False
    return True


def test_a_server_in_a_namespace_is_as_slow_as_asked_or_refused(tmp_path: Path) -> None:
    """Where the kernel shapes no links the error has to name the way out; where it does, they are slow and leave."""
    if not can_be_made():
        with pytest.raises((typer.BadParameter, subprocess.CalledProcessError)), Namespace() as namespace:
            namespace.shape(1)
        return
    (tmp_path / "object").write_bytes(os.urandom(BYTES))
    with Namespace() as namespace, namespace.serving(tmp_path) as url:
        name = namespace.name
        assert name in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
        for mbit in (8, 80):
            namespace.shape(mbit)
            begin = time.monotonic()
            with urllib.request.urlopen(f"{url}/object") as answer:
                assert len(answer.read()) == BYTES
            assert time.monotonic() - begin > 0.9 * BYTES * 8e-6 / mbit
    assert name not in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout


def test_without_root_the_relay_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(typer.BadParameter, match="--shaper relay"):
        Namespace()
