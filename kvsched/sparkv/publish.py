"""The cloud side: run the model over a context once and write its chunks to a store."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from tqdm.auto import tqdm

from ..config import SparKVConfig
from ..errors import ChunkError, InputError
from .address import Prefix, refinement_address
from .codec import MAX_HEADER, ChunkHeader, Coder
from .forward import PrefixCache, kv_shapes
from .grid import Grid
from .loader import Loader
from .manifest import MAX_MANIFEST, ChunkEntry, Manifest, chunk_path, manifest_path
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("kvsched")

_EXACT = {"lossless"}  # codecs that give back what was computed, so that computing can go on from it

_IDS = TypeAdapter(list[Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]])


@dataclass(frozen=True)
class PublishReport:
    """What `publish` did, or would do.

    Args:
        tokens: tokens that the published chunks cover; a rest shorter than a chunk is not published.
        chunks: chunks of the prefix.
        chunks_written: those that were not in the store before.
        bytes_written: bytes put into the store; of a dry run, estimated by a single chunk, manifests not counted.
        kv_bytes: bytes of the prefix's keys and values in the model's dtype.
        seconds: wall time.
    """

    tokens: int
    chunks: int
    chunks_written: int
    bytes_written: int
    kv_bytes: int
    seconds: float


def publish(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    store: str | os.PathLike[str] | None = None,
    config: SparKVConfig | Mapping[str, Any] | None = None,
    dry_run: bool = False,
    computed: PrefixCache | None = None,
) -> PublishReport:
    """Compute the KV cache of a context and write it to a store, for `SparKVCache` to load.

    What the store holds already is not written again, so an interrupted call can be repeated and a longer context with
    the same beginning adds only what is new; with the lossless codec that beginning is read from the store instead of
    computed. (What a lossy codec gives back would put its errors into every later chunk.) A chunk's manifest is
    written after the chunk, and describes the object that lies in the store whoever wrote it, so that two publishers
    of the same context do not disturb each other and a reader never finds a chunk that is not whole.

    Args:
        model: the model that will read the prefix; another one, or another dtype, never finds it.
        input_ids: `[1, n]`.
        store: where to write: a folder, `file:///folder` or `s3://bucket/path`; `config.store` if left out.
        config: codec, chunk size and tenant; a reader needs the same.
        dry_run: put nothing into the store; the report says what would be written. A chunk is computed if none is
            published, to know its size.
        computed: the context's keys and values, where they are there already; without it they are computed here.

    Raises:
        ConfigError: no store is named.
        InputError: `input_ids` is not one row of at least a chunk.
        StoreError: the store cannot be opened or written.
        UnsupportedModelError: the model's layers hold more than keys and values.
    """
    begin = time.perf_counter()
    config = SparKVConfig.merge(config, {} if store is None else {"store": store})
    target = Store.of(config, writable=True)
    if input_ids.ndim != 2 or len(input_ids) != 1 or input_ids.shape[1] < config.chunk_tokens:
        raise InputError(
            f"publish() takes token ids of shape [1, n] with n >= chunk_tokens={config.chunk_tokens}, "
            f"not {list(input_ids.shape)}. Pass one sequence, or a smaller chunk_tokens."
        )
    prefix, coder = Prefix.of(model, config, input_ids[0]), Coder.of(model, config.codec)
    grid = Grid(len(prefix.addresses), config.chunk_tokens, len(prefix.payload_limits))
    published, has_manifest = _published(target, prefix)
    entries, refinements = list(published.chunks), list(published.refinements or ())
    report = PublishReport(
        tokens=grid.tokens,
        chunks=grid.chunks,
        chunks_written=grid.chunks - len(entries),
        bytes_written=0,
        kv_bytes=sum(2 * heads * head_dim for heads, head_dim in kv_shapes(model.config))
        * grid.tokens
        * model.dtype.itemsize,
        seconds=0.0,
    )
    if dry_run:
        size = (
            sum(map(_object_bytes, (entries[-1], *refinements[-1:])))
            if entries
            else _first_chunk_bytes(model, input_ids, coder, grid)
        )
        estimate = report.chunks_written * size
        return replace(report, bytes_written=estimate, seconds=time.perf_counter() - begin)

    cache = PrefixCache(model.config, grid.tokens) if computed is None else computed
    reused = len(entries) if config.codec in _EXACT or report.chunks_written == 0 else 0
    if reused and report.chunks_written and computed is None:
        _load(cache, model, input_ids, published, target, config)
    bytes_written = chunks_written = 0
    progress = tqdm(prefix.addresses, desc="publish", unit="chunk", disable=computed is not None)  # the rest is quick
    for chunk, address in enumerate(progress):
        if chunk >= reused and computed is None:
            span = grid.span(chunk)
            cache.compute(model, input_ids[:, span], span.start)
        if chunk >= len(published.chunks):
            position, layers = grid.span(chunk).start, _chunk(cache, grid.span(chunk))
            encoded = coder.encode(position, layers)
            entry, written = _put_chunk(target, address, *encoded)
            chunks_written, bytes_written = chunks_written + bool(written), bytes_written + written
            if (refinement := coder.encode_refinement(position, layers)) is not None:
                entry, refined, written = _put_refinement(target, entry, encoded, refinement)
                refinements.append(refined)
                bytes_written += written
            entries.append(entry)
        if chunk >= len(published.chunks) or not has_manifest[chunk]:
            covered = replace(
                published,
                chunks=tuple(entries[: chunk + 1]),
                refinements=tuple(refinements[: chunk + 1]) or None,
            )
            manifest = covered.to_bytes(prefix.key)
            target.put(manifest_path(address), manifest)
            bytes_written += len(manifest)
    seconds = time.perf_counter() - begin
    return replace(report, chunks_written=chunks_written, bytes_written=bytes_written, seconds=seconds)


def read_token_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids `[1, n]` of a file: one list of them in a `.json` file, UTF-8 text for the tokenizer in any other.

    Raises:
        InputError: the file cannot be read, or is not that.
    """
    try:
        text = path.read_text(encoding="utf-8")
        ids = _IDS.validate_json(text) if path.suffix == ".json" else tokenizer(text).input_ids
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is neither UTF-8 text nor a .json file that holds a list of ids: {error}") from error
    return torch.tensor([ids], dtype=torch.int64)


def _published(store: Store, prefix: Prefix) -> tuple[Manifest, list[bool]]:
    """The manifest of what needs no work, perhaps of no chunk; and for each chunk whether it has a manifest."""
    count = len(prefix.addresses)
    there = store.wait(store.exists([*map(chunk_path, prefix.addresses), *map(manifest_path, prefix.addresses)]))
    has_chunk, has_manifest = there[:count], there[count:]
    whole = has_chunk.index(False) if False in has_chunk else count
    deepest = max((chunks for chunks in range(1, whole + 1) if has_manifest[chunks - 1]), default=0)
    nothing = Manifest(prefix.fingerprint, prefix.codec, prefix.chunk_tokens, ())
    if deepest == 0:
        return nothing, has_manifest
    data = store.wait(store.get(manifest_path(prefix.addresses[deepest - 1]), MAX_MANIFEST))
    try:
        return Manifest.from_bytes(data, prefix.first(deepest)), has_manifest
    except ChunkError as error:
        logger.warning("what is published is not usable and will be replaced: %s", error)
        return nothing, has_manifest


def _load(
    cache: PrefixCache,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    published: Manifest,
    store: Store,
    config: SparKVConfig,
) -> None:
    """Stream the published chunks into `cache`; what cannot be streamed is computed by the loader."""
    covered = len(published.chunks) * published.chunk_tokens
    loader = Loader(model, input_ids[:, :covered], published, store, replace(config, planner="stream"))
    with loader.streaming():
        loader.compute()
        for index, layer in enumerate(cache.layers):
            loader.complete(index)
            loaded = loader.cache.layers[index]
            layer.write(0, loaded.keys, loaded.values)


def _chunk(cache: PrefixCache, span: slice) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys[0, :, span], layer.values[0, :, span]) for layer in cache.layers]


def _entry(address: str, header: ChunkHeader, head: bytes) -> ChunkEntry:
    sizes = tuple(layer.length for layer in header.layers)
    return ChunkEntry(address, len(head), hashlib.sha256(head).hexdigest(), sizes)


def _object_bytes(entry: ChunkEntry) -> int:
    return entry.header_bytes + sum(entry.payload_bytes)


def _first_chunk_bytes(model: PreTrainedModel, input_ids: torch.Tensor, coder: Coder, grid: Grid) -> int:
    cache = PrefixCache(model.config, grid.chunk_tokens)
    cache.compute(model, input_ids[:, grid.span(0)], 0)
    layers = _chunk(cache, grid.span(0))
    objects = coder.encode(0, layers), coder.encode_refinement(0, layers)
    return sum(len(one[1]) for one in objects if one is not None)


def _put_refinement(
    store: Store, base: ChunkEntry, own_base: tuple[ChunkHeader, bytes], own: tuple[ChunkHeader, bytes]
) -> tuple[ChunkEntry, ChunkEntry, int]:
    """Put the refinement of the object `base` into the store, or keep the one that is there.

    If `base` is somebody else's, who never came to refine it, both give way to ours: our residuals do not fit it.

    Returns:
        The entries of both objects that lie there now, and the bytes written.
    """
    own_entry, written = _entry(base.address, own_base[0], own_base[0].to_bytes()), 0
    address = refinement_address(base.address, base.header_sha256)
    if base != own_entry and not store.wait(store.exists([chunk_path(address)]))[0]:
        store.put(chunk_path(base.address), own_base[1])
        base, written = own_entry, len(own_base[1])
        address = refinement_address(base.address, base.header_sha256)
    entry, more = _put_chunk(store, address, *own)
    return base, entry, written + more


def _put_chunk(store: Store, address: str, header: ChunkHeader, data: bytes) -> tuple[ChunkEntry, int]:
    """Put a chunk's object into the store, or keep the one that is there; the entry of the object that lies there now,
    and the bytes written.

    Another machine's forward can differ in the last bit, so the object that is there need not be equal to `data`.
    """
    path = chunk_path(address)
    if not store.put(path, data, overwrite=False):
        stored = store.wait(store.get(path, 2 * len(data) + MAX_HEADER))
        head = stored[: 8 + int.from_bytes(stored[4:8], "little")]
        try:
            found, start = ChunkHeader.from_bytes(head), len(head)
            for layer in found.layers:
                payload = stored[start : start + layer.length]
                if hashlib.sha256(payload).hexdigest() != layer.sha256:
                    raise ChunkError(f"layer {layer.layer} is altered")
                start += layer.length
            if [layer.layer for layer in found.layers] == [layer.layer for layer in header.layers]:
                return _entry(address, found, head), 0
            raise ChunkError("it holds other layers")
        except ChunkError as error:
            logger.warning("the object %s is replaced: %s", path, error)
            store.put(path, data)
    return _entry(address, header, header.to_bytes()), len(data)
