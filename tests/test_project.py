"""The checkout as a whole: what is installed, what its folders must not hide, and that its files agree."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kvsched import DynaKVConfig, SparKVConfig
from kvsched.config import CacheConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMAND = Path(sys.executable).with_name("kvsched")


def test_our_kernels_folder_does_not_hide_hugging_faces_kernels() -> None:
    code = "import kernels, kvsched_kernels; kernels.get_kernel; print(kernels.__file__, kvsched_kernels.__file__)"
    for path in (str(ROOT), ""):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        theirs, ours = map(Path, done.stdout.split())
        assert "site-packages" in theirs.parts
        assert ours == ROOT / "kernels" / "kvsched_kernels" / "__init__.py"


@pytest.mark.parametrize("folder", ["kernels", "evals"])
def test_folders_with_other_peoples_names_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize(("file", "config"), [("sparkv", SparKVConfig), ("dynakv", DynaKVConfig)])
def test_the_presets_load_and_are_the_defaults(file: str, config: type[CacheConfig]) -> None:
    assert config.from_yaml(ROOT / "configs" / "caches" / f"{file}.yaml") == config()


def test_the_constraints_satisfy_every_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras["serve"], *extras["dev"]]):
        name = requirement.name.lower().replace("_", "-")
        if requirement.marker is None or requirement.marker.evaluate():
            assert name in pinned, f"{name} is installed by CI and not pinned"
            assert pinned[name] in requirement.specifier, f"{name}=={pinned[name]} is outside {requirement.specifier}"


def test_the_makefile_asks_for_the_pinned_torch() -> None:
    pinned = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned[0] in (ROOT / "Makefile").read_text().split()


def test_make_lists_its_targets() -> None:
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  make ([\w-]+)", shown, re.MULTILINE) == [
        "help",
        "setup",
        "model",
        "eval-data",
        "kvpress",
        "demo",
        "test",
        "lint",
        "bench",
        "bench-codec",
        "bench-dynakv",
        "bench-sparkv",
        "bench-kernels",
    ]


def test_the_console_script_serves_a_folder_until_interrupted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    with subprocess.Popen([COMMAND, "serve", tmp_path, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        url = re.search(r"http://\S+", said)
        assert url is not None
        # the socket listens before the line is printed, so this waits for the answer and is not refused
        with urllib.request.urlopen(f"{url[0]}/file", timeout=30) as response:
            assert response.read() == b"content"
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
