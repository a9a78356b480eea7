"""Where an operation runs, and what is said when it is not where it could."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys

import pytest
import torch

from kvsched_kernels import dispatch


@pytest.fixture(autouse=True)
def _nothing_was_said():
    dispatch.unavailable.cache_clear()
    dispatch._say.cache_clear()
    unavailable = dispatch.unavailable
    yield
    unavailable.cache_clear()


def test_a_cpu_is_no_fall_back(caplog):
    assert not dispatch.triton_runs("nearest", torch.zeros(1), "too large")
    assert not caplog.records


def test_a_cpu_without_numba_says_so_once_and_numba_takes_float32_alone(caplog, monkeypatch):
    assert dispatch.numba_runs("token_masses", torch.zeros(1))
    assert not dispatch.numba_runs("token_masses", torch.zeros(1, dtype=torch.float64))
    assert not dispatch.numba_runs("token_masses", torch.zeros(1, requires_grad=True))
    assert not dispatch.numba_runs("token_masses", torch.zeros(1, device="meta"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find(name))
    dispatch._numba.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not dispatch.numba_runs("token_masses", torch.zeros(1))
        assert not dispatch.numba_runs("token_masses", torch.zeros(1))
    dispatch._numba.cache_clear()
    assert [record.message for record in caplog.records] == [
        "token_masses runs uncompiled: Numba is not installed: pip install numba"
    ]


def test_another_device_says_why_and_once(caplog):
    tensor = torch.zeros(1, device="meta")
    with caplog.at_level(logging.WARNING):
        assert not dispatch.triton_runs("nearest", tensor)
        assert not dispatch.triton_runs("nearest", tensor)
    assert [record.message for record in caplog.records] == [
        "nearest runs uncompiled: there are no kernels for devices of type 'meta'"
    ]


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [("triton", "pip install triton"), ("compiler", "gcc or clang"), ("capability", "older"), (None, None)],
)
def test_what_a_gpu_lacks_is_named(lacking, reason, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if lacking == "triton" else found(name))
    monkeypatch.setattr(shutil, "which", lambda name: None if lacking == "compiler" else f"/usr/bin/{name}")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5) if lacking == "capability" else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    said = dispatch.unavailable(torch.device("cuda", 0))
    assert said is None if reason is None else reason in str(said)


def test_double_precision_is_left_to_torch(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "unavailable", lambda device: None)
    assert dispatch.triton_runs("nearest", torch.zeros(1, device="meta"))
    assert not dispatch.triton_runs("nearest", torch.zeros(1, device="meta"), "too many")
    assert not dispatch.triton_runs("nearest", torch.zeros(1, device="meta", dtype=torch.float64))
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "too many",
        "the kernels compute in float32",
    ]


def test_heads_that_are_too_wide_are_named():
    assert dispatch.too_wide(64, 256) is None
    assert "wider than 256" in str(dispatch.too_wide(64, 257))
    assert "wider than 128" in str(dispatch.too_wide(129, dtype=torch.float32))


def test_importing_the_library_takes_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # what importing it then meets
        "import kvsched, kvsched_kernels\n"
        "assert not any(name.startswith('kvsched_kernels.gpu') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
