"""Runs of suites: every question through every cache, resumed where they were; the smoke suite on the real model."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from kvsched import cli, hub
from kvsched_evals import data, report
from kvsched_evals import run as runs
from kvsched_evals.results import Cell, Question, ResultError, read
from kvsched_evals.suite import SUITES, Suite

SUITE = {
    "tasks": [{"task": "sums", "limit": 3}],
    "caches": [{"cache": "full"}, {"cache": "hf-quantized", "codec": ["fp8"]}],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with a small multiple-choice task, and another one whose data is missing."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{n} plus {n}?", "choices": [str(2 * n), "none"], "answer": 0} for n in range(5)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text('{"question": "One, two,", "answer": " three, four, five"}\n' * 2)
    for name in ("sums", "gone"):
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    del task["doc_to_choice"]
    task |= {"task": "texts", "output_type": "loglikelihood", "target_delimiter": ""}
    task |= {"dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}}}
    (folder / "texts.yaml").write_text(yaml.safe_dump(task | {"metric_list": [{"metric": "perplexity"}]}))
    return folder


@pytest.fixture
def suite(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(data, "TASKS", tasks)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(SUITE))
    return tmp_path / "own.yaml"


@pytest.fixture
def command(tiny_model, byte_tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`kvsched eval run` with a random model."""
    monkeypatch.setattr(hub, "load_model", lambda name: (tiny_model("qwen2"), byte_tokenizer))

    def run(*arguments: str | Path) -> Result:
        words = ["eval", "run", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["kvsched", *words])
        return CliRunner().invoke(cli.app, words)

    return run


def test_a_run_asks_every_question_through_every_cache(suite: Path, command, tmp_path: Path) -> None:
    out = tmp_path / "own.jsonl"
    ran = command(suite, "--out", out)
    assert ran.exit_code == 0, ran.output
    found = read(out)
    assert found.header.command == f"kvsched eval run {suite} --out {out}"
    assert [(one.cache, one.question) for one in found.questions] == [
        (cache, number) for number in "012" for cache in ("full", "hf-quantized")
    ]
    assert all(one.metric == "acc" and one.score in (0, 1) for one in found.questions)
    *cells, path = ran.stdout.splitlines()
    assert path == str(out)
    assert [line.partition(":")[0] for line in cells] == ["sums, full", "sums, hf-quantized fp8"]


def test_a_run_goes_on_where_it_was(suite: Path, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, asked, ask = tmp_path / "own.jsonl", [], runs.ask

    def interrupted(lm: Any, task: Any, instances: Any, reference: Any, cell: Cell) -> Question:
        asked.append((cell.cache, str(instances[0].doc_id)))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return ask(lm, task, instances, reference, cell)

    monkeypatch.setattr(runs, "ask", interrupted)
    assert command(suite, "--out", out).exit_code != 0
    with pytest.raises(ResultError, match="unfinished"):
        read(out)
    assert command(suite, "--out", out).exit_code == 0
    # The full cache is asked again, for the other to be compared with it, but its answer stands already.
    assert asked[4:] == [("full", "1"), ("hf-quantized", "1"), ("full", "2"), ("hf-quantized", "2")]
    assert len(read(out).questions) == 6
    before = out.read_bytes()
    assert command(suite, "--out", out).exit_code == 0
    assert (out.read_bytes(), len(asked)) == (before, 8)


def test_every_task_is_asked_before_the_next_question_of_any(suite: Path, command, tmp_path: Path) -> None:
    """And of a text that is scored, so many tokens; of a task with fewer questions, all."""
    tasks = [*SUITE["tasks"], {"task": "texts", "limit": 3, "max_gen_toks": 6}]
    suite.write_text(yaml.safe_dump({**SUITE, "tasks": tasks}))
    out = tmp_path / "own.jsonl"
    ran = command(suite, "--out", out)
    assert ran.exit_code == 0, ran.output
    found = read(out).questions
    order = [(one.question, one.task) for one in found if one.cache == "full"]
    assert order == [("0", "sums"), ("0", "texts"), ("1", "sums"), ("1", "texts"), ("2", "sums")]
    assert {len(one.logprob) for one in found if one.task == "texts"} == {len(" three")}
    ends = [line.partition(",")[0] for line in ran.stdout.splitlines()[:-1]]
    assert ends == ["texts", "texts", "sums", "sums"]


def test_limit_asks_fewer_questions_and_the_rest_later(suite: Path, command, tmp_path: Path) -> None:
    out = tmp_path / "own.jsonl"
    for limit in (1, 2):
        assert command(suite, "--out", out, "--limit", limit).exit_code == 0
        found = read(out)
        assert (found.header.limit, found.header.command) == (
            limit,
            f"kvsched eval run {suite} --out {out} --limit {limit}",
        )
        assert [one.question for one in found.questions if one.cache == "full"] == ["0", "1"][:limit]


def test_the_help_names_the_suites(command) -> None:
    shown = command("--help").stdout
    assert all(path.stem in shown for path in SUITES.glob("*.yaml"))


def test_missing_data_says_what_fetches_it(suite: Path, command, tmp_path: Path) -> None:
    suite.write_text(suite.read_text().replace("sums", "gone"))
    ran = command(suite, "--out", tmp_path / "own.jsonl")
    assert ran.exit_code == 1
    assert "make eval-data" in ran.stderr


@pytest.mark.parametrize(
    ("page", "suite"), [("README.md", "smoke"), ("docs/quality.md", "peers"), ("docs/quality.md", "q1")]
)
def test_the_pages_show_the_committed_results(page: str, suite: str) -> None:
    root = Path(__file__).parents[2]
    found = read(root / "evals" / "results" / f"{suite}.jsonl")
    assert found.header.cells == Suite.load(suite).cells, "measured from another suite"
    *_, table = report.markdown([next(iter(report.quality(found.questions)))]).partition("\n| ")
    assert table in (root / page).read_text()


@pytest.mark.real_model
def test_the_smoke_suite_on_the_real_model(real_model, tmp_path: Path) -> None:
    """A short question of each task: caches that keep everything give the full cache's answer, others come near it."""
    smoke = Suite.load("smoke").limited(1).model_dump()
    tasks = [{**task, "contexts": [512], "max_gen_toks": 4} for task in smoke["tasks"]]
    caches: list[dict[str, Any]] = [
        {"cache": "full"},
        {"cache": "dynakv", "policy": ["dynakv"], "budget": [1.0, 0.1]},
        {"cache": "sparkv", "codec": ["lossless", "progressive"]},
    ]
    suite = Suite.model_validate({**smoke, "tasks": tasks, "caches": caches})
    path = tmp_path / "smoke.jsonl"
    runs.run(suite, *real_model, path, "test", lambda line: None)
    found = read(path).questions
    assert len(found) == len(tasks) * 5
    for full, everything, some, lossless, progressive in zip(*[iter(found)] * 5, strict=True):
        assert max(full.kl) == 0
        for exact in (everything, lossless):
            assert max(exact.kl) < 1e-4
            assert exact.answer == full.answer
        assert 0 < statistics.fmean(some.kl) < 1
        assert 0 < statistics.fmean(progressive.kl) < 0.05
        assert 0 < progressive.bytes_read < lossless.bytes_read
