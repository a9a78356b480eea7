"""The kernels as a repository of Hugging Face's `kernels`, loaded from its folder as any other would be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kernels._rust import Build, Digest, Metadata

ROOT = Path(__file__).parents[2]

LOAD = """
import importlib, sys
from pathlib import Path

import torch
from kernels import get_kernel, get_local_kernel

local = get_local_kernel(Path(sys.argv[1]))
assert get_kernel("kvsched/kvsched-kernels", version=1) is local
assert Path(sys.argv[1]) in Path(local.__file__).parents and "kvsched_kernels" not in sys.modules

angles = torch.rand(5, 8)
waves, keys = (angles.cos(), angles.sin()), torch.randn(2, 5, 16)
triton = importlib.import_module(local.__name__ + ".gpu.codec").code(keys, torch.empty(2, 5, 16), waves)
torch.testing.assert_close(triton, local.rotate(keys, waves))
runs = local.Runs.of(torch.tensor([1]), torch.tensor([2]), torch.tensor([0, 1]), torch.tensor([0]))
output, _ = local.cluster_attention(torch.zeros(1, 1, 16), local.Pool(keys[0], keys[1]), runs, 1.0)
torch.testing.assert_close(output[0, 0], keys[1, 1:3].mean(0))
"""


def test_the_built_folder_is_loaded_and_computes(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    for _ in range(2):  # over an older one
        subprocess.run([sys.executable, ROOT / "kernels" / "build_repository.py", folder], check=True)
    Build.open(folder)
    variant = folder / "build" / "torch-universal"
    digest = Metadata.read_from_file(variant / "metadata.json").digest
    assert digest is not None
    digest.validate(Digest.hash_variant(digest.algorithm, variant))

    done = subprocess.run(
        [sys.executable, "-c", LOAD, folder],
        cwd=tmp_path,  # and not where the sources could be imported from
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "LOCAL_KERNELS": f"kvsched/kvsched-kernels={folder}",
            "TRITON_INTERPRET": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
