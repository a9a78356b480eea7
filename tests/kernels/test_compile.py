"""Every kernel compiled ahead of time for the GPUs it is meant for, from the very arguments that a call hands it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from cases import FLOAT8, Shape, attention_case, vectors
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from kvsched_kernels.gpu import cluster_attention, codec, kmeans, select, tokens

Launch = tuple[Any, dict[str, Any]]
"""A kernel, and what each of its parameters was given."""

A100, H100, B200 = (GPUTarget("cuda", capability, 32) for capability in (80, 90, 100))
MI300 = GPUTarget("hip", "gfx942", 64)
_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "u8"}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Launch]]:
    """Collects what would be launched; nothing is kept between tests or taken from another run."""
    found: list[Launch] = []
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))

    def recorder(kernel: Any) -> Callable[..., None]:
        def run(*args: Any, grid: Any, warmup: bool, **given: Any) -> None:
            found.append((kernel, {**dict(zip(kernel.arg_names, args, strict=False)), **given}))

        return run

    for module in (cluster_attention, codec, kmeans, select, tokens):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(kernel, "run", recorder(kernel))
    yield found


def compiled(launch: Launch, target: GPUTarget, aligned: bool = True) -> CompiledKernel:
    """What Triton makes of a launch, specialised as it would be: on ones, and on multiples of 16 if `aligned`."""
    kernel, given = launch
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            kind = str(value.dtype).removeprefix("torch.")
            signature[name] = "*" + _NAMES.get(kind, kind.replace("int", "i"))
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        divisible = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and divisible and signature[name] != "constexpr":
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {name: given[name] for name in ("num_warps", "num_stages") if name in given}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def resources(kernel: CompiledKernel, folder: Path) -> dict[str, int]:
    """What NVIDIA's tools say of a binary: registers, and bytes of stack and local memory, which spills need."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    report = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def attend(dtype: torch.dtype, stored: torch.dtype, dim: int, value_dim: int, bits: tuple[int, int]) -> None:
    shape = Shape(2, 8, dim, value_dim, dtype=dtype, stored=stored, bits=bits, softcap=30.0, sinks=True)
    cluster_attention.cluster_attention(**attention_case(shape, 1), slices=8)


def other_operations(dim: int) -> None:
    dtype, size = torch.float16, torch.ones(2, 300, dtype=torch.uint8)
    draw = torch.Generator().manual_seed(0)
    means = vectors(2, 300, dim, 4, dtype, size, draw)
    query, score = torch.zeros(2, 8, dim, dtype=dtype), torch.rand(2, 300)
    select.cluster_worth(query, means, size, 0.1, torch.zeros(2, 8), 30.0)
    select.choose_clusters(score, size, torch.full((2, 1), 200), 0.9, 200)
    some = torch.full((2, 4), 24)
    tokens.token_products(
        query.float()[..., :128], vectors(2, 300, min(dim, 128), 2, dtype, size, draw), some, some, 48
    )
    points, label = torch.zeros(2, 64, dim), torch.zeros(2, 64, dtype=torch.long)
    kmeans.nearest(points, torch.zeros(2, 300, dim), size > 0)
    moments = kmeans.moments(points, label, 300, by_channel=False)
    kmeans.moments(points, label, 300, by_channel=False, before=moments)
    kmeans.two_means(points, label == 0, torch.zeros(2), 8)
    waves = torch.zeros(64, dim // 2), torch.zeros(64, dim // 2)
    scale = torch.ones(2, 1, dim).expand(2, 64, dim), torch.ones(2, 1, dim).expand(2, 64, dim)
    symbols = torch.empty(2, dim, 64, dtype=torch.int16).transpose(1, 2)
    codec.code(points, symbols, waves, scale)
    codec.code(symbols, torch.empty(2, 64, dim, dtype=dtype), waves, scale, decode=True)


WIDEST = 256
ATTENTION = [
    (torch.float16, torch.float16, 128, 128, (4, 2)),
    (torch.bfloat16, torch.bfloat16, 64, 64, (16, 16)),
    (torch.bfloat16, FLOAT8, 128, 128, (8, 8)),
    (torch.float16, torch.int8, 192, 128, (4, 2)),
    (torch.bfloat16, torch.bfloat16, WIDEST, WIDEST, (4, 2)),
    (torch.float32, torch.float32, WIDEST // 2, WIDEST // 2, (4, 2)),
]


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_keeps_to_its_registers_on_an_h100(case, launches, tmp_path):
    attend(*case)
    names = [kernel.__name__ for kernel, _ in launches]
    assert names == ["_runs_kernel", "_means_kernel", "_merge_kernel"]
    for launch in launches[: 3 if case is ATTENTION[0] else 2]:  # merging does not depend on the type
        used = resources(compiled(launch, H100), tmp_path)
        assert (used["STACK"], used["LOCAL"]) == (0, 0), f"{launch[0].__name__} spills: {used}"
        assert used["REG"] <= 255


@pytest.mark.parametrize("dim", [128, WIDEST])
def test_the_other_kernels_keep_to_their_registers_on_an_h100(dim, launches, tmp_path):
    other_operations(dim=dim)
    assert len(launches) == 10
    for launch in launches:
        used = resources(compiled(launch, H100), tmp_path)
        assert (used["STACK"], used["LOCAL"]) == (0, 0), f"{launch[0].__name__} spills: {used}"


@pytest.mark.parametrize("target", [A100, B200, MI300], ids=lambda target: str(target.arch))
def test_every_kernel_compiles_for_the_other_targets(target, launches, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6" if target.backend == "hip" else None)
    attend(torch.bfloat16, FLOAT8, 64, 64, (4, 2))
    other_operations(dim=64)
    for launch in launches:
        binary = compiled(launch, target, aligned=False).asm["hsaco" if target.backend == "hip" else "cubin"]
        assert len(binary) > 1000
