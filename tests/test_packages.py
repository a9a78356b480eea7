"""Fetching packages: what a client that is missing or fails leaves a user with. `test_hub` has pip doing its work."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kvsched import packages
from kvsched.errors import PackageError


def test_npm_is_asked_for_one_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    packages.npm_pack("@scope/name@1.0", tmp_path)
    assert asked[0][:2] == ["/bin/npm", "pack"]
    assert asked[0][-2:] == [f"--pack-destination={tmp_path}", "@scope/name@1.0"]


def test_no_npm_and_a_failing_one_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(PackageError, match="install Node"):
        packages.npm_pack("name@1.0", tmp_path)
    monkeypatch.setattr(packages.shutil, "which", lambda name: name)
    failed = subprocess.CompletedProcess([], 1, "", "npm error notarget\nnpm error no such version\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(PackageError, match=r"`npm pack name@1.0` failed: npm error no such version"):
        packages.npm_pack("name@1.0", tmp_path)
