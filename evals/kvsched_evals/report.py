"""`kvsched eval report`: one page that needs nothing beside it, and its tables as Markdown, from files of results.

It takes what `kvsched eval run` writes, the rows of `kvsched trace replay --json`, and the JSON of `make bench-codec`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError

from kvsched.replay import ORACLE, Row

from . import metrics, results
from .metrics import Difference, Mean, Summary
from .report_charts import Chart, Line, styles, svg
from .results import ResultError

WIDTH = 16  # tokens of a long answer in one point of its divergence
STEPS = 48  # points, at most, of a line over the steps of a replayed decode

Shown = tuple[str, Callable[[Summary], str]]


class _Measured(BaseModel):
    mean: results.Finite


class _Codec(BaseModel):
    ratio: _Measured
    kl: _Measured
    top1: _Measured
    decode_mb_s: _Measured


class Machine(BaseModel):
    """What `kvsched_evals.machine.describe` said."""

    processor: str
    cores: int
    memory_gib: float
    accelerator: str | None
    versions: dict[str, str]
    time: str


class CodecBenchmark(BaseModel):
    """What is read of the JSON that `make bench-codec` writes."""

    command: str
    machine: Machine
    context_tokens: int
    following_tokens: int
    codecs: dict[str, _Codec]
    runs: dict[str, list[Any]]


@dataclass
class Section:
    """A part of the report: charts, then a table."""

    title: str
    note: str
    columns: Sequence[str]
    rows: list[list[str]]
    charts: list[Chart] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Input:
    """What was read from all files: finished runs, rows of replays, and codec benchmarks."""

    runs: list[results.Results]
    rows: list[Row]
    codecs: list[CodecBenchmark]


def write(files: Sequence[Path], out: Path) -> str:
    """Write the page to `out` and its tables beside it, as `.md`; the tables are returned.

    Raises:
        ResultError: a file is unfinished, damaged, of another version or no result; or `out` cannot be written.
    """
    read = read_files(files)
    sections = [*_tasks(read.runs), *_drift(read.runs), *_replays(read.rows), *map(_codec, read.codecs)]
    style = styles([line.label for section in sections for chart in section.charts for line in chart.lines])
    for section in sections:
        section.drawn = [svg(chart, style) for chart in section.charts]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("report.html.jinja").render(
        title="kvsched: quality and cost", sources=_sources(read), sections=sections
    )
    tables = markdown(sections)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
        out.with_suffix(".md").write_text(tables, encoding="utf-8")
    except OSError as error:
        raise ResultError(f"cannot write {out}: {error.strerror}. Choose another --out file.") from error
    return tables


def read_files(files: Sequence[Path]) -> Input:
    """Read every file as what it is.

    Raises:
        ResultError: as for `write`.
    """
    read = Input([], [], [])
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ResultError(f"cannot read the results in {path}: {error}") from error
        if text.startswith("["):
            read.rows.extend(_replayed(path, text))
        elif (benchmark := _benchmark(path, text)) is not None:
            read.codecs.append(benchmark)
        else:
            read.runs.append(_run(path))
    _check_together(read.runs)
    return read


def _run(path: Path) -> results.Results:
    run = results.read(path)
    try:
        Machine.model_validate(run.header.machine)
    except ValidationError as error:
        raise ResultError(f"{path} does not say what machine it was measured on: it is damaged.") from error
    return run


def _replayed(path: Path, text: str) -> list[Row]:
    try:
        rows = TypeAdapter(list[Row]).validate_json(text, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ResultError(f"{path}: {problem}. Write it again: kvsched trace replay TRACE --json {path}.") from error
    if not rows:
        raise ResultError(f"{path} holds no rows: run `kvsched trace replay TRACE --json {path}` again.")
    return rows


def _benchmark(path: Path, text: str) -> CodecBenchmark | None:
    """The results of `make bench-codec`; `None` for JSON lines."""
    if text[:2] not in ("{\n", "{\r"):  # one object over many lines, as benchmarks write it
        return None
    try:
        found = CodecBenchmark.model_validate_json(text)
    except ValidationError as error:
        raise ResultError(f"{path} is damaged or not from `make bench-codec`: run that again.") from error
    measured = found.machine.versions.get("kvsched")
    if measured != version("kvsched"):
        raise ResultError(
            f"{path} was measured with kvsched {measured}, this is {version('kvsched')}: run `make bench-codec` again."
        )
    return found


def _check_together(runs: Sequence[results.Results]) -> None:
    """Refuse runs whose questions cannot stand side by side."""
    for name in ("suite", "model"):
        if len(found := {getattr(run.header, name) for run in runs}) > 1:
            raise ResultError(
                f"these are results of another {name} each: {', '.join(sorted(found))}. Report them apart."
            )
    asked = [(one.cell, one.question) for run in runs for one in run.questions]
    if len(set(asked)) < len(asked):
        raise ResultError("two files answer the same question through the same cache. Leave one of them out.")


def _sources(read: Input) -> list[dict[str, str]]:
    """Where the numbers are from, for the head of the page."""
    headers = [run.header for run in read.runs]
    sources = [
        {"suite": one.suite, "model": one.model, "seeds": ", ".join(map(str, one.seeds)), "command": one.command}
        | _machine(Machine.model_validate(one.machine))
        for one in headers
    ]
    sources += [{"command": one.command} | _machine(one.machine) for one in read.codecs]
    if read.rows:
        sources.append({"replayed": f"{len(read.rows)} rows of kvsched trace replay"})
    return sources


def _machine(machine: Machine) -> dict[str, str]:
    kind = f"{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB"
    if machine.accelerator is not None:
        kind += f", {machine.accelerator}"
    found = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    return {"machine": kind, "versions": found, "time": machine.time}


def _tasks(runs: Sequence[results.Results]) -> Iterable[Section]:
    """A section for each task and context: quality beside cost."""
    tasks: dict[tuple[str, int | None, str], list[Summary]] = defaultdict(list)
    for one in metrics.summarise(question for run in runs for question in run.questions):
        tasks[one.cell.task, one.cell.context, one.metric].append(one)
    for (task, context, given), cells in tasks.items():
        metric = "string match" if given.isdigit() else given  # RULER calls its score by the prompt's length
        note = f"{metric} and its standard error over {cells[0].score.count} questions. Change, log-probability and KL "
        note += "are against the full cache on the same questions; brackets hold 95 % of bootstrapped means; as "
        note += "good is a score that is lower by no more than a point or the standard error of its change. "
        note += f"To prefill a prompt took {_number(cells[0].prefill_seconds, '.1f')} s, once for all caches."
        rows = [[metrics.label(one.cell), *(show(one) for _, show in _COLUMNS)] for one in cells]
        yield Section(
            _title(task, context), note, ["cache", *(name for name, _ in _COLUMNS)], rows, list(_against(cells, metric))
        )


def _title(task: str, context: int | None) -> str:
    return task if context is None else f"{task}, {context} tokens"


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
        if drawn := over(x):
            places = sorted({place for line in drawn for place in line.x}) if name == "budget" else ()
            yield Chart(f"{metric} against {name}", label, metric, drawn, level, places)


def _drift(runs: Sequence[results.Results]) -> Iterable[Section]:
    """How far the next token's distribution has moved from the full cache's as an answer grows."""
    charts: dict[tuple[str, int | None, float | None], dict[str, list[results.Question]]] = {}
    for run in runs:
        for one in run.questions:
            if one.cache != "full" and len(one.kl) >= 2 * WIDTH:
                caches = charts.setdefault((one.task, one.context, one.budget), defaultdict(list))
                caches[metrics.label(metrics.without_budget(one.cell))].append(one)
    drawn = []
    for (task, context, budget), caches in charts.items():
        lines = []
        for name, own in caches.items():
            found = metrics.by_position(own, WIDTH)
            lines.append(Line(name, [start for start, _ in found], [mean.value for _, mean in found]))
        title = _title(task, context) if budget is None else f"{_title(task, context)}, budget {100 * budget:g} %"
        drawn.append(Chart(title, "tokens decoded", "KL to the full cache, nats", lines, log_y=True))
    if drawn:
        note = "Divergence of the next token's distribution from the full cache's while both read the same tokens."
        yield Section("Divergence as decoding goes on", note, [], [], drawn)


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
            parts.append(f"## {section.title}\n\n{section.note}\n\n{table}\n")
    return "\n".join(parts)


def _score(one: Summary) -> str:
    return f"{one.score.value:.3f} ± {one.score.error:.3f}"


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def _as_good(one: Summary) -> str:
    """Whether a score is within a point or its standard error; a log-probability has no points."""
    if one.change is None or one.metric == "logprob":
        return "-"
    return "yes" if one.change.as_good else "no"


def _number(mean: Mean | None, form: str, unit: float = 1.0) -> str:
    return "-" if mean is None else f"{mean.value / unit:{form}}"


_COLUMNS: list[Shown] = [
    ("score", _score),
    ("change", lambda one: _interval(one.change)),
    ("as good", _as_good),
    ("log-probability", lambda one: "-" if one.cell.cache == "full" else _interval(one.logprob)),
    ("KL", lambda one: "-" if one.cell.cache == "full" else _number(one.kl, ".4f")),
    ("equal prefix", lambda one: _number(one.equal_prefix, ".0%")),
    ("distinct", lambda one: _number(one.diversity, ".2f")),
    ("tokens", lambda one: _number(one.length, ".0f")),
    ("s", lambda one: _number(one.seconds, ".1f")),
    ("MB read", lambda one: _number(one.bytes_read, ".1f", 1e6)),
    ("MiB DRAM", lambda one: _number(one.dram_bytes, ".1f", 2**20)),
    ("J", lambda one: _number(one.joules, ".0f")),
]
