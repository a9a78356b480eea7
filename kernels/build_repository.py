"""Builds the kernels as a repository for Hugging Face's `kernels`: python kernels/build_repository.py FOLDER

The folder then holds the sources as kernel-builder wants them and, since nothing has to be compiled, one variant for
every device: `kernels.get_local_kernel(FOLDER)` loads it, and so does `kernels.get_kernel` once it is uploaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
VARIANT = "torch-universal"


def build(folder: Path) -> None:
    """Write the repository into `folder`, which may hold one that was built before."""
    general = tomllib.loads((HERE / "build.toml").read_text())["general"]
    package = general["name"].replace("-", "_")
    variant = folder / "build" / VARIANT
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "build.toml", folder)
    for parent in (folder / "torch-ext", variant):
        shutil.rmtree(parent, ignore_errors=True)
        shutil.copytree(HERE / package, parent / package, ignore=shutil.ignore_patterns("__pycache__"))
    (variant / "metadata.json").write_text(json.dumps(_metadata(general, variant), indent=2) + "\n")


def _metadata(general: dict[str, Any], variant: Path) -> dict[str, Any]:
    files = {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(variant.rglob("*.py"))
    }
    content = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
    return {
        "name": general["name"],
        "id": f"_{general['name'].replace('-', '_')}_{content}",  # versions may be loaded side by side
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": "cuda"},  # a field that must be; the variant's name says that any will do
        "digest": {"algorithm": "sha256", "files": files},
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(Path(sys.argv[1]))
