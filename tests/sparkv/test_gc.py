from __future__ import annotations

import os
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import kvsched
from kvsched import cli
from kvsched.errors import StoreError
from kvsched.sparkv.gc import CollectReport, collect
from kvsched.sparkv.manifest import ChunkEntry, Manifest, chunk_path, manifest_path
from kvsched.sparkv.store import Store

DAY = 24 * 3600


def put(folder: Path, path: str, data: bytes, days: float) -> None:
    """An object that was written `days` ago."""
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    os.utime(file, (time.time() - days * DAY,) * 2)


def publish(folder: Path, names: Iterable[str], days: float) -> None:
    """A prefix with a chunk for each name and a manifest at each boundary; what is there already stays."""
    addresses = [(name * 64)[:64] for name in names]
    entries = tuple(ChunkEntry(address, 8, "c" * 64, (992,)) for address in addresses)
    for index, address in enumerate(addresses):
        manifest = Manifest("f" * 64, "lossless", 32, entries[: index + 1]).to_bytes()
        for path, data in ((chunk_path(address), bytes(1000)), (manifest_path(address), manifest)):
            if not (folder / path).exists():
                put(folder, path, data, days)


def left(folder: Path, kind: str) -> str:
    return "".join(sorted(path.stem[0] for path in (folder / kind).rglob("*") if path.is_file()))


def expect_whole(folder: Path) -> None:
    """Whatever a reader can find is there."""
    for path in (folder / "manifests").rglob("*.json"):
        for chunk in Manifest.parse(path.read_bytes()).chunks:
            assert (folder / chunk_path(chunk.address)).exists()


def test_old_prefixes_go_and_what_a_newer_one_stands_on_stays(tmp_path: Path) -> None:
    publish(tmp_path, "abc", days=40)
    publish(tmp_path, "abde", days=10)
    publish(tmp_path, "12", days=50)
    report = collect(Store(tmp_path), older_than=timedelta(days=30))
    assert left(tmp_path, "chunks") == left(tmp_path, "manifests") == "abde"
    assert (report.manifests, report.chunks) == (3, 3)
    assert report.bytes_kept == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    expect_whole(tmp_path)


def test_the_oldest_go_until_the_rest_fits_the_deepest_first(tmp_path: Path) -> None:
    publish(tmp_path, "abcd", days=40)
    publish(tmp_path, "ef", days=10)
    total = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    collect(Store(tmp_path), max_bytes=total)
    assert left(tmp_path, "chunks") == "abcdef"
    collect(Store(tmp_path), max_bytes=total - 1)
    assert left(tmp_path, "chunks") == left(tmp_path, "manifests") == "abcef"
    collect(Store(tmp_path), max_bytes=3000)
    assert left(tmp_path, "chunks") == left(tmp_path, "manifests") == "ef"
    collect(Store(tmp_path), max_bytes=1)
    assert left(tmp_path, "chunks") == left(tmp_path, "manifests") == ""


def test_orphans_go_after_the_grace_period(tmp_path: Path) -> None:
    publish(tmp_path, "ab", days=5)
    put(tmp_path, chunk_path("c" * 64), b"interrupted long ago", days=2)
    put(tmp_path, chunk_path("d" * 64), b"being published", days=0.5)
    assert collect(Store(tmp_path)).chunks == 1
    assert left(tmp_path, "chunks") == "abd"


def test_a_manifest_that_nobody_can_read_goes(tmp_path: Path) -> None:
    publish(tmp_path, "ab", days=5)
    put(tmp_path, manifest_path("e" * 64), b"{}", days=0)
    assert collect(Store(tmp_path)).manifests == 1
    assert left(tmp_path, "manifests") == "ab"


def test_a_dry_run_says_the_same_and_deletes_nothing(tmp_path: Path) -> None:
    publish(tmp_path, "abc", days=40)
    publish(tmp_path, "12", days=5)
    put(tmp_path, chunk_path("d" * 64), b"orphan", days=2)
    before = sorted(tmp_path.rglob("*"))
    planned = collect(Store(tmp_path), timedelta(days=30), dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert planned == collect(Store(tmp_path), timedelta(days=30))
    assert planned.chunks == 4


class Watched(Store):
    """Calls `between` after manifests were deleted and before chunks are."""

    def __init__(self, folder: Path, between) -> None:
        super().__init__(folder)
        self.between = between

    def delete(self, paths) -> None:
        if any(path.startswith("chunks") for path in paths):
            self.between()
        super().delete(paths)


def test_manifests_go_before_chunks(tmp_path: Path) -> None:
    publish(tmp_path, "abc", days=40)

    def between() -> None:
        assert (left(tmp_path, "manifests"), left(tmp_path, "chunks")) == ("", "abc")

    collect(Watched(tmp_path, between), older_than=timedelta(days=30))
    assert left(tmp_path, "chunks") == ""


def test_what_is_published_meanwhile_keeps_its_chunks(tmp_path: Path) -> None:
    publish(tmp_path, "abc", days=40)
    store = Store(tmp_path)
    delete = store.delete

    def first_delete(paths) -> None:
        store.delete = delete  # type: ignore[method-assign]
        delete(paths)
        publish(tmp_path, "abf", days=0)

    store.delete = first_delete  # type: ignore[method-assign]
    collect(store, older_than=timedelta(days=30))
    assert left(tmp_path, "chunks") == left(tmp_path, "manifests") == "abf"
    expect_whole(tmp_path)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.text("12", min_size=1, max_size=4), st.integers(0, 60)), max_size=6),
    st.none() | st.integers(0, 60),
    st.none() | st.integers(0, 20_000),
)
def test_a_reader_never_finds_half_a_prefix(tmp_path_factory, prefixes, days, size) -> None:
    folder = tmp_path_factory.mktemp("store")
    for names, age in prefixes:
        # A name stands for all tokens so far, as an address does.
        publish(folder, [f"{int(names[: index + 1], 3):02x}" for index in range(len(names))], age)
    collect(Store(folder), None if days is None else timedelta(days=days), size)
    expect_whole(folder)
    if size is not None:
        stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert stored <= size
    collect(Store(folder), max_bytes=1)
    assert left(folder, "chunks") == left(folder, "manifests") == ""


def test_a_reader_whose_chunks_are_gone_computes(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), torch.arange(1, 100)[None]
    config = kvsched.SparKVConfig(store=tmp_path, chunk_tokens=16, planner="stream")
    kvsched.publish(model, ids, config=config)
    cache = kvsched.SparKVCache(model.config, config)
    get = Store.get

    async def collected_right_after(store: Store, path: str, limit: int) -> bytes:
        data = await get(store, path, limit)
        monkeypatch.setattr(Store, "get", get)
        collect(Store(tmp_path), max_bytes=1)
        return data

    monkeypatch.setattr(Store, "get", collected_right_after)
    report = cache.load(model, ids)
    assert left(tmp_path, "chunks") == "" and report.loaded_tokens == 96 and report.fallback is not None
    with torch.no_grad():
        logits = model(ids[:, 96:], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids).logits[:, 96:], atol=1e-4, rtol=0)


def test_a_store_behind_http_cannot_be_collected() -> None:
    with pytest.raises(StoreError, match="cannot list"):
        collect(Store("http://127.0.0.1:9", connect_timeout=0.5))


def test_an_empty_folder_is_no_error(tmp_path: Path) -> None:
    assert collect(Store(tmp_path)) == CollectReport(0, 0, 0, 0)


def test_the_command(tmp_path: Path) -> None:
    publish(tmp_path, "abc", days=40)
    for arguments, said in (
        (["--older-than", "5w"], "would delete 3 manifests and 3 chunks"),
        (["--max-size", "2kB"], "would delete 2 manifests and 2 chunks"),
        (["--older-than", "7w"], "would delete 0 manifests and 0 chunks"),
    ):
        result = CliRunner().invoke(cli.app, ["gc", str(tmp_path), *arguments, "--dry-run"])
        assert result.exit_code == 0 and result.stdout.startswith(said)
    assert left(tmp_path, "chunks") == "abc"
    assert CliRunner().invoke(cli.app, ["gc", str(tmp_path), "--older-than", "5w"]).stdout.startswith("deleted 3")
    assert left(tmp_path, "chunks") == ""
    refused = CliRunner().invoke(cli.app, ["gc", str(tmp_path), "--older-than", "30 years"])
    assert refused.exit_code == 1 and "is not a duration" in refused.stderr
