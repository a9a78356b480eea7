"""Suites: those that come with the project, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from kvsched.config import SparKVConfig
from kvsched.dynakv.policies import POLICIES
from kvsched.errors import ConfigError
from kvsched_evals.peers import PRESSES
from kvsched_evals.suite import SUITES, Suite, Variant

SMALL = {
    "tasks": [{"task": "niah_single_1", "contexts": [1024, 2048], "limit": 3}, {"task": "gsm8k_cot", "limit": 2}],
    "caches": [
        {"cache": "full"},
        {"cache": "dynakv", "policy": ["dynakv", "static"], "budget": [0.1]},
        {"cache": "sparkv", "codec": ["balanced"], "options": {"chunk_tokens": 64}},
    ],
    "seeds": [0, 1],
}


def load(folder: Path, content: object) -> Suite:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return Suite.load(str(path))


def test_every_combination_is_a_cell(tmp_path: Path) -> None:
    suite = load(tmp_path, SMALL)
    assert suite.name == "own"
    assert [str(one) for one in suite.variants] == ["full", "dynakv dynakv 10%", "dynakv static 10%", "sparkv balanced"]
    assert suite.variants[3] == Variant("sparkv", codec="balanced")
    assert suite.variants[3].options == {"chunk_tokens": 64}
    assert len(suite.cells) == len(set(suite.cells)) == (2 + 1) * 2 * 4
    assert suite.limited(None) is suite
    assert [entry.limit for entry in suite.limited(2).tasks] == [2, 2]


@pytest.mark.parametrize("name", sorted(path.stem for path in SUITES.glob("*.yaml")))
def test_the_suites_that_come_along_are_valid(name: str) -> None:
    suite = Suite.load(name)
    assert suite.name == name
    assert {one.policy for one in suite.variants if one.cache == "dynakv"} <= set(POLICIES)
    assert {one.policy for one in suite.variants if one.cache == "kvpress"} <= set(PRESSES)
    codecs = get_args(get_type_hints(SparKVConfig)["codec"])
    assert {one.codec for one in suite.variants if one.cache == "sparkv"} <= set(codecs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caches": []}, "caches"),
        ({"caches": [{"cache": "sparkv", "codec": ["int8"]}]}, "first of `caches`"),
        ({"caches": [{"cache": "full"}, {"cache": "full"}]}, "named twice"),
        ({"caches": [{"cache": "full", "budget": [0.1]}]}, "full has no budget"),
        ({"caches": [{"cache": "full"}, {"cache": "dynakv", "policy": ["static"]}]}, "dynakv needs a budget"),
        ({"caches": [{"cache": "full"}, {"cache": "sparkv", "codec": [None]}]}, "sparkv needs a codec"),
        ({"caches": [{"cache": "full"}, {"cache": "kvpress", "budget": [0.1]}]}, "kvpress needs a policy"),
        ({"caches": [{"cache": "ful"}]}, "caches.0.cache"),
        ({"tasks": [{"task": "x", "limit": 0}]}, "tasks.0.limit"),
        ({"task": []}, "task: Extra"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, {**SMALL, **changes})


@pytest.mark.parametrize("content", ["text", ["list"], None])
def test_only_a_mapping_is_a_suite(tmp_path: Path, content: object) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, content)


def test_an_unknown_name_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="smoke"):
        Suite.load("smok")
