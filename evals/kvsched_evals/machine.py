"""Results as JSON, each with what it was measured on and by which command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch


def keep(path: Path, bench: str, result: dict[str, Any]) -> None:
    """Write what the module `bench` of this package has measured, with its command line and this machine.

    A file that is there is replaced as a whole, so a run that is broken off leaves the last one.
    """
    command = shlex.join(["python", "-m", f"kvsched_evals.{bench}", *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({"command": command, "machine": describe(), **result}, indent=1) + "\n")
    draft.replace(path)


def describe() -> dict[str, Any]:
    """The processor, memory, accelerator, library versions and time (UTC), ready for JSON."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("kvsched", "torch", "transformers", "obstore", "zstandard")},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
