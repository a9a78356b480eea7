"""Clusters kept in a folder: their entries, cluster after cluster, tables of which is which, and a manifest.

The manifest names the other two files, which every save gives new names, and their checksums. It takes its place in one
step when they are complete, so a save that is cut short leaves the one before as it was, and files that nothing names,
which the next save removes; what was altered, cut or put there by something else is refused.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tables
from safetensors.torch import save as save_tables

from ..errors import FlashError

VERSION = 3
FORMAT = "kvsched clusters"
MANIFEST = "clusters.json"
_NAME = re.compile(r"clusters-[0-9a-f]{16}\.(bin|safetensors)")


def save(folder: Path, parts: Iterable[bytes], tables: dict[str, torch.Tensor], form: dict[str, Any]) -> None:
    """Keep `parts` (the entries), `tables` and `form` (plain values) in `folder`, which is made if need be.

    Raises:
        FlashError: the folder cannot be written, or is full.
    """
    name = os.urandom(8).hex()
    entries, described = folder / f"clusters-{name}.bin", folder / f"clusters-{name}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sums = []
        with entries.open("xb") as file:
            for part in parts:
                file.write(part)
                sums.append([len(part), zlib.crc32(part)])
            _sync(file)
        packed = save_tables(tables)
        with described.open("xb") as file:
            file.write(packed)
            _sync(file)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "form": form,
            "entries": entries.name,
            "parts": sums,
            "tables": described.name,
            "tables_sum": zlib.crc32(packed),
        }
        manifest["sum"] = _sum(manifest)
        fresh = folder / f"clusters-{name}.json"
        with fresh.open("xb") as file:
            file.write(json.dumps(manifest).encode())
            _sync(file)
        fresh.replace(folder / MANIFEST)
        directory = os.open(folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        for old in folder.glob("clusters-*"):
            if old not in (entries, described):
                old.unlink()
    except OSError as error:
        raise FlashError(
            f"cannot save clusters in {folder}: {error.strerror or error}. Choose a folder that you may write to, on a "
            "device with room for them."
        ) from error


class Saved:
    """What `save` kept in `folder`.

    Attributes:
        form, tables: as they were given.

    Raises:
        FlashError: there is none, or it is not what was saved. Reading the parts raises it too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
                raise self.refused("its manifest is of something else")
            if manifest["version"] != VERSION:
                raise self.refused(f"it is of version {manifest['version']}, this is {VERSION}")
            if manifest.pop("sum") != _sum(manifest):
                raise self.refused("its manifest was altered")
            if not all(_NAME.fullmatch(manifest[name]) for name in ("entries", "tables")):
                raise self.refused("its manifest names files of something else")
            packed = (folder / manifest["tables"]).read_bytes()
            if zlib.crc32(packed) != manifest["tables_sum"]:
                raise self.refused("its tables were altered")
            self.form, self.tables = manifest["form"], load_tables(packed)
            self._entries, self._parts = folder / manifest["entries"], manifest["parts"]
            if self._entries.stat().st_size != sum(size for size, _ in self._parts):
                raise self.refused("its entries were cut or added to")
        except FlashError:
            raise
        except OSError as error:
            begun = not (folder / MANIFEST).exists() and any(folder.glob("clusters-*"))
            raise self.refused("a save there was cut short" if begun else error.strerror or str(error)) from error
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise self.refused("its manifest or tables cannot be read") from error

    def table(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """One of the tables, which has to be of this form; -1 stands for any length."""
        found = self.tables.get(name)
        if found is None or found.dtype != dtype or len(found.shape) != len(shape):
            raise self.refused(f"its table {name} is missing or of another form")
        if any(wanted not in (-1, length) for wanted, length in zip(shape, found.shape, strict=True)):
            raise self.refused(f"its table {name} has the shape {list(found.shape)}")
        return found

    def parts(self) -> Iterator[bytes]:
        """The parts in turn, each checked before it is handed out."""
        try:
            with self._entries.open("rb") as file:
                for size, expected in self._parts:
                    part = file.read(size)
                    if len(part) != size or zlib.crc32(part) != expected:
                        raise self.refused("its entries were altered")
                    yield part
        except OSError as error:
            if isinstance(error, FlashError):
                raise
            raise self.refused(error.strerror or str(error)) from error

    def refused(self, reason: str) -> FlashError:
        """The error for what is wrong with it."""
        return FlashError(f"no clusters can be taken from {self.folder}: {reason}. Save them again.")


def _sum(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
