from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvsched
from kvsched.errors import ConfigError, InputError, StoreError

IDS = torch.randint(0, 256, (1, 100), generator=torch.Generator().manual_seed(0))
SMALL = {"chunk_tokens": 16}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_whole_chunks_and_a_manifest_each_are_written(tiny_model, tmp_path: Path) -> None:
    report = kvsched.publish(tiny_model("qwen2"), IDS, store=f"file://{tmp_path}/new", config=SMALL)
    written = files(tmp_path / "new")
    assert (report.tokens, report.chunks, report.chunks_written) == (96, 6, 6)
    assert sorted({Path(name).suffix for name in written}) == [".json", ".kv"] and len(written) == 12
    assert report.bytes_written == sum(map(len, written.values()))
    assert report.kv_bytes == 3 * 2 * 2 * 96 * 16 * 4  # layers, K and V, heads, tokens, head_dim, float32


def test_publishing_again_writes_nothing(tiny_model, tmp_path: Path) -> None:
    kvsched.publish(tiny_model("qwen2"), IDS, store=tmp_path, config=SMALL)
    before = files(tmp_path)
    report = kvsched.publish(tiny_model("qwen2"), IDS, store=tmp_path, config=SMALL)
    assert (report.chunks_written, report.bytes_written) == (0, 0) and files(tmp_path) == before


def test_a_longer_context_adds_only_what_is_new(tiny_model, tmp_path: Path) -> None:
    kvsched.publish(tiny_model("qwen2"), IDS[:, :48], store=tmp_path, config=SMALL)
    before = files(tmp_path)
    report = kvsched.publish(tiny_model("qwen2"), IDS, store=tmp_path, config=SMALL)
    after = files(tmp_path)
    assert report.chunks_written == 3 and before.items() <= after.items() and len(after) == 12


def test_an_interrupted_publication_is_completed(tiny_model, tmp_path: Path) -> None:
    kvsched.publish(tiny_model("qwen2"), IDS, store=tmp_path, config=SMALL)
    whole = files(tmp_path)
    for name in [*sorted(whole)[:2], *sorted(whole)[-2:]]:
        (tmp_path / name).unlink()
    kvsched.publish(tiny_model("qwen2"), IDS, store=tmp_path, config=SMALL)
    assert files(tmp_path) == whole


def test_the_configuration_can_name_the_store(tiny_model, tmp_path: Path) -> None:
    config = kvsched.SparKVConfig(store=str(tmp_path), codec="lossless", chunk_tokens=16)
    assert kvsched.publish(tiny_model("qwen2"), IDS, config=config).chunks == 6


def test_no_store_is_an_error(tiny_model) -> None:
    with pytest.raises(ConfigError, match="needs a store"):
        kvsched.publish(tiny_model("qwen2"), IDS)


@pytest.mark.parametrize(
    "ids", [IDS[0], IDS[:, :15], IDS.expand(2, -1)], ids=["one dimension", "too short", "two rows"]
)
def test_ids_that_are_not_one_row_of_a_chunk(tiny_model, tmp_path: Path, ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"\[1, n\]"):
        kvsched.publish(tiny_model("qwen2"), ids, store=tmp_path, config=SMALL)


def test_a_store_that_is_no_folder_inside(tiny_model, tmp_path: Path) -> None:
    (tmp_path / "chunks").write_text("a file where a folder is needed")
    with pytest.raises(StoreError, match=str(tmp_path)):
        kvsched.publish(tiny_model("qwen2"), IDS, store=tmp_path, config=SMALL)
