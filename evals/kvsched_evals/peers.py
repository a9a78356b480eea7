"""Peers that nobody here wrote, each asked as one more cache of a suite: transformers' QuantizedCache, and kvpress.

kvpress prunes the keys and values of a prompt once they are computed. It wants an older transformers than kvsched, so
it runs in an environment of its own, which `make kvpress` makes, and is spoken to in JSON lines (`peers_kvpress.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import platformdirs
import torch
import typer
from filelock import FileLock
from lm_eval.models.utils_hf import stop_sequences_criteria
from pydantic import Base64Bytes, BaseModel, ConfigDict, ValidationError
from transformers import EosTokenCriteria, MaxLengthCriteria, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, QuantizedCache

from kvsched import DynaKVConfig
from kvsched.errors import ConfigError, PackageError

from .measure import MeasuredLM, Prompts
from .results import Count, Seconds
from .suite import SUITES, Variant

COMMAND = "make kvpress"
REQUIREMENTS = SUITES / "kvpress.txt"
PRESSES = {"snapkv": "SnapKVPress", "expected-attention": "ExpectedAttentionPress"}
"""Policies of `kvpress`, and its classes."""

_WORKER = Path(__file__).with_name("peers_kvpress.py")
_LAST_WORDS = 500  # characters of what a process said before it ended


@contextlib.contextmanager
def opened(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, variants: Sequence[Variant]
) -> Iterator[list[MeasuredLM]]:
    """The model with each cache of a suite; a peer's process runs as long as the context.

    Raises:
        ConfigError: a cache is not configured rightly.
        PackageError: a peer has no environment on this machine.
    """
    prompts = Prompts()
    with contextlib.ExitStack() as stack:
        pruning = any(variant.cache == "kvpress" for variant in variants)
        worker = stack.enter_context(Worker.start(model)) if pruning else None

        def measured(variant: Variant) -> MeasuredLM:
            if variant.cache == "kvpress":
                assert worker is not None
                return KVPressLM(model, tokenizer, variant, prompts, worker)
            kind = QuantizedLM if variant.cache == "hf-quantized" else MeasuredLM
            return kind(model, tokenizer, variant, prompts)

        yield [measured(variant) for variant in variants]


def versions(variants: Sequence[Variant]) -> dict[str, str]:
    """What a suite uses of other environments: names of libraries and their versions."""
    if not any(variant.cache == "kvpress" for variant in variants):
        return {}
    pinned = dict(line.split("==") for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#"))
    return {"kvpress": f"{pinned['kvpress']} (transformers {pinned['transformers']})"}


class QuantizedLM(MeasuredLM):
    """The model with transformers' QuantizedCache; the codec is its backend and bits, `quanto-int4`."""

    def new_cache(self) -> Cache:
        backend, _, bits = str(self.variant.codec).partition("-int")
        return QuantizedCache(backend, self.model.config, **({"nbits": int(bits)} if bits else {}))

    def rewound(self, cache: Cache, tokens: int) -> Cache:
        """The cache as it was after the prompt, since it cannot be cropped."""
        return self.taken(self._prompts.last)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Ready(_Answer):
    """The model is loaded."""

    ready: Literal[True]


class Pressed(_Answer):
    """A prompt is taken in.

    Args:
        seconds: that it took, `press_seconds` of them to choose and prune.
        held: bytes of keys and values.
    """

    seconds: Seconds
    press_seconds: Seconds
    held: Count


class Read(_Answer):
    """Tokens are read.

    Args:
        logits: float32 `[tokens, vocabulary]`, of what follows each.
        held: bytes of keys and values.
    """

    logits: Base64Bytes
    held: Count


AnswerT = TypeVar("AnswerT", bound=_Answer)


class Worker:
    """A process that answers requests, a JSON line each; a context, at whose end it has ended.

    Args:
        command: starts it.

    Raises:
        PackageError: it ended, or said something else than was asked.
    """

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)
        try:
            self._answer(Ready)
        except PackageError:
            self.close()
            raise

    @classmethod
    def start(cls, model: PreTrainedModel) -> Worker:
        """A process with the same model on the same device, in the environment of kvpress."""
        dtype = str(model.dtype).removeprefix("torch.")
        options = [model.name_or_path, dtype, str(model.device), str(torch.get_num_threads())]
        return cls([environment(), "-I", _WORKER, *options])

    def ask(self, request: Mapping[str, Any], kind: type[AnswerT]) -> AnswerT:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._ended()
        return self._answer(kind)

    def _answer(self, kind: type[AnswerT]) -> AnswerT:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            self._ended()
        try:
            return kind.model_validate_json(line)
        except ValidationError as error:
            raise PackageError(f"kvpress did not answer as asked ({error.errors()[0]['msg']}): {_renew()}") from error

    def _ended(self) -> NoReturn:
        self._process.wait()
        self._said.seek(0)
        words = self._said.read().decode(errors="replace").strip()[-_LAST_WORDS:]
        raise PackageError(f"the process of kvpress ended with {self._process.returncode}: {words}")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError), self._process as process:  # it may not have read everything
            process.kill()  # it keeps nothing
        self._said.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass
class RemoteCache:
    """Stands here for the cache in kvpress's process.

    Args:
        tokens: of the text that it has read, pruned ones included.
        dram_bytes: of the keys and values that are left.
    """

    tokens: int
    dram_bytes: int

    def get_seq_length(self) -> int:
        return self.tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens; the process does when it reads on from there."""
        self.tokens += tokens_to_remove

    def report(self) -> RemoteCache:
        return self


class KVPressLM(MeasuredLM):
    """The model with a press of kvpress, which keeps as many tokens of a prompt as DynaKV attends to at this budget.

    It answers greedily, as kvpress's own pipeline does. Its process computes each prompt again, which is nobody's time
    here but for what the press takes.

    Args:
        worker: the process.

    Raises:
        ConfigError: the policy is no press.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        variant: Variant,
        prompts: Prompts,
        worker: Worker,
    ) -> None:
        if variant.policy not in PRESSES:
            raise ConfigError(f"policy={variant.policy!r} of kvpress: choose one of {', '.join(PRESSES)}.")
        self._worker, self._press = worker, PRESSES[variant.policy]
        super().__init__(model, tokenizer, variant, prompts)

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        self.prefilled(ids)
        defaults = DynaKVConfig()
        keep = self.budget + defaults.sinks + defaults.recent
        request = {"prefill": ids[0].tolist(), "press": self._press, "keep": keep}
        pressed = self._worker.ask(request, Pressed)
        self.shared_seconds += pressed.seconds - pressed.press_seconds
        return RemoteCache(ids.shape[1], pressed.held)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, **kwargs: Any) -> torch.Tensor:
        read = self._worker.ask({"read": ids[0].tolist(), "at": cache.tokens}, Read)
        cache.tokens, cache.dram_bytes = cache.tokens + ids.shape[1], read.held
        logits = torch.frombuffer(bytearray(read.logits), dtype=torch.float32)
        return logits.view(1, ids.shape[1], -1).to(self.device)

    def decoded(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        mask = generation_kwargs["attention_mask"]
        cache, ids = self.prefill(context[:, :-1], mask[:, :-1]), context
        logits: list[torch.Tensor] = []
        done = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], 1)
        done.append(MaxLengthCriteria(max_length))
        if (end := self.model.generation_config.eos_token_id) is not None:
            done.append(EosTokenCriteria(end))
        while not logits or not bool(done(ids, None)):
            logits.append(self._forward(ids[:, -1:], mask, cache)[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
        return ids, torch.cat(logits), cache


def environment() -> Path:
    """The interpreter of the environment of kvpress.

    Raises:
        PackageError: it was not made on this machine, or from other requirements.
    """
    if not (_folder() / "installed").exists():
        raise PackageError(f"kvpress has no environment on this machine: run `{COMMAND}`.")
    return _folder() / "bin" / "python"


def make_environment() -> Path:
    """Make the environment of kvpress, unless it is there, and return its folder.

    Raises:
        PackageError: a package could not be had.
    """
    folder = _folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "installed").exists():
            venv.create(folder, clear=True, with_pip=True)
            pip = [str(folder / "bin" / "python"), "-I", "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)]
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode:
                shutil.rmtree(folder)
                raise PackageError(f"cannot install what {REQUIREMENTS} names: {done.stderr.strip()[-_LAST_WORDS:]}")
            (folder / "installed").touch()
    return folder


def _folder() -> Path:
    """Another one for other requirements."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    return platformdirs.user_cache_path("kvsched") / "evals" / f"kvpress-{digest[:12]}"


def _renew() -> str:
    return f"delete {_folder()} and run `{COMMAND}`."


app = typer.Typer(add_completion=False)


@app.command()
def main() -> None:
    """Make the environment of kvpress in the user's cache folder, once."""
    try:
        typer.echo(make_environment())
    except PackageError as error:
        typer.echo(f"kvsched: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
