from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import kvsched
from kvsched import hub
from kvsched.cli import app
from kvsched.errors import ConfigError, InputError, StoreError
from kvsched.sparkv import publish
from kvsched.sparkv.forward import PrefixCache
from kvsched.sparkv.manifest import Manifest, chunk_path
from kvsched.sparkv.store import Store

IDS = torch.randint(0, 256, (1, 100), generator=torch.Generator().manual_seed(0))
SMALL = {"codec": "lossless", "chunk_tokens": 16}


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


@pytest.mark.parametrize("begun", [False, True])
def test_what_is_computed_already_is_not_computed_again(tiny_model, tmp_path: Path, monkeypatch, begun: bool) -> None:
    model, cache = tiny_model("gemma3"), PrefixCache(tiny_model("gemma3").config, IDS.shape[1])
    cache.compute(model, IDS, 0)
    if begun:
        kvsched.publish(model, IDS[:, :48], store=tmp_path, config=SMALL)
    monkeypatch.setattr(PrefixCache, "compute", None)
    report = kvsched.publish(model, IDS, store=tmp_path, config=SMALL, computed=cache)
    assert report.chunks_written == (3 if begun else 6)
    monkeypatch.undo()
    loaded = kvsched.SparKVCache(model.config, {**SMALL, "store": tmp_path, "planner": "stream"})
    loaded.load(model, IDS)
    assert loaded.get_seq_length() == 96
    full = loaded.layers[1]
    torch.testing.assert_close(full.keys, cache.layers[1].keys[:, :, :96], atol=1e-4, rtol=0)


def test_an_interrupted_publication_is_completed(tiny_model, tmp_path: Path) -> None:
    kvsched.publish(tiny_model("qwen2"), IDS, store=tmp_path, config=SMALL)
    whole = files(tmp_path)
    for name in [*sorted(whole)[:2], *sorted(whole)[-2:]]:
        (tmp_path / name).unlink()
    kvsched.publish(tiny_model("qwen2"), IDS, store=tmp_path, config=SMALL)
    assert files(tmp_path) == whole


class PutError(Exception):
    """The publisher dies here."""


@pytest.mark.parametrize("puts", range(9))
def test_a_publisher_may_die_between_any_two_puts(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, puts: int
) -> None:
    model, put, left = tiny_model("llama"), Store.put, puts
    kvsched.publish(model, IDS[:, :64], store=tmp_path / "whole", config=SMALL)

    def dying(store: Store, *arguments, **options) -> bool:
        nonlocal left
        if left == 0:
            raise PutError
        left -= 1
        return put(store, *arguments, **options)

    monkeypatch.setattr(Store, "put", dying)
    if puts < 8:
        with pytest.raises(PutError):
            kvsched.publish(model, IDS[:, :64], store=tmp_path / "cut", config=SMALL)
    else:
        kvsched.publish(model, IDS[:, :64], store=tmp_path / "cut", config=SMALL)
    expect_loadable(model, tmp_path / "cut", chunks=puts // 2)
    monkeypatch.setattr(Store, "put", put)
    kvsched.publish(model, IDS[:, :64], store=tmp_path / "cut", config=SMALL)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def expect_loadable(model, store: Path, chunks: int, ids: torch.Tensor = IDS) -> None:
    """That many chunks stream without a fallback and give the logits of a full prefill."""
    cache = kvsched.SparKVCache(model.config, store=store, planner="stream", **SMALL)
    report = cache.load(model, ids)
    assert report.loaded_tokens == 16 * chunks and report.depths == (0,) * chunks
    assert report.fallback is None or chunks == 0
    with torch.no_grad():
        logits = model(ids[:, 16 * chunks :], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids).logits[:, 16 * chunks :], atol=1e-4, rtol=0)


def test_the_published_beginning_is_read_not_computed(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, computed = tiny_model("qwen2"), []
    kvsched.publish(model, IDS[:, :48], store=tmp_path, config=SMALL)
    compute = publish.PrefixCache.compute

    def note(cache, model, token_ids, start, *arguments) -> None:
        computed.append(start)
        compute(cache, model, token_ids, start, *arguments)

    monkeypatch.setattr(publish.PrefixCache, "compute", note)
    kvsched.publish(model, IDS, store=tmp_path, config=SMALL)
    assert [start for start in computed if start < 48] == []
    monkeypatch.undo()
    expect_loadable(model, tmp_path, chunks=6)


def test_what_another_publisher_has_put_is_kept_and_described(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine's numbers differ in the last bit: manifests have to be of the object that is there."""
    model, encode = tiny_model("llama"), publish.Coder.encode

    def slightly_different(coder, position, layers):
        return encode(coder, position, [(keys * (1 + 1e-6), values) for keys, values in layers])

    monkeypatch.setattr(publish.Coder, "encode", slightly_different)
    kvsched.publish(model, IDS, store=tmp_path, config=SMALL)
    theirs = files(tmp_path)
    for path in (tmp_path / "manifests").rglob("*.json"):
        path.unlink()
    monkeypatch.setattr(publish.Coder, "encode", encode)
    report = kvsched.publish(model, IDS, store=tmp_path, config=SMALL)
    assert report.chunks_written == 0 and files(tmp_path) == theirs
    expect_loadable(model, tmp_path, chunks=6)


def test_what_a_lossy_codec_gives_back_is_not_computed_on(tiny_model, tmp_path: Path) -> None:
    """Its errors would enter every chunk that is appended."""
    model, lossy = tiny_model("llama"), {"chunk_tokens": 16}
    assert kvsched.SparKVConfig().codec == "balanced"
    kvsched.publish(model, IDS, store=tmp_path / "whole", config=lossy)
    kvsched.publish(model, IDS[:, :48], store=tmp_path / "grown", config=lossy)
    assert kvsched.publish(model, IDS, store=tmp_path / "grown", config=lossy).chunks_written == 3
    assert files(tmp_path / "grown") == files(tmp_path / "whole")


def test_two_publishers_at_once(tiny_model, tmp_path: Path) -> None:
    models = [tiny_model("llama"), tiny_model("llama")]
    tasks = [
        threading.Thread(target=kvsched.publish, args=(model, IDS), kwargs={"store": tmp_path, "config": SMALL})
        for model in models
    ]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    assert len(files(tmp_path)) == 12
    expect_loadable(models[0], tmp_path, chunks=6)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], lambda data: b"x" + data[1:]])
def test_an_unusable_object_without_a_manifest_is_replaced(tiny_model, tmp_path: Path, damage) -> None:
    model = tiny_model("llama")
    kvsched.publish(model, IDS, store=tmp_path, config=SMALL)
    whole = files(tmp_path)
    last = json.loads(max(whole.items(), key=lambda item: len(item[1]) if item[0].endswith("json") else 0)[1])
    address = last["chunks"][-1]["address"]
    (tmp_path / chunk_path(address)).write_bytes(damage(whole[chunk_path(address)]))
    (tmp_path / f"manifests/{address[:2]}/{address}.json").unlink()
    assert kvsched.publish(model, IDS, store=tmp_path, config=SMALL).chunks_written == 1
    assert files(tmp_path) == whole


def test_unreadable_manifests_are_replaced(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    kvsched.publish(model, IDS, store=tmp_path, config=SMALL)
    whole = files(tmp_path)
    for path in (tmp_path / "manifests").rglob("*.json"):
        path.write_bytes(b"{}")
    assert kvsched.publish(model, IDS, store=tmp_path, config=SMALL).chunks_written == 0
    assert files(tmp_path) == whole


@pytest.mark.parametrize("published", [0, 48, 96])
def test_a_dry_run_writes_nothing_and_knows_what_would_be(tiny_model, tmp_path: Path, published: int) -> None:
    model = tiny_model("qwen2")
    if published:
        kvsched.publish(model, IDS[:, :published], store=tmp_path, config=SMALL)
    before = files(tmp_path)
    planned = kvsched.publish(model, IDS, store=tmp_path, config=SMALL, dry_run=True)
    assert files(tmp_path) == before
    report = kvsched.publish(model, IDS, store=tmp_path, config=SMALL)
    chunk_bytes = sum(len(data) for name, data in files(tmp_path).items() if name.endswith("kv") and name not in before)
    assert (planned.chunks_written, planned.kv_bytes) == (report.chunks_written, report.kv_bytes)
    assert abs(planned.bytes_written - chunk_bytes) <= 0.05 * chunk_bytes


def test_http_is_refused_before_anything_is_computed() -> None:
    model = SimpleNamespace()  # would fail at the first use
    with pytest.raises(StoreError, match="HTTP stores are read-only"):
        kvsched.publish(model, IDS, store="http://127.0.0.1:9/x", config=SMALL)  # type: ignore[arg-type]


def test_tenants_share_a_store_and_nothing_in_it(tiny_model, tmp_path: Path) -> None:
    model, secrets = tiny_model("llama"), ["first tenant's secret", "second tenant's secret", None]
    for count, secret in enumerate(secrets):
        options = {**SMALL, "store": tmp_path, "tenant_secret": secret, "planner": "stream"}
        assert kvsched.SparKVCache(model.config, options).load(model, IDS).loaded_tokens == 0
        assert kvsched.publish(model, IDS, config=options).chunks_written == 6
        assert len(files(tmp_path)) == 12 * (count + 1)
        report = kvsched.SparKVCache(model.config, options).load(model, IDS)
        assert report.loaded_tokens == 96 and report.fallback is None
    everything = b"".join([*files(tmp_path).values(), *map(str.encode, files(tmp_path))])
    assert b"secret" not in everything


def test_a_manifest_without_the_tenants_signature_is_a_local_prefill(tiny_model, tmp_path: Path) -> None:
    model, options = tiny_model("llama"), {**SMALL, "store": tmp_path, "tenant_secret": "a tenant's secret"}
    kvsched.publish(model, IDS, config=options)
    for path in (tmp_path / "manifests").rglob("*.json"):
        path.write_bytes(Manifest.parse(path.read_bytes()).to_bytes())
    report = kvsched.SparKVCache(model.config, options).load(model, IDS)
    assert report.loaded_tokens == 0 and "not signed by this tenant" in str(report.fallback)


class Words:
    """A tokenizer that gives every word its length."""

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[len(word) for word in text.split()])


def test_the_command_publishes_texts_and_ids(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(hub, "load_model", lambda name: (model, Words()))
    (tmp_path / "options.yaml").write_text("chunk_tokens: 16\ntenant_secret: the tenant's secret\n")
    (tmp_path / "text.txt").write_text("four words in each line of " * 20)
    (tmp_path / "ids.json").write_text(json.dumps(IDS[0].tolist()))
    (tmp_path / "bad.json").write_text("[1, -2]")
    options = ["--config", str(tmp_path / "options.yaml"), "--store", str(tmp_path / "store")]

    def run(file: str, *more: str):
        return CliRunner().invoke(app, ["publish", str(tmp_path / file), *options, *more])

    assert "would write 7 of 7 chunks" in run("text.txt", "--dry-run").stdout
    assert files(tmp_path / "store") == {}
    assert "wrote 7 of 7 chunks" in run("text.txt").stdout
    assert "wrote 6 of 6 chunks" in run("ids.json").stdout
    assert "wrote 0 of 6 chunks" in run("ids.json").stdout
    for bad in ("bad.json", "none.txt"):
        assert run(bad).exit_code == 1 and "neither UTF-8 text nor a .json file" in run(bad).stderr


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
