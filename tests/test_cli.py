"""The `kvsched` command."""

from __future__ import annotations

import ast
from pathlib import Path

import platformdirs
import pytest
from typer.testing import CliRunner

from kvsched import cli, hub
from kvsched.errors import ModelNotFoundError
from kvsched.sparkv import serve

COMMAND = CliRunner()


@pytest.mark.parametrize("arguments", [["--help"], ["model", "--help"], ["serve", "--help"], ["profile", "--help"]])
def test_help_is_there(arguments: list[str]) -> None:
    result = COMMAND.invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_the_command_itself_imports_nothing_heavy() -> None:
    body = ast.parse(Path(cli.__file__).read_text()).body
    names = [node.names[0].name for node in body if isinstance(node, ast.Import)]
    names += [node.module or "" for node in body if isinstance(node, ast.ImportFrom)]
    light = {"__future__", "errors", "importlib.resources", "pathlib", "shlex", "sys", "typer", "typer.core", "typing"}
    assert set(names) == light


def test_fetch_prints_the_folder(tmp_path: Path) -> None:
    result = COMMAND.invoke(cli.app, ["model", "fetch", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}\n")


def test_fetch_shows_what_went_wrong_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str | None) -> None:
        raise ModelNotFoundError("no network: do this")

    monkeypatch.setattr(hub, "fetch_model", fail)
    result = COMMAND.invoke(cli.app, ["model", "fetch"])
    assert (result.exit_code, result.stderr) == (1, "kvsched: no network: do this\n")


def test_path_fails_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = COMMAND.invoke(cli.app, ["model", "path"])
    assert result.exit_code == 1
    assert "kvsched model fetch" in result.stderr
    hub._converted(hub.DEFAULT_MODEL).mkdir(parents=True)
    result = COMMAND.invoke(cli.app, ["model", "path"])
    assert (result.exit_code, result.stdout) == (0, f"{hub._converted(hub.DEFAULT_MODEL)}\n")


def test_serve_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Path, str, int]] = []
    monkeypatch.setattr(serve, "serve", lambda *arguments: called.append(arguments))
    result = COMMAND.invoke(cli.app, ["serve", str(tmp_path), "--host", "::1", "--port", "81"])
    assert (result.exit_code, called) == (0, [(tmp_path, "::1", 81)])


def test_serving_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    result = COMMAND.invoke(cli.app, ["serve", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "there is no folder" in result.stderr


def test_profile_measures_keeps_and_shows(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path))
    monkeypatch.setattr(hub, "load_model", lambda name: (tiny_model("qwen2"), None))
    result = COMMAND.invoke(cli.app, ["profile", "--chunk-tokens", "32"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "seconds to compute a chunk of 32 tokens"
    assert lines[1].split()[-2:] == ["layers", "tokens/s"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "256", "512", "1024"]
    assert len(list(tmp_path.rglob("*.json"))) == 1
