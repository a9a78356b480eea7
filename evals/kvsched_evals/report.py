"""`kvsched eval report`: one page that needs nothing beside it, and its tables as Markdown, from files of results.

It takes what `kvsched eval run` writes, the rows of `kvsched trace replay --json`, and the JSON of `make bench-codec`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from kvsched.replay import ORACLE, Row

from . import metrics
from .metrics import Difference, Mean, Summary
from .report_charts import Chart, Line, styles, svg
from .report_inputs import CodecBenchmark, read_files
from .results import Cell, Question, ResultError

WIDTH = 16  # tokens of a long answer in one point over positions
STEPS = 48  # points, at most, of a line over the steps of a replayed decode

Shown = tuple[str, Callable[[Summary], str]]


@dataclass
class Section:
    """A part of the report: charts, then a table; `level` is that of its heading."""

    title: str
    note: str
    columns: Sequence[str]
    rows: list[list[str]]
    charts: list[Chart] = field(default_factory=list)
    level: int = 2
    drawn: list[str] = field(default_factory=list)


def write(files: Sequence[Path], out: Path) -> str:
    """Write the page to `out` and its tables beside it, as `.md`; the tables are returned.

    Raises:
        ResultError: a file is unfinished, damaged, of another version or no result; or `out` cannot be written.
    """
    read = read_files(files)
    sections = [*quality(read.questions), *_replays(read.rows), *map(_codec, read.codecs)]
    style = styles([line.label for section in sections for chart in section.charts for line in chart.lines])
    for section in sections:
        section.drawn = [svg(chart, style) for chart in section.charts]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("report.html.jinja").render(
        title="kvsched: quality and cost", sources=read.sources(), sections=sections
    )
    tables = markdown(sections)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
        out.with_suffix(".md").write_text(tables, encoding="utf-8")
    except OSError as error:
        raise ResultError(f"cannot write {out}: {error.strerror}. Choose another --out file.") from error
    return tables


def quality(questions: Sequence[Question]) -> Iterable[Section]:
    """What questions say: for each suite all tasks side by side, each task beside its cost, and what comes late."""
    suites: dict[str, list[Question]] = defaultdict(list)
    for one in questions:
        suites[one.suite].append(one)
    for suite, own in suites.items():
        tasks: dict[tuple[str, int | None, str], list[Summary]] = defaultdict(list)
        for cell in metrics.summarise(own):
            tasks[cell.cell.task, cell.cell.context, cell.metric].append(cell)
        yield _side_by_side(suite, list(tasks.values()))
        yield from map(_task, tasks.values())
        yield from _by_position(own)


def _side_by_side(suite: str, tasks: Sequence[Sequence[Summary]]) -> Section:
    """The score of every task through every cache, its divergence, and in how many tasks a cache is as good.

    The more numerous of both, tasks or caches, are the rows.
    """
    found = {_title(cells[0].cell): {metrics.label(one.cell): one for one in cells} for cells in tasks}
    caches = list(dict.fromkeys(name for cells in found.values() for name in cells))
    table = [["task", *caches], *([task, *(_brief(cells.get(one)) for one in caches)] for task, cells in found.items())]
    table.append(
        ["as good", *(_times_as_good(cells[one] for cells in found.values() if one in cells) for one in caches)]
    )
    if len(caches) >= len(found):
        table = [list(column) for column in zip(*table, strict=True)]
        table[0][0] = "cache"
    note = "The score of each task with its standard error, and the KL divergence of the next token's distribution "
    note += "from the full cache's, in nats. As good as the full cache's is a score that is lower by no more than a "
    note += "point or the standard error of the change on the same questions. Questions: "
    note += ", ".join(f"{cells[0].score.count} of {cells[0].cell.task}" for cells in tasks)
    return Section(f"Suite {suite}", f"{note}.", table[0], table[1:])


def _task(cells: Sequence[Summary]) -> Section:
    """A task's quality beside its cost."""
    # RULER calls its score by the prompt's length.
    metric = {str(cells[0].cell.context): "string match"}.get(cells[0].metric, cells[0].metric)
    note = f"{metric} and its standard error over {cells[0].score.count} questions. Change, log-probability and KL "
    note += "are against the full cache on the same questions; brackets hold 95 % of bootstrapped means. "
    note += f"To prefill a prompt took {_number(cells[0].prefill_seconds, '.1f')} s, once for all caches."
    columns = {"cache": [metrics.label(one.cell) for one in cells]}
    for name, show in _COLUMNS:
        if set(shown := [show(one) for one in cells]) != {"-"}:
            columns[name] = shown
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return Section(_title(cells[0].cell), note, list(columns), rows, list(_against(cells, metric)), 3)


def _title(cell: Cell) -> str:
    return cell.task if cell.context is None else f"{cell.task}, {cell.context} tokens"


def _against(cells: Sequence[Summary], metric: str) -> Iterable[Chart]:
    """The score of a task against budget, bytes read and seconds."""
    full = next((one for one in cells if one.cell.cache == "full"), None)
    level = None if full is None else ("full cache", full.score.value, full.score.error)
    lines: dict[Any, list[Summary]] = defaultdict(list)
    for one in cells:
        if one.cell.cache != "full":
            lines[metrics.without_budget(one.cell)].append(one)
    for own in lines.values():
        own.sort(key=lambda one: one.cell.budget or 0.0)

    def over(x: Callable[[Summary], float | None]) -> list[Line]:
        drawn = []
        for cell, own in lines.items():
            points = [(place, one.score) for one in own if (place := x(one)) is not None]
            if points:
                places, scores = zip(*points, strict=True)
                errors = [score.error for score in scores]
                drawn.append(Line(metrics.label(cell), places, [score.value for score in scores], errors))
        return drawn

    axes: list[tuple[str, str, Callable[[Summary], float | None]]] = [
        ("budget", "budget, % of the prompt's tokens", lambda one: one.cell.budget and 100 * one.cell.budget),
        ("bytes read", "MB read for a question", lambda one: one.bytes_read.value / 1e6),
        ("seconds", "seconds for a question, after the prefill", lambda one: one.seconds.value),
    ]
    for name, label, x in axes:
        drawn = over(x)
        places = sorted({place for line in drawn for place in line.x})
        if len(places) > 1:  # one place on the axis shows no course
            named = places if name == "budget" else ()
            yield Chart(f"{metric} against {name}", label, metric, drawn, level, named)


def _by_position(questions: Sequence[Question]) -> Iterable[Section]:
    """What becomes of long answers and long texts as they grow."""
    long = [one for one in questions if len(one.kl) >= 2 * WIDTH]
    drift = [one for one in long if one.cache != "full"]
    if drift:
        note = "Divergence of the next token's distribution from the full cache's while both read the same tokens."
        charts = _over_positions(drift, "KL to the full cache, nats", lambda one: one.kl, lambda kl: kl, log_y=True)
        yield Section("Divergence as decoding goes on", note, [], [], charts, 3)
    texts = [one for one in long if one.metric == "logprob"]
    if texts:
        note = "Of what follows a context, token by token: e to the power of minus a token's mean log-probability."
        charts = _over_positions(texts, "perplexity", lambda one: one.logprob, lambda mean: math.exp(-mean))
        yield Section("Perplexity by position", note, [], [], charts, 3)


def _over_positions(
    questions: Sequence[Question],
    label: str,
    values: Callable[[Question], Sequence[float]],
    shown: Callable[[float], float],
    log_y: bool = False,
) -> list[Chart]:
    """A chart for each task and budget, whose lines are caches: means over `WIDTH` tokens and all questions.

    The full cache, if it is there, stands in each.
    """
    full: dict[str, list[Question]] = defaultdict(list)
    charts: dict[tuple[str, float | None], dict[str, list[Question]]] = defaultdict(lambda: defaultdict(list))
    for one in questions:
        if one.cache == "full":
            full[_title(one)].append(one)
        else:
            charts[_title(one), one.budget][metrics.label(metrics.without_budget(one.cell))].append(one)
    drawn = []
    for (title, budget), caches in charts.items():
        lines = []
        for name, own in {"full": full[title], **caches}.items():
            if found := metrics.by_position([values(one) for one in own], WIDTH):
                lines.append(Line(name, [start for start, _ in found], [shown(mean.value) for _, mean in found]))
        named = title if budget is None else f"{title}, budget {100 * budget:g} %"
        drawn.append(Chart(named, "tokens decoded", label, lines, log_y=log_y))
    return drawn


def _replays(rows: Sequence[Row]) -> Iterable[Section]:
    """Attention held by what a policy retrieves, as a recorded decode goes on: static falls, splitting holds."""
    if not rows:
        return
    policies: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        policies[row.policy].append(row)
    first = min(row.step for row in rows)

    def line(name: str, value: Callable[[list[Row]], float]) -> Line:
        steps: dict[int, list[Row]] = defaultdict(list)
        for row in policies[name]:
            steps[row.step].append(row)
        groups = np.array_split(sorted(steps), min(STEPS, len(steps)))
        together = [[row for step in group for row in steps[int(step)]] for group in groups]
        return Line(name, [float(group.mean()) - first for group in groups], [value(group) for group in together])

    shown: list[tuple[str, str, Callable[[list[Row]], float]]] = [
        ("Attention recalled", "share of exact attention", _recall),
        ("Against the best choice", "share of exact top-k", _share),
        ("Error of the output", "error, with the estimate", _error),
    ]
    charts = [
        Chart(title, "tokens decoded", label, [line(name, value) for name in policies if _shows(name, value)])
        for title, label, value in shown
    ]
    table = []
    for name, own in policies.items():
        steps = sorted({row.step for row in own})
        half = steps[len(steps) // 2]
        early, late = ([row for row in own if (row.step < half) == begin] or own for begin in (True, False))
        numbers = [_recall(own), _share(own), _recall(early), _recall(late), _error(own)]
        read = float(np.mean([row.bytes_read for row in own])) / 1e3
        table.append([name, *(f"{number:.3f}" for number in numbers), f"{read:.1f}"])
    columns = [
        "policy",
        "recall",
        "of exact top-k",
        "recall, first half",
        "second half",
        "error",
        "KB read a head and step",
    ]
    note = "A recorded decode, decoded again by each policy at the same budget: mean over layers, heads and steps."
    yield Section("Drift in a recorded decode", note, columns, table, charts)


def _recall(rows: list[Row]) -> float:
    return float(np.mean([row.recall for row in rows]))


def _share(rows: list[Row]) -> float:
    return _recall(rows) / float(np.mean([row.oracle_recall for row in rows]))


def _error(rows: list[Row]) -> float:
    return float(np.mean([row.error_estimated for row in rows]))


def _shows(policy: str, value: Callable[[list[Row]], float]) -> bool:
    """Whether a line says anything: the best choice is all of itself."""
    return policy != ORACLE or value is not _share


def _codec(found: CodecBenchmark) -> Section:
    """Divergence against size of each codec."""
    lines = [Line(name, [row.ratio.mean], [row.kl.mean]) for name, row in found.codecs.items() if row.kl.mean > 0]
    chart = Chart("KL by codec", "times smaller than half precision", "KL, nats", lines, log_y=True, points=True)
    table = []
    for name, row in found.codecs.items():
        numbers = f"{row.ratio.mean:.2f}", f"{row.kl.mean:.5f}", f"{row.top1.mean:.3f}", f"{row.decode_mb_s.mean:.0f}"
        table.append([name, *numbers])
    note = f"The cache of {found.context_tokens} tokens written and read back; divergence of the "
    note += f"{found.following_tokens} tokens that follow, mean over {max(map(len, found.runs.values()))} texts."
    columns = ["codec", "ratio", "KL, nats", "same next token", "decode, MB/s"]
    return Section("KL by codec", note, columns, table, [chart])


def markdown(sections: Iterable[Section]) -> str:
    """The tables of all sections."""
    parts = []
    for section in sections:
        if section.rows:
            lines = [section.columns, ["---"] * len(section.columns), *section.rows]
            table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
            parts.append(f"{'#' * section.level} {section.title}\n\n{section.note}\n\n{table}\n")
    return "\n".join(parts)


def _score(one: Summary) -> str:
    return f"{one.score.value:.3f} ± {one.score.error:.3f}" if one.score.count > 1 else f"{one.score.value:.3f}"


def _divergence(one: Summary) -> str:
    return "-" if one.cell.cache == "full" else _number(one.kl, ".4f")


def _brief(one: Summary | None) -> str:
    """Score and divergence."""
    if one is None:
        return "-"
    return _score(one) if one.kl is None or one.cell.cache == "full" else f"{_score(one)}, KL {_divergence(one)}"


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    interval = f" [{difference.low:+.3f}, {difference.high:+.3f}]" if difference.count > 1 else ""
    return f"{difference.value:+.3f}{interval}"


def _as_good(one: Summary) -> str:
    """Whether a score is within a point or its standard error; a log-probability has no points."""
    if one.change is None or _is_text(one):
        return "-"
    return "yes" if one.change.as_good else "no"


def _times_as_good(summaries: Iterable[Summary]) -> str:
    """In how many tasks a cache is as good as the full one, of those that tell."""
    told = [said for one in summaries if (said := _as_good(one)) != "-"]
    return f"{told.count('yes')} of {len(told)}" if told else "-"


def _is_text(one: Summary) -> bool:
    """Whether the score is a log-probability itself."""
    return one.metric == "logprob"


def _number(mean: Mean | None, form: str, unit: float = 1.0) -> str:
    return "-" if mean is None else f"{mean.value / unit:{form}}"


_COLUMNS: list[Shown] = [
    ("score", _score),
    ("change", lambda one: _interval(one.change)),
    ("as good", _as_good),
    ("log-probability", lambda one: "-" if one.cell.cache == "full" or _is_text(one) else _interval(one.logprob)),
    ("KL", _divergence),
    ("equal prefix", lambda one: _number(one.equal_prefix, ".0%")),
    ("distinct", lambda one: _number(one.diversity, ".2f")),
    ("tokens", lambda one: _number(one.length, ".0f")),
    ("s", lambda one: _number(one.seconds, ".1f")),
    ("MB read", lambda one: _number(one.bytes_read, ".1f", 1e6)),
    ("MiB DRAM", lambda one: _number(one.dram_bytes, ".1f", 2**20)),
    ("J", lambda one: _number(one.joules, ".0f")),
]
