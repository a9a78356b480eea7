"""The report: every number in it comes from its files, it needs nothing beside it, and it refuses what is not whole."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvsched import cli
from kvsched.replay import Row
from kvsched_evals import results
from kvsched_evals.machine import describe
from kvsched_evals.metrics import summarise
from kvsched_evals.report import write
from kvsched_evals.report_charts import Chart, Line, styles, svg
from kvsched_evals.report_inputs import read_files
from kvsched_evals.results import Cell, Question, ResultError

FULL = Cell("smoke", "niah <single>", 4096, "full", None, None, None, 0)
CELLS = [FULL] + [
    replace(FULL, cache="dynakv", policy=policy, budget=budget)
    for policy in ("dynakv", "static")
    for budget in (0.05, 0.1)
]
CODEC = Path(__file__).parents[2] / "evals" / "results" / "codec.json"


def questions() -> list[Question]:
    return [
        Question(
            **vars(cell),
            question=str(number),
            metric="acc",
            score=float(number % 2),
            prompt_tokens=4000,
            answer_tokens=32,
            answer="one two three four",
            logprob=[-1.5] * 32,
            full_logprob=[-1.0] * 32,
            kl=[0.01 * place for place in range(32)],
            equal_prefix=8,
            prefill_seconds=20.0,
            seconds=2.0 + number,
            bytes_read=5_000_000,
            dram_bytes=2**20,
            joules=None,
        )
        for cell in CELLS
        for number in range(2)
    ]


def written(path: Path, suite: str, asked: list[Question]) -> Path:
    header = results.Header(
        version=results.version("kvsched"),
        suite=suite,
        command=f"kvsched eval run {suite} & more",
        model="model",
        seeds=[0],
        cells=list(dict.fromkeys(one.cell for one in asked)),
        machine=describe(),
    )
    file = results.ResultFile(path, header)
    for one in asked:
        file.append(one)
    file.finish()
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return written(tmp_path / "run.jsonl", "smoke", questions())


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    made = [
        Row(policy, 0, head, step, recall, 0.9, 0.5, 0.25, 100, 2048.0, 1.0, 4.0, 0, 0)
        for policy, recall in (("static", 0.45), ("dynakv", 0.9), ("oracle", 0.9))
        for head in (0, 1)
        for step in (100, 164, 228)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([asdict(row) for row in made]))
    return path


class Page(HTMLParser):
    """Elements and attributes of a page, checked to be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(text)


def test_one_page_that_needs_nothing_beside_it(run: Path, rows: Path, tmp_path: Path) -> None:
    tables = write([run, rows, CODEC], tmp_path / "new" / "report.html")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.html", "report.md"}
    assert (tmp_path / "new" / "report.md").read_text() == tables
    text = (tmp_path / "new" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    tags = [tag for tag, _ in page.found]
    assert not {"script", "link", "img", "iframe"} & set(tags)
    for tag, attributes in page.found:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), f"{tag} asks for {attributes[name]}"
    assert not re.search(r"url\((?!#)|@import", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    # one of the task, whose cells cost the same, two of divergence by budget, three of the replay, one of the codecs
    assert tags.count("svg") == 7
    assert "#010203" not in text and "currentColor" in text, "a chart does not take the page's colours"
    assert "niah &lt;single&gt;, 4096 tokens" in text and "<single>" not in text
    assert "smoke &amp; more" in text


def test_the_tables_say_what_was_measured(run: Path, rows: Path, tmp_path: Path) -> None:
    tables = write([run, rows, CODEC], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.splitlines() if line[:2] == "| "]
    body = [cells for cells in lines if cells[0] not in ("cache", "task", "policy", "codec", "---")]
    assert page.cells == [cell for cells in body for cell in cells], "page and Markdown differ"
    table = {cells[0]: cells[1:] for cells in body}
    (found,) = [one for one in summarise(questions()) if one.cell == CELLS[1]]
    assert table["dynakv 5 %"][0] == f"{found.score.value:.3f} ± {found.score.error:.3f}"
    assert table["dynakv 5 %"][1:6] == ["+0.000 [+0.000, +0.000]", "yes", "-0.500 [-0.500, -0.500]", "0.1550", "25%"]
    assert table["dynakv 5 %"][8:] == ["2.5", "5.0", "1.0"], "no machine here counted joules"
    assert table["static"] == ["0.450", "0.500", "0.450", "0.450", "0.250", "2.0"]
    codecs = json.loads(CODEC.read_text())["codecs"]
    assert table["balanced"][0] == f"{codecs['balanced']['ratio']['mean']:.2f}"
    assert set(codecs) <= set(table)


def test_suites_stand_one_after_the_other_each_beside_its_own_full_cache(run: Path, tmp_path: Path) -> None:
    """The other suite has asked a text, through one cache that the first did not have."""
    full, *_, last = questions()
    book = Cell("texts", "book", 4096, "full", None, None, None, 0)
    pressed = replace(book, cache="kvpress", policy="snapkv", budget=0.1)
    asked = [
        replace(question, **vars(cell), question="7", metric="logprob", score=logprob[-1], logprob=logprob)
        for question, cell, logprob in ((full, book, [-1.0] * 32), (last, pressed, [-1.0] * 16 + [-2.0] * 16))
    ]
    tables = write([run, written(tmp_path / "texts.jsonl", "texts", asked)], tmp_path / "report.html")
    lines = tables.splitlines()
    heads = [line for line in lines if line.startswith("#")]
    assert heads == ["## Suite smoke", "### niah <single>, 4096 tokens", "## Suite texts", "### book, 4096 tokens"]
    assert lines[lines.index("## Suite smoke") + 4 :][:4] == [
        "| cache | niah <single>, 4096 tokens | as good |",
        "| --- | --- | --- |",
        "| full | 0.500 ± 0.500 | - |",
        "| dynakv 5 % | 0.500 ± 0.500, KL 0.1550 | 1 of 1 |",
    ]
    assert lines.count("| snapkv 10 % | -2.000, KL 0.1550 | - |") == 1, "two suites in one table"
    assert [line[:33] for line in lines if line.startswith("| snapkv")][1] == "| snapkv 10 % | -2.000 | -1.000 |"
    text = (tmp_path / "report.html").read_text()
    assert text.count(">Divergence as decoding goes on</h3>") == 2
    assert text.count(">Perplexity by position</h3>") == 1


def test_tasks_are_the_rows_where_they_are_more(tmp_path: Path) -> None:
    """The cache is worse in the last task, on both questions alike."""
    asked = [
        replace(question, task=task, score=question.score - (task == "c" and question.cache == "dynakv"))
        for task in ("a", "b", "c")
        for question in questions()
        if question.cell in CELLS[:2]
    ]
    lines = write([written(tmp_path / "run.jsonl", "smoke", asked)], tmp_path / "report.html").splitlines()
    assert lines[lines.index("## Suite smoke") + 4 :][:6] == [
        "| task | full | dynakv 5 % |",
        "| --- | --- | --- |",
        "| a, 4096 tokens | 0.500 ± 0.500 | 0.500 ± 0.500, KL 0.1550 |",
        "| b, 4096 tokens | 0.500 ± 0.500 | 0.500 ± 0.500, KL 0.1550 |",
        "| c, 4096 tokens | 0.500 ± 0.500 | -0.500 ± 0.500, KL 0.1550 |",
        "| as good | - | 2 of 3 |",
    ]


def test_no_two_lines_look_alike() -> None:
    drawn = styles([f"cache {number}" for number in range(100)])
    assert len({tuple(one.values()) for one in drawn.values()}) == 100


@pytest.mark.parametrize(
    ("low", "named"), [(1e-6, ["1e-06", "0.0001", "0.01", "1"]), (0.1, ["0.1", "0.2", "0.5", "1"])]
)
def test_numbers_on_a_logarithmic_axis_have_room(low: float, named: list[str]) -> None:
    line = Line("dynakv", [0.0, 1.0], [low, 1.0])
    drawn = svg(Chart("title", "x", "y", [line], log_y=True), styles(["dynakv"]))
    shown = re.findall(r">([^<>]+)</text>", drawn)
    assert set(named) <= set(shown)
    assert len(shown) < 24, f"they stand on each other: {shown}"


def damaged(name: str, run: Path, rows: Path) -> tuple[str, str]:
    """Text of a file that is not whole or not of this version, and what the refusal must say."""
    lines = run.read_text().splitlines(keepends=True)
    benchmark: dict[str, Any] = json.loads(CODEC.read_text())
    benchmark["machine"]["versions"]["kvsched"] = "0.0.1"
    cases = {
        "unfinished": ("".join(lines[:-1]), "again to go on"),
        "header alone": (lines[0], "again to go on"),
        "a question missing": ("".join(lines[:2] + lines[3:]), "damaged"),
        "half a line": ("".join(lines)[:-40], "again to go on"),
        "other version": ("".join(lines).replace('"version":"', '"version":"9.'), "9."),
        "no machine": ("".join(lines).replace('"processor":', '"other":'), "what machine"),
        "rows cut off": (rows.read_text()[:-30], "kvsched trace replay"),
        "rows of another form": ('[{"policy": "dynakv"}]', "kvsched trace replay"),
        "no rows": ("[]", "no rows"),
        "benchmark cut off": (CODEC.read_text()[:-30], "make bench-codec"),
        "benchmark of another version": (json.dumps(benchmark, indent=1), "0.0.1"),
        "a benchmark without a number": (CODEC.read_text().replace('"kl"', '"other"'), "make bench-codec"),
        "another benchmark": (json.dumps({"machine": benchmark["machine"]}, indent=1), "make bench-codec"),
        "nothing": ("", "no result file"),
    }
    return cases[name]


@pytest.mark.parametrize(
    "name",
    [
        "unfinished",
        "header alone",
        "a question missing",
        "half a line",
        "other version",
        "no machine",
        "rows cut off",
        "rows of another form",
        "no rows",
        "benchmark cut off",
        "benchmark of another version",
        "a benchmark without a number",
        "another benchmark",
        "nothing",
    ],
)
def test_what_is_not_whole_or_of_another_version_is_refused(run: Path, rows: Path, tmp_path: Path, name: str) -> None:
    text, message = damaged(name, run, rows)
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(ResultError, match=re.escape(message)) as error:
        write([run, path], tmp_path / "report.html")
    assert str(path) in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_runs_that_cannot_stand_side_by_side_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="same question"):
        write([run, run], tmp_path / "report.html")
    other = tmp_path / "other.jsonl"
    other.write_text(run.read_text().replace('"model":"model"', '"model":"another"'))
    with pytest.raises(ResultError, match="another, model"):
        write([run, other], tmp_path / "report.html")


def test_files_that_cannot_be_read_or_written_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="cannot read"):
        read_files([tmp_path / "none"])
    (tmp_path / "taken").write_text("")
    with pytest.raises(ResultError, match="--out"):
        write([run], tmp_path / "taken" / "report.html")


def test_the_command(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(cli.app, ["eval", "report", str(rows), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "| static | 0.450 |" in done.stdout and out.exists()
    done = CliRunner().invoke(cli.app, ["eval", "report", str(tmp_path / "none"), "--out", str(out)])
    assert (done.exit_code, done.stderr.count("cannot read")) == (1, 1)
