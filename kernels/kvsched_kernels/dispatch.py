"""Whether an operation runs as a Triton kernel, or compiled for the CPU, instead of in plain torch."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil

import torch

_LOG = logging.getLogger(__name__)


def triton_runs(operation: str, tensor: torch.Tensor, refused: str | None = None) -> bool:
    """Whether the Triton kernel of `operation` takes a call whose tensors lie where `tensor` does.

    A call on an accelerator that runs in plain torch all the same is logged with its reason, each reason once.

    Args:
        refused: why the kernel does not take these arguments, if it does not.
    """
    if tensor.device.type == "cpu":
        return False
    reason = unavailable(tensor.device) or refused
    if tensor.dtype == torch.float64:
        reason = reason or "the kernels compute in float32"
    if reason is not None:
        _say(operation, reason)
    return reason is None


def numba_runs(operation: str, *tensors: torch.Tensor) -> bool:
    """Whether what Numba compiles of `operation` for the CPU takes a call with these tensors: float32, without grad."""
    taken = all(one.device.type == "cpu" and one.dtype == torch.float32 and not one.requires_grad for one in tensors)
    return taken and numba_installed(operation)


def numba_installed(operation: str) -> bool:
    """Whether `operation` can be compiled for the CPU. That it cannot is logged once."""
    if not _numba():
        _say(operation, "Numba is not installed: pip install numba")
    return _numba()


@functools.cache
def _numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def too_wide(*channels: int, dtype: torch.dtype = torch.float16) -> str | None:
    """Why vectors of so many channels, computed in `dtype`, do not fit a program's registers; `None` if they do."""
    most = 128 if dtype == torch.float32 else 256
    if max(channels) <= most:
        return None
    return f"vectors of {max(channels)} channels are wider than {most}"


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why no Triton kernel can run on `device`; `None` if they can."""
    if device.type != "cuda":  # what ROCm's devices are called, too
        return f"there are no kernels for devices of type {device.type!r}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if "CC" not in os.environ and not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to launch kernels: install gcc or clang, or name one in CC"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than the kernels' oldest target, compute capability 8.0"
    return None


@functools.cache
def _say(operation: str, reason: str) -> None:
    _LOG.warning("%s runs uncompiled: %s", operation, reason)
