"""kvpress as one more cache: its process, what it is asked, and that a press which keeps everything is exact."""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import platformdirs
import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from typer.testing import CliRunner

from kvsched.errors import ConfigError, PackageError
from kvsched_evals import peers
from kvsched_evals.measure import Prompts
from kvsched_evals.peers import KVPressLM, Pressed, Read, Worker
from kvsched_evals.suite import Variant

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3
ECHO = """
import json, sys
print('{"ready": true}', flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps({"seconds": 2.0, "press_seconds": 0.5, "held": len(asked["prefill"])}), flush=True)
"""


class FirstPress:
    """As much of a press as is used of one: keeps the first tokens of a prompt."""

    def __init__(self, compression_ratio: float) -> None:
        self.ratio = compression_ratio

    def compress(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = int(keys.shape[2] * (1 - self.ratio))
        return keys[:, :, :kept], values[:, :, :kept]

    @contextlib.contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        def prune(module: Any, given: Any, options: dict[str, Any], output: Any) -> None:
            layer = options["past_key_values"].layers[module.layer_idx]
            layer.keys, layer.values = self.compress(layer.keys, layer.values)

        hooks = [layer.self_attn.register_forward_hook(prune, with_kwargs=True) for layer in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()


class InProcess:
    """Answers as the process does, through JSON, without one."""

    def __init__(self, model: PreTrainedModel) -> None:
        worker = importlib.import_module("kvsched_evals.peers_kvpress")
        self.cache = worker.PressedCache(model)

    def ask(self, request: Mapping[str, Any], kind: type[peers.AnswerT]) -> peers.AnswerT:
        return kind.model_validate_json(json.dumps(self.cache.answer(json.loads(json.dumps(request)))))


@pytest.fixture
def in_process(tiny_model, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(SnapKVPress=FirstPress))  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "kvsched_evals.peers_kvpress", raising=False)
    return InProcess(tiny_model("qwen2"))


@pytest.fixture
def kvpress_lm(tiny_model, byte_tokenizer, in_process: InProcess) -> Any:
    def build(budget: float) -> KVPressLM:
        variant = Variant("kvpress", "snapkv", budget)
        return KVPressLM(tiny_model("qwen2"), byte_tokenizer, variant, Prompts(), in_process)  # type: ignore[arg-type]

    return build


@pytest.mark.parametrize(("budget", "kept"), [(1.0, 236), (0.25, 59 + 16 + 64)])
def test_the_press_keeps_a_budget_beside_sinks_and_recent_tokens(
    kvpress_lm, tiny_model, byte_tokenizer, budget: float, kept: int
) -> None:
    model, ids = tiny_model("qwen2"), torch.tensor([byte_tokenizer(TEXT).input_ids])
    assert ids.shape[1] == 237
    lm = kvpress_lm(budget)
    cache = lm.prefill(ids[:, :-1], torch.ones(1, 236, dtype=torch.long))
    assert (cache.get_seq_length(), cache.dram_bytes) == (236, kept * 3 * 2 * 2 * 16 * 4)
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=plain)
        for layer in plain.layers:
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
        more, places = torch.cat([ids[:, -1:], ids[:, :4]], dim=1), torch.arange(236, 241)[None]
        expected = model(more, past_key_values=plain, position_ids=places).logits
    mask = torch.ones(1, 241, dtype=torch.long)
    torch.testing.assert_close(lm._forward(more, mask, cache), expected, atol=1e-4, rtol=0)
    assert (cache.get_seq_length(), cache.dram_bytes) == (241, (kept + 5) * 3 * 2 * 2 * 16 * 4)
    cache.crop(-4)
    torch.testing.assert_close(lm._forward(more[:, 1:2], mask, cache), expected[:, 1:2], atol=1e-4, rtol=0)
    assert cache.dram_bytes == (kept + 2) * 3 * 2 * 2 * 16 * 4, "what was cropped is still held"


def test_only_the_press_takes_time(kvpress_lm, in_process: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = kvpress_lm(0.25)
    monkeypatch.setattr(lm._worker, "ask", lambda request, kind: Pressed(seconds=3.0, press_seconds=1.0, held=1))
    lm.prefill(torch.ones(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.long))
    assert lm.shared_seconds == pytest.approx(2.0 + lm.prefill_seconds)


def test_an_unknown_press_is_refused(tiny_model, byte_tokenizer, in_process: InProcess) -> None:
    with pytest.raises(ConfigError, match="snapkv, expected-attention"):
        KVPressLM(tiny_model("qwen2"), byte_tokenizer, Variant("kvpress", "dynakv", 0.1), Prompts(), in_process)  # type: ignore[arg-type]


def test_a_process_answers_line_by_line_and_ends() -> None:
    with Worker([sys.executable, "-c", ECHO]) as worker:
        for length in (3, 0):
            assert worker.ask({"prefill": [1] * length}, Pressed) == Pressed(seconds=2, press_seconds=0.5, held=length)
        with pytest.raises(PackageError, match=r"did not answer as asked .*make kvpress"):
            worker.ask({"prefill": []}, Read)
    assert worker._process.poll() is not None


@pytest.mark.parametrize("code", ["print('hello')", "raise ValueError('no such model')", ECHO])
def test_a_process_that_goes_wrong_says_why(code: str) -> None:
    said = pytest.raises(PackageError, match=r"as asked|no such model|KeyError: 'prefill'")
    with said, Worker([sys.executable, "-c", code]) as worker:
        worker.ask({"read": [1], "at": 0}, Read)


def test_logits_come_as_they_are() -> None:
    sent = np.array([1.5, -2.0], dtype="<f4")
    line = json.dumps({"logits": base64.b64encode(sent.tobytes()).decode(), "held": 0})
    assert np.frombuffer(Read.model_validate_json(line).logits, dtype="<f4").tolist() == [1.5, -2.0]


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path


def test_without_an_environment_the_command_is_named(cache_folder: Path) -> None:
    with pytest.raises(PackageError, match="run `make kvpress`"):
        peers.environment()


@pytest.mark.parametrize("returncode", [0, 1])
def test_the_environment_is_made_once_and_whole_or_not_at_all(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, returncode: int
) -> None:
    ran: list[list[str]] = []

    def run(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
        ran.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, returncode, "", "no such package")

    monkeypatch.setattr(peers.venv, "create", lambda folder, **options: folder.mkdir())
    monkeypatch.setattr(peers.subprocess, "run", run)
    made = [CliRunner().invoke(peers.app, []) for _ in range(2)]
    assert [one.exit_code for one in made] == [returncode] * 2
    assert len(ran) == 1 + returncode
    assert ran[0][-2:] == ["-r", str(peers.REQUIREMENTS)]
    if returncode:
        assert "no such package" in made[0].stderr
        assert not list((cache_folder / "kvsched" / "evals").glob("kvpress-*/"))
    else:
        assert peers.environment().parent.parent == Path(made[0].stdout.strip())


def test_everything_in_the_environment_is_pinned() -> None:
    lines = [line for line in peers.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+", line) for line in lines)
    (found,) = peers.versions([Variant("kvpress", "snapkv", 0.1)]).items()
    assert found[0] == "kvpress" and re.fullmatch(r"[\d.]+ \(transformers [\d.]+\)", found[1])
    assert peers.versions([Variant("full"), Variant("hf-quantized", codec="quanto-int4")]) == {}
