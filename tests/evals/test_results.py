"""Result files: resumed line by line, and refused unless whole, of this version and of the same run."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from kvsched_evals.results import Cell, Header, Question, ResultError, ResultFile, read

CELL = Cell("smoke", "niah", 1024, "full", None, None, None, 0)
HEADER = Header(
    version=version("kvsched"),
    suite="smoke",
    command="kvsched eval run smoke",
    model="m",
    seeds=[0],
    cells=[CELL],
    machine={},
)


def question(number: int, **changes: Any) -> Question:
    fields: dict[str, Any] = {
        **dataclasses.asdict(CELL),
        "question": str(number),
        "metric": "acc",
        "score": 1.0,
        "prompt_tokens": 900,
        "answer_tokens": 1,
        "answer": "7",
        "logprob": [-0.5],
        "full_logprob": [-0.5],
        "kl": [0.0],
        "equal_prefix": 1,
        "prefill_seconds": 2.0,
        "seconds": 1.0,
        "bytes_read": 0,
        "dram_bytes": 100,
        "joules": None,
    }
    return Question(**{**fields, **changes})


def write(path: Path, *questions: Question) -> Path:
    file = ResultFile(path, HEADER)
    for one in questions:
        file.append(one)
    file.finish()
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "folder" / "smoke.jsonl", question(0), question(1, score=0.25, answer="ü\n"))
    found = read(path)
    assert found.header == HEADER
    assert found.questions == [question(0), question(1, score=0.25, answer="ü\n")]
    assert found.questions[0].cell == CELL


def test_cut_off_anywhere_it_is_refused_and_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "smoke.jsonl", question(0), question(1))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ResultError):
            read(path)
    cuts = [0, 5, *(i + k for i, byte in enumerate(whole) if byte == ord("\n") for k in (0, 1, 7))]
    for length in cuts:
        path.write_bytes(whole[:length])
        file = ResultFile(path, HEADER)
        kept = len(file.questions)
        assert file.questions == [question(0), question(1)][:kept]
        for one in [question(0), question(1)][kept:]:
            file.append(one)
        file.finish()
        assert path.read_bytes() == whole


def test_another_run_does_not_go_on_with_it(tmp_path: Path) -> None:
    path = write(tmp_path / "smoke.jsonl", question(0))
    whole = path.read_bytes()
    differing = (
        {"version": "0.0.1"},
        {"command": "another"},
        {"model": "n"},
        {"seeds": [1]},
        {"cells": []},
    )
    for changes in differing:
        with pytest.raises(ResultError, match=f"another {next(iter(changes))}"):
            ResultFile(path, HEADER.model_copy(update=changes))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("finished", [True, False])
def test_another_limit_goes_on_unless_more_is_there_already(tmp_path: Path, finished: bool) -> None:
    path, first = tmp_path / "smoke.jsonl", HEADER.model_copy(update={"limit": 1, "command": "--limit 1"})
    file = ResultFile(path, first)
    file.append(question(0))
    if finished:
        file.finish()
    more = HEADER.model_copy(update={"limit": 2, "command": "--limit 2"})
    grown = ResultFile(path, more)
    assert (grown.questions, grown.finished) == ([question(0)], False)
    with pytest.raises(ResultError, match="unfinished"):
        read(path)
    grown.append(question(1))
    grown.finish()
    assert (read(path).header, read(path).questions) == (more, [question(0), question(1)])
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ResultError, match="holds 2 questions"):
        ResultFile(path, first)
    assert not ResultFile(path, HEADER).finished, "the whole suite may ask more"
    enough = ResultFile(path, more)
    assert (len(enough.questions), enough.finished) == (2, False)


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        (0, {"version": "0.0.1"}, "was measured with kvsched 0.0.1"),
        (0, {"format": 2}, "line 1: .*another version"),
        (1, {"score": None}, "line 2"),
        (1, {"score": "1.0"}, "line 2"),
        (1, {"extra": 1}, "line 2"),
        (1, {"seconds": -1.0}, "line 2"),
        (1, {"question": "1"}, "line 4: .*counts once"),
        (1, {"task": "other"}, "line 4: .*no cell of the header"),
        (3, {"end": {"lines": 3}}, "line 4: .*counts once"),
    ],
)
def test_a_changed_field_is_refused(tmp_path: Path, line: int, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "smoke.jsonl", question(0), question(1))
    lines = path.read_text().splitlines()
    lines[line] = json.dumps({**json.loads(lines[line]), **changes}, separators=(",", ":"))
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ResultError, match=message):
        read(path)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "smoke.jsonl", question(0))
    path.write_text(path.read_text().replace('"score":1.0', '"score":NaN'))
    with pytest.raises(ResultError, match="line 2"):
        read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"none\.jsonl"):
        read(tmp_path / "none.jsonl")
