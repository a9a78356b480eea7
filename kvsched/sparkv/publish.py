"""The cloud side: run the model over a context once and write its chunks to a store."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..config import SparKVConfig
from ..errors import ConfigError, InputError
from .address import chain, fingerprint
from .codec import Coder
from .forward import PrefixCache, kv_shapes
from .grid import Grid
from .manifest import ChunkEntry, Manifest, chunk_path, manifest_path
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PublishReport:
    """What `publish` did.

    Args:
        tokens: tokens that the published chunks cover; a rest shorter than a chunk is not published.
        chunks: chunks of the prefix.
        chunks_written: those that were not in the store before.
        bytes_written: bytes put into the store.
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
) -> PublishReport:
    """Compute the KV cache of a context and write it to a store, for `SparKVCache` to load.

    Chunks that the store holds already are not written again, so an interrupted call can be repeated and a longer
    context with the same beginning adds only what is new. A chunk's manifest is written after the chunk, so a reader
    never finds one that is not whole.

    Args:
        model: the model that will read the prefix; another one, or another dtype, never finds it.
        input_ids: `[1, n]`.
        store: where to write: a folder, `file:///folder` or `s3://bucket/path`; `config.store` if left out.
        config: codec and chunk size; a reader needs the same.

    Raises:
        ConfigError: no store is named.
        InputError: `input_ids` is not one row of at least a chunk.
        StoreError: the store cannot be opened or written.
        UnsupportedModelError: the model's layers hold more than keys and values.
    """
    begin = time.perf_counter()
    config = SparKVConfig.merge(config, {} if store is None else {"store": store})
    if config.store is None:
        raise ConfigError('publish() needs a store: publish(model, input_ids, store="file:///folder").')
    if input_ids.ndim != 2 or len(input_ids) != 1 or input_ids.shape[1] < config.chunk_tokens:
        raise InputError(
            f"publish() takes token ids of shape [1, n] with n >= chunk_tokens={config.chunk_tokens}, "
            f"not {list(input_ids.shape)}. Pass one sequence, or a smaller chunk_tokens."
        )
    target, name = Store(config.store, create=True), fingerprint(model)
    addresses = chain(name, config.codec, config.chunk_tokens, input_ids[0])
    grid = Grid(len(addresses), config.chunk_tokens, len(kv_shapes(model.config)))
    cache, coder = PrefixCache(model.config, grid.tokens), Coder.of(model, config.codec)
    entries: list[ChunkEntry] = []
    chunks_written = bytes_written = kv_bytes = 0
    present = target.wait(target.exists([*map(chunk_path, addresses), *map(manifest_path, addresses)]))

    for chunk, address in enumerate(tqdm(addresses, desc="publish", unit="chunk")):
        span = grid.span(chunk)
        cache.compute(model, input_ids[:, span], span.start)
        layers = [(layer.keys[0, :, span], layer.values[0, :, span]) for layer in cache.layers]
        kv_bytes += sum(keys.nbytes + values.nbytes for keys, values in layers)
        header, data = coder.encode(span.start, layers)
        head = header.to_bytes()
        sizes = tuple(entry.length for entry in header.layers)
        entries.append(ChunkEntry(address, len(head), hashlib.sha256(head).hexdigest(), sizes))
        if not present[chunk]:
            target.put(chunk_path(address), data)
            chunks_written, bytes_written = chunks_written + 1, bytes_written + len(data)
        if not present[chunk] or not present[grid.chunks + chunk]:
            manifest = Manifest(name, config.codec, config.chunk_tokens, tuple(entries)).to_bytes()
            target.put(manifest_path(address), manifest)
            bytes_written += len(manifest)
    return PublishReport(grid.tokens, grid.chunks, chunks_written, bytes_written, kv_bytes, time.perf_counter() - begin)
