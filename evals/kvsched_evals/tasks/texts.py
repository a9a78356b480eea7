"""The documents of the tasks in this folder, and how two of them are scored; lm-eval calls what the YAML files name.

A dataset function gets the metadata of the run, as lm-eval's own RULER tasks do: `max_seq_lengths`, tokens that prompts
are made to fill, and `tokenizer` or `pretrained`, whose tokens are counted.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset
from lm_eval.tasks.hellaswag.utils import process_docs as hellaswag
from lm_eval.tasks.qasper.metrics import f1_abstractive, normalize_answer
from lm_eval.tasks.ruler.common_utils import get_tokenizer, resolve_tokenizer_name

from kvsched_evals import data

CONTEXT = 4096  # tokens where the run names no lengths
CONTINUATION = 256  # tokens of a text that are scored after the context
LINES_PER_FILE = 4
GROWN = 10  # turns of a conversation before the one that is asked
SEED = 0

Row = dict[str, Any]

__all__ = ["book", "code", "code_score", "coqa", "coqa_score", "hellaswag", "manual", "qasper"]


def coqa(**metadata: Any) -> dict[str, Dataset]:
    """Turns of conversations that have grown: each with all turns before it, answered as they were."""
    grown = [row for row in data.rows("kvsched/coqa") if len(row["before"]) >= GROWN]
    return _test(_shuffled(grown))


def coqa_score(document: Row, results: list[str]) -> dict[str, float]:
    """F1 and exact match against the best of the annotators' answers, without case, articles and punctuation."""
    answer, expected = results[0].strip().partition("\n")[0], document["answers"]
    return {
        "f1": max(float(f1_abstractive([answer], [one])) for one in expected),
        "em": max(float(normalize_answer(answer) == normalize_answer(one)) for one in expected),
    }


def qasper(**metadata: Any) -> dict[str, Dataset]:
    """Yes or no questions about whole papers: those of a length class, longest first; without one, all."""
    rows = data.rows("kvsched/qasper")
    if "max_seq_lengths" not in metadata:
        return _test(rows)
    tokenizer = _tokenizer(metadata)
    lengths = [len(tokenizer(row["paper"]).input_ids) for row in rows]
    chosen = []
    for most in metadata["max_seq_lengths"]:
        fitting = [one for one in zip(lengths, rows, strict=True) if most / 2 < one[0] <= most - 64]  # for the question
        chosen += [row for _, row in sorted(fitting, key=lambda one: (-one[0], one[1]["id"]))]
    return _test(chosen)


def code(**metadata: Any) -> dict[str, Dataset]:
    """Next lines in long files of this Python's standard library; the context begins with a line of the file."""
    tokenizer = _tokenizer(metadata)
    rows = [row for length in metadata.get("max_seq_lengths", [CONTEXT]) for row in _next_lines(tokenizer, length)]
    return _test(_shuffled(rows))


def _next_lines(tokenizer: Any, length: int) -> Iterator[Row]:
    """Lines that say enough to be wrong about, each after the `length` tokens before it."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.glob("*.py")):
        if path.stat().st_size < 3 * length:  # no file has fewer than three bytes a token
            continue
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        before = [0]
        for count in tokenizer(lines).input_ids:
            before.append(before[-1] + len(count))
        telling = [
            number
            for number, line in enumerate(lines)
            if before[number] >= length and 20 <= len(line.strip()) <= 100 and line.strip()[0] not in "#\"'"
        ]
        for number in random.Random(f"{SEED} {path.name}").sample(telling, min(LINES_PER_FILE, len(telling))):
            first = next(start for start in range(number) if before[number] - before[start] <= length)
            yield {
                "id": f"{path.name}:{number + 1}",
                "context": "".join(lines[first:number]),
                "line": lines[number].strip(),
            }


def code_score(document: Row, results: list[str]) -> dict[str, float]:
    """Whether the first line of the answer is the file's next line, but for spaces around it."""
    return {"exact_match": float(results[0].partition("\n")[0].strip() == document["line"])}


def book(**metadata: Any) -> dict[str, Dataset]:
    """Windows over Moby Dick and the longest speeches: what follows each context is scored."""
    return _read_on([*data.rows("kvsched/moby-dick"), *data.rows("kvsched/speeches")], metadata)


def manual(**metadata: Any) -> dict[str, Dataset]:
    """Windows over this Python's manual, which needs no download: what follows each context is scored."""
    return _read_on([{"title": title, "text": text} for title, text in sorted(topics.items())], metadata)


def _read_on(texts: list[Row], metadata: Row) -> dict[str, Dataset]:
    tokenizer = _tokenizer(metadata)
    windows = []
    for length in metadata.get("max_seq_lengths", [CONTEXT]):
        for text in texts:
            if len(text["text"]) >= 3 * (length + CONTINUATION):
                windows += list(_windows(tokenizer, text, length))
    return _test(_shuffled(windows))


def _windows(tokenizer: Any, text: Row, length: int) -> Iterator[Row]:
    found = tokenizer(text["text"], return_offsets_mapping=True)
    begins = [begin for begin, _ in found.offset_mapping]
    step = length + CONTINUATION
    for first in range(0, len(begins) - step, step):
        start, middle, end = begins[first], begins[first + length], begins[first + step]
        yield {
            "id": f"{text['title']}:{first}",
            "context": text["text"][start:middle],
            "continuation": text["text"][middle:end],
        }


def _shuffled(rows: list[Row]) -> list[Row]:
    """In an order of their own, so that a limited run asks about many texts."""
    return random.Random(SEED).sample(rows, len(rows))


def _tokenizer(metadata: dict[str, Any]) -> Any:
    return get_tokenizer(resolve_tokenizer_name(metadata))


def _test(rows: Iterable[Row]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(list(rows))}
