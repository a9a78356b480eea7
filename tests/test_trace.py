"""Traces: what a file must hold, what is recorded of a model, and what a replay measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kvsched import DynaKVConfig, cli, hub
from kvsched.dynakv.policies import POLICIES
from kvsched.errors import ConfigError, InputError, TraceError, UnsupportedModelError
from kvsched.replay import ORACLE, configured, replay, select_layers, table
from kvsched.trace import Trace, _RecordedLayer, record

HEADS, GROUP, DIM, TOKENS, PROMPT = 2, 3, 16, 260, 150
METADATA = {"model": "drawn", "prompt_length": str(PROMPT), "scaling": "0.25"}
KEYS = {
    *("policy", "layer", "head", "step", "recall", "oracle_recall", "error", "error_estimated", "tokens"),
    *("bytes_read", "reads", "run_length", "splits", "bytes_moved"),
}


def tensors(layers: tuple[int, ...] = (0, 3), dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Keys in a few drifting groups, and queries that look for one of them."""
    draw = torch.Generator().manual_seed(0)
    drawn = {}
    for layer in layers:
        centres = 4 * torch.randn(12, DIM, generator=draw)
        topic = torch.randint(0, 12, (HEADS, TOKENS), generator=draw)
        keys = centres[topic] + torch.randn(HEADS, TOKENS, DIM, generator=draw)
        queries = centres[topic.repeat_interleave(GROUP, 0)] * 0.3
        queries = queries + torch.randn(HEADS * GROUP, TOKENS, DIM, generator=draw)
        drawn[f"layers.{layer}.keys"] = keys.to(dtype)
        drawn[f"layers.{layer}.values"] = torch.randn(HEADS, TOKENS, DIM, generator=draw).to(dtype)
        drawn[f"layers.{layer}.queries"] = queries.to(dtype)
    return drawn


def write(path: Path, drawn: dict[str, torch.Tensor] | None = None, **metadata: str | None) -> Path:
    kept = {name: text for name, text in {**METADATA, **metadata}.items() if text is not None}
    save_file(tensors() if drawn is None else drawn, path, kept)
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return Trace.open(write(tmp_path / "trace.safetensors"))


def test_a_trace_says_what_it_holds(trace: Trace) -> None:
    assert (trace.model, trace.prompt_length, trace.scaling) == ("drawn", PROMPT, 0.25)
    assert (trace.layers, trace.tokens, trace.kv_heads, trace.query_heads) == ((0, 3), TOKENS, HEADS, HEADS * GROUP)
    assert torch.equal(trace.layer(3).queries, tensors()["layers.3.queries"])


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.0.keys", None, "lacks layers.0.keys"),
        ("layers.00.keys", torch.zeros(1), "holds a tensor 'layers.00.keys'"),
        ("lm_head.weight", torch.zeros(1), "holds a tensor 'lm_head.weight'"),
        ("layers.0.keys", torch.zeros(HEADS, TOKENS, DIM, dtype=torch.int8), "dtype I8"),
        ("layers.0.keys", torch.zeros(HEADS, TOKENS), r"must be \[heads, tokens, head_dim\]"),
        ("layers.0.keys", torch.zeros(HEADS, 0, DIM), r"must be \[heads, tokens, head_dim\]"),
        ("layers.3.keys", torch.zeros(HEADS, TOKENS, DIM), "all layers must be alike"),
        ("layers.3.keys", torch.zeros(HEADS, TOKENS - 1, DIM).half(), "all layers must be alike"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, name: str, tensor, message: str) -> None:
    drawn = tensors()
    drawn.pop(name, None)
    if tensor is not None:
        drawn[name] = tensor
    with pytest.raises(TraceError, match=message):
        Trace.open(write(tmp_path / "bad.safetensors", drawn))


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("values", (HEADS, TOKENS - 1, DIM), "tokens and dtype must be the same"),
        ("values", (HEADS + 1, TOKENS, DIM), "heads too for keys and values"),
        ("queries", (HEADS * GROUP, TOKENS, DIM + 1), "head_dim for keys and queries"),
        ("queries", (HEADS * GROUP + 1, TOKENS, DIM), "7 query heads cannot share 2 KV heads"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(tmp_path: Path, kind: str, shape, message: str) -> None:
    drawn = {**tensors((0,)), f"layers.0.{kind}": torch.zeros(shape, dtype=torch.float16)}
    with pytest.raises(TraceError, match=message):
        Trace.open(write(tmp_path / "bad.safetensors", drawn))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model": None}, "no metadata 'model'"),
        ({"prompt_length": None}, "no metadata 'prompt_length'"),
        ({"prompt_length": "many"}, "prompt_length='many' is not a number"),
        ({"prompt_length": "0"}, "from 1 to 259"),
        ({"prompt_length": str(TOKENS)}, "from 1 to 259"),
        ({"scaling": None}, "no metadata 'scaling'"),
        ({"scaling": "nan"}, "finite number above zero"),
        ({"scaling": "-1"}, "finite number above zero"),
    ],
)
def test_metadata_that_is_missing_or_wrong_is_refused(tmp_path: Path, metadata, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        Trace.open(write(tmp_path / "bad.safetensors", **metadata))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no trace")
    (tmp_path / "short").write_bytes(write(tmp_path / "good").read_bytes()[:-100])
    for name in ("text", "short", "none", "."):
        with pytest.raises(TraceError, match="kvsched trace record"):
            Trace.open(tmp_path / name)
    save_file({}, tmp_path / "empty", METADATA)
    with pytest.raises(TraceError, match="holds no layers"):
        Trace.open(tmp_path / "empty")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    drawn = tensors()
    drawn["layers.3.values"][1, 5, 2] = float("inf")
    found = Trace.open(write(tmp_path / "bad.safetensors", drawn))
    found.layer(0)
    with pytest.raises(TraceError, match=r"layers\.3\.values holds infinite"):
        found.layer(3)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_what_is_recorded_gives_the_models_own_attention(tiny_model, tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind)
    ids = torch.arange(3, 103)
    outputs: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, given, number=number: outputs.update({number: given[0]})
        )
    made = record(model, ids, 40, tmp_path / "trace", dtype=torch.float32, chunk=33)
    assert made.layers == ((0, 1, 2) if kind == "qwen2" else (1, 3))
    with torch.no_grad():
        model(ids[None])
    for number in made.layers:
        layer = made.layer(number)
        keys, values = (part.repeat_interleave(2, 0) for part in (layer.keys, layer.values))
        score = layer.queries @ keys.mT * made.scaling
        score = score.masked_fill(torch.ones(100, 100, dtype=torch.bool).triu(1), float("-inf"))
        got = (score.softmax(-1) @ values).transpose(0, 1).reshape(1, 100, -1)
        torch.testing.assert_close(got, outputs[number], atol=1e-4, rtol=1e-4)


def test_what_cannot_be_recorded(tiny_model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none to decode"):
        record(tiny_model("qwen2"), torch.arange(3, 43), 40, tmp_path / "trace")
    with pytest.raises(TraceError, match="cannot write"):
        record(tiny_model("qwen2"), torch.arange(3, 43), 10, tmp_path / "none" / "trace")
    states = torch.zeros(1, 2, 5, 8)
    with pytest.raises(UnsupportedModelError, match="caps its scores"):
        _RecordedLayer(torch.float16).attention(None, None, states, states, states, None, softcap=5.0)


@pytest.mark.parametrize("policy", [*POLICIES, ORACLE])
def test_every_policy_measures_the_same_steps(trace: Trace, policy: str) -> None:
    config = configured(policy, DynaKVConfig(budget=48, sinks=4, recent=16))
    outcome = replay(trace, config, trace.layers, every=50)
    assert [(row.step, row.layer, row.head) for row in outcome.rows] == [
        (step, layer, head) for step in (150, 200, 250) for layer in (0, 3) for head in (0, 1)
    ]
    assert outcome.kv_bytes == 2 * 2 * HEADS * TOKENS * DIM * 2
    for row in outcome.rows:
        assert 0 <= row.recall <= row.oracle_recall + 1e-12 <= 1 + 1e-9
        assert row.error >= 0 and row.error_estimated >= 0
        if row.layer >= getattr(POLICIES.get(policy), "dense_layers", 0):
            assert row.tokens <= 48 + 4 + 16 + 15
        else:
            assert (row.tokens, row.recall) == (row.step + 1, 1.0)
    if policy == "oracle":
        assert all(row.recall == row.oracle_recall and row.tokens == 68 for row in outcome.rows)
    assert policy in table([outcome])


@pytest.mark.parametrize("policy", POLICIES)
def test_with_a_budget_for_all_every_policy_is_exact(trace: Trace, policy: str) -> None:
    config = configured(policy, DynaKVConfig(budget=TOKENS, sinks=4, recent=16, dram="96kB"))
    for row in replay(trace, config, trace.layers, every=30).rows:
        assert row.tokens == row.step + 1
        assert row.recall == pytest.approx(1.0) and row.oracle_recall == pytest.approx(1.0)
        assert row.error < 1e-4 and row.error_estimated < 1e-4


def test_a_policy_of_ones_own_is_replayed(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="mine"):
        configured("mine", DynaKVConfig(budget=16))
    monkeypatch.setitem(POLICIES, "mine", POLICIES["local"])
    mine, theirs = (
        replay(trace, configured(name, DynaKVConfig(budget=16)), (0,), 8).rows for name in ("mine", "local")
    )
    assert [row.recall for row in mine] == [row.recall for row in theirs]


def test_a_row_against_attention_by_hand(trace: Trace) -> None:
    """token-topk's choice is known: the best tokens between sinks and window, so every figure can be recomputed."""
    config = configured("token-topk", DynaKVConfig(budget=30, sinks=4, recent=16))
    (row,) = [row for row in replay(trace, config, (3,), every=64).rows if (row.step, row.head) == (214, 1)]
    layer, step = trace.layer(3), 214
    query = layer.queries[GROUP:, step].double()
    score = query @ layer.keys[1, : step + 1].double().mT * 0.25
    weight = score.softmax(-1)
    clustered = PROMPT - 16 + (step + 1 - PROMPT) // 16 * 16  # tokens leave the window 16 at a time
    middle = 4 + weight.mean(0)[4:clustered].topk(30).indices
    attended = torch.cat([torch.arange(4), middle, torch.arange(clustered, step + 1)])
    exact = weight @ layer.values[1, : step + 1].double()
    part = score[:, attended].softmax(-1) @ layer.values[1, attended].double()
    assert row.tokens == len(attended)
    assert row.recall == pytest.approx(float(weight[:, attended].sum(-1).mean()), rel=1e-9)
    assert row.oracle_recall == pytest.approx(float(weight.mean(0).topk(row.tokens).values.sum()), rel=1e-9)
    error = float((part - exact).norm() / exact.norm())
    assert row.error == row.error_estimated == pytest.approx(error, rel=1e-2, abs=1e-5)


def test_reads_are_shared_among_heads_and_add_up(trace: Trace) -> None:
    config = configured("dynakv", DynaKVConfig(budget=48, sinks=4, recent=16, dram="64kB", max_cluster_size=8))
    rows = replay(trace, config, (0, 3), every=1).rows
    assert sum(row.bytes_read for row in rows) > 0
    for row in rows:
        assert (row.reads > 0) == (row.bytes_read > 0) == (row.run_length > 0)
        assert row.run_length == 0 or row.run_length >= 1
    assert sum(row.reads for row in rows) == pytest.approx(round(sum(row.reads for row in rows)))
    assert sum(row.splits for row in rows) > 0
    sparse = replay(trace, config, (0, 3), every=60).rows
    until = sparse[-1].step
    assert sum(row.splits for row in sparse) == sum(row.splits for row in rows if row.step <= until)
    assert sum(row.bytes_moved for row in sparse) == sum(row.bytes_moved for row in rows if row.step <= until)


@pytest.mark.parametrize(("dtype", "prompt"), [(torch.float32, "1"), (torch.bfloat16, "20"), (torch.float16, "259")])
def test_any_dtype_and_prompt(tmp_path: Path, dtype: torch.dtype, prompt: str) -> None:
    drawn = {name: tensor.to(dtype) for name, tensor in tensors((7,)).items()}
    found = Trace.open(write(tmp_path / "trace", drawn, prompt_length=prompt))
    for policy in ("dynakv", "static", "retroinfer"):
        rows = replay(found, configured(policy, DynaKVConfig(budget=32)), (7,), every=1).rows
        assert len(rows) == HEADS * (TOKENS - int(prompt))


def test_the_commands(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "load_model", lambda name: (tiny_model("qwen2"), None))
    (tmp_path / "ids.json").write_text(json.dumps(list(range(3, 250))))
    trace, rows = str(tmp_path / "trace"), tmp_path / "rows.json"
    command = CliRunner()
    arguments = ["trace", "record", str(tmp_path / "ids.json"), trace, "--prompt-length", "128", "--tokens", "200"]
    result = command.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "200 tokens, 128 of them prompt, 3 layers" in result.stdout
    assert load_file(trace)["layers.2.queries"].dtype == torch.float16

    arguments = ["trace", "replay", trace, "--policy", "dynakv", "--policy", "oracle", "--budget", "20", "--sinks", "4"]
    arguments += ["--recent", "16", "--every", "40", "--layers", "0,2", "--json", str(rows)]
    result = command.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads(rows.read_text())
    assert {frozenset(row) for row in written} == {frozenset(KEYS)}
    assert {(row["policy"], row["layer"], row["head"], row["step"]) for row in written} == {
        (policy, layer, head, step)
        for policy in ("dynakv", "oracle")
        for layer in (0, 2)
        for head in (0, 1)
        for step in (128, 168)
    }
    for wrong, message in ((["--policy", "best"], "choose one of"), (["--layers", "5"], "no layer 5")):
        result = command.invoke(cli.app, ["trace", "replay", trace, *wrong])
        assert (result.exit_code, message in result.stderr) == (1, True)


def test_layers_that_are_no_numbers_are_refused(trace: Trace) -> None:
    assert select_layers(trace, None) == select_layers(trace, "3,0") == (0, 3)
    with pytest.raises(ConfigError, match="separated by commas"):
        select_layers(trace, "0-3")
