"""`SparKVCache`: a DynamicCache whose beginning can come from a store."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from ..config import SparKVConfig
from ..errors import ChunkError, StoreError
from .address import Prefix
from .cost import Slowdown
from .forward import PrefixCache
from .loader import Loader, LoadResult
from .manifest import find
from .refine import Refiner
from .store import Store
from .stream import Arrival

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger("kvsched")

# What the last load found, the first guess of the next: bytes a second of each store, and how much longer than its
# profile says each device takes.
_last_goodput: dict[str, float] = {}
_last_slowdown: dict[str, Slowdown] = {}


@dataclass(frozen=True)
class SparKVReport:
    """The numbers of the last load.

    Args:
        prompt_tokens: tokens of the prompt that was to be loaded. Of a batch, distinct prompts are loaded one after
            the other, and their numbers are added up or stand in a row.
        loaded_tokens: tokens of its prefix that were streamed or computed by the loader; the model itself computes
            the rest of the prompt.
        depths: for each chunk of the prefix, layers that were computed; the layers above were streamed.
        bytes_streamed: bytes that arrived from the store, manifests not counted.
        seconds: wall time of the load; under `generate()` with the model's own pass over the rest of the prompt, which
            overlaps with it.
        predicted_seconds: what the first plan made with a known goodput promised.
        compute_seconds: time in which the caller's thread computed; the rest it waited for the stream.
        stream_seconds: time until the last streamed byte.
        goodput: bytes a second of the link at the end.
        plans: how often the division was planned anew and changed.
        joules: energy of the load by the power profile that the options name; `None` if they name none.
        timeline: which layer of which chunk came into place when, computed or streamed.
        coarse: with `progressive`, layers of chunks whose residuals have not come so far.
        bytes_refined: with `progressive`, bytes that came after the load to refine it.
        fallback: why something was computed that could have been streamed, or stays coarse; `None` if nothing.
    """

    prompt_tokens: int = 0
    loaded_tokens: int = 0
    depths: tuple[int, ...] = ()
    bytes_streamed: int = 0
    seconds: float = 0.0
    predicted_seconds: float | None = None
    compute_seconds: float = 0.0
    stream_seconds: float = 0.0
    goodput: float | None = None
    joules: float | None = None
    plans: int = 0
    timeline: tuple[Arrival, ...] = field(default=(), repr=False)
    coarse: int = 0
    bytes_refined: int = 0
    fallback: str | None = None


class SparKVCache(DynamicCache):
    """A KV cache that loads the published prefix of a prompt, partly streamed and partly computed (SparKV, prefill).

    `generate()` calls `load` by itself, whether the cache was asked for by name or passed as `past_key_values`. In a
    plain forward call it, then pass the tokens it has not loaded:

    ```python
    cache = SparKVCache(model.config, store="file:///chunks")
    cache.load(model, input_ids)
    model(input_ids[:, cache.get_seq_length():], past_key_values=cache)
    ```

    After loading it is a DynamicCache in every respect. With the `progressive` codec it is a coarse one at first, whose
    layers become finer while decoding goes on; `refine()` waits for that.

    Args:
        config: the model's configuration.
        options: a `SparKVConfig` or a mapping of its fields; further keyword arguments go on top.

    Raises:
        ConfigError: an option is unknown or invalid, or no store is named.
        StoreError: the store's URI is not understood.
        UnsupportedModelError: the model has layers whose state is more than keys and values.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        options: SparKVConfig | Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        self.options = SparKVConfig.merge(options, changes)
        self._store = Store.of(self.options)
        PrefixCache(config, 0)  # refuses a model that cannot be loaded now, not when its first prompt comes
        self._report = SparKVReport()
        self._taking: _Taking | None = None
        self._refiner: Refiner | None = None
        self._refinable = 0
        super().__init__(config=config)

    def report(self) -> SparKVReport:
        """The numbers of the last load."""
        if (refiner := self._refiner) is None:
            return self._report
        fallback = refiner.failure or self._report.fallback
        return replace(self._report, coarse=refiner.coarse, bytes_refined=refiner.bytes_streamed, fallback=fallback)

    def load(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> SparKVReport:
        """Load what is published of the prompts' beginnings, and leave at least their last token to the model.

        Nothing is loaded, and the model computes the whole prompt, where nothing is published, the store does not
        answer, or the cache holds tokens already: the report's `fallback` says so.

        Args:
            model: the model that will go on with this cache.
            input_ids: `[batch, n]`.
            attention_mask: `[batch, n]`, or `None` where nothing is padded. Padding stands on the left.
        """
        with self.loading(model, input_ids, attention_mask, overlap=False):
            pass
        return self._report

    @contextlib.contextmanager
    def loading(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        overlap: bool = True,
    ) -> Iterator[None]:
        """Like `load`, for a block that passes the rest of the prompt to the model.

        The model's pass over the rest needs the prefix layer by layer, so with `overlap` the block begins while the
        last layers are still arriving. After the block everything is in place, or the cache is empty again if an
        exception ended it.
        """
        if self.get_seq_length() > 0:
            yield
            return
        if _has_hole(attention_mask):
            self._report = SparKVReport(prompt_tokens=input_ids.numel())
            self._fall_back("the attention mask hides tokens within a prompt, and published prefixes hide none")
            yield
            return
        prompts = _distinct_prompts(input_ids, attention_mask)
        self._report = SparKVReport(prompt_tokens=sum(map(len, prompts.ids)))
        loaders = [] if self.options.planner == "local" else self._loaders(model, prompts.ids, overlap)
        first = next(filter(None, loaders), None)
        if first is None:
            yield
        elif len(loaders) == 1 and not prompts.padding[0]:
            yield from self._load_one(first, len(input_ids))
        else:
            self._load_rows(model, prompts, loaders)
            yield

    def _loaders(self, model: PreTrainedModel, prompts: list[torch.Tensor], overlap: bool) -> list[Loader | None]:
        """A loader for each prompt `[n]`, or `None` where nothing of it can be loaded."""
        loaders: list[Loader | None] = []
        for ids in prompts:
            try:
                manifest = self._store.wait(find(self._store, Prefix.of(model, self.options, ids[:-1])))
            except (StoreError, ChunkError) as error:
                self._fall_back(str(error))
                return [None]
            if manifest is None:
                self._fall_back(f"no prefix of this prompt is published in {self._store.uri}")
                loaders.append(None)
                continue
            end = len(ids) if overlap and len(prompts) == 1 else len(manifest.chunks) * manifest.chunk_tokens
            known = _last_goodput.get(self._store.uri), _last_slowdown.get(str(model.device))
            loaders.append(Loader(model, ids[None, :end], manifest, self._store, self.options, *known))
        return loaders

    def _load_one(self, loader: Loader, batch: int) -> Iterator[None]:
        """One prompt, in one row or the same in all: its layers are taken over as the model comes to them."""
        try:
            with loader.streaming():
                loader.compute()
                # From here on every layer says how long it is, which masks and positions need; what it holds follows.
                for layer, loaded in zip(self.layers, loader.cache.layers, strict=True):
                    _install(layer, loaded.keys, loaded.values)
                self._taking = _Taking(loader, batch, set(range(len(self.layers))))
                yield
                for layer in tuple(self._taking.left):
                    self.take(layer)
        except BaseException:
            self.reset()
            raise
        finally:
            self._taking = None
        self._note(loader.result())
        self._start_refining(loader)

    def take(self, layer: int) -> None:
        """Wait for a layer of a prefix that is being loaded, so that `layers[layer]` holds it."""
        if self._taking is not None and layer in self._taking.left:
            self._taking.left.remove(layer)
            self._taking.loader.complete(layer)
            loaded = self._taking.loader.cache.layers[layer]
            rows = (self._taking.batch, -1, -1, -1)
            _install(self.layers[layer], loaded.keys.expand(rows), loaded.values.expand(rows))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in DynamicCache; waits for this layer if it is loading, and takes over what has come to refine it."""
        self.take(layer_idx)
        if self._refiner is not None:
            self._take_refined(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def refine(self) -> SparKVReport:
        """Wait until a prefix that was loaded coarsely (`progressive`) is as fine as it was published.

        That takes as long as the link takes, however slow it is; `reset()` and the end of the cache break it off. The
        report's `fallback` says so where the prefix stays coarse, as when the link has died.
        """
        if self._refiner is not None:
            self._refiner.wait()
            for layer in range(len(self.layers)):
                self._take_refined(layer)
        return self.report()

    def crop(self, tokens_to_remove: int) -> None:
        """As in DynamicCache."""
        super().crop(tokens_to_remove)
        self._refinable = min(self._refinable, self.get_seq_length())

    def reset(self) -> None:
        """As in DynamicCache; what is still being streamed is given up."""
        if self._refiner is not None:
            self._stop_refining()
            self._refiner = None
        super().reset()

    def _start_refining(self, loader: Loader) -> None:
        self._refiner, self._refinable = loader.refiner(), loader.grid.tokens
        if self._refiner is not None:
            self._stop_refining = weakref.finalize(self, self._refiner.close)
            self._refiner.start()

    @torch.inference_mode()
    def _take_refined(self, index: int) -> None:
        """Put what has come in the place of what was coarse; all rows of the batch begin with the same tokens."""
        assert self._refiner is not None
        layer = self.layers[index]
        first = layer.cumulative_length - layer.keys.shape[2] if layer.is_sliding else 0
        for start, keys, values in self._refiner.take(index):
            begin, end = max(start, first), min(start + keys.shape[1], self._refinable)
            if begin < end:
                held, come = slice(begin - first, end - first), slice(begin - start, end - start)
                layer.keys[:, :, held] = keys[:, come].to(layer.keys)
                layer.values[:, :, held] = values[:, come].to(layer.values)

    def _load_rows(self, model: PreTrainedModel, prompts: _Prompts, loaders: list[Loader | None]) -> None:
        """Different or padded prompts: one after the other, up to the column that the longest prefix reaches.

        What a shorter prefix lacks to that column is computed here rather than by the model: it is the same work.
        """
        reached = [pad + (one.grid.tokens if one else 0) for pad, one in zip(prompts.padding, loaders, strict=True)]
        columns, rows = max(reached), []
        for ids, pad, loader in zip(prompts.ids, prompts.padding, loaders, strict=True):
            row, loaded = PrefixCache(model.config, max(columns - pad, 0)).allocate(model), 0
            if loader is not None:
                with loader.streaming():
                    loader.compute()
                    for layer in range(len(self.layers)):
                        loader.complete(layer)
                self._note(loader.result())
                self._refine_now(loader)
                loaded = loader.grid.tokens
                for layer, source in zip(row.layers, loader.cache.layers, strict=True):
                    layer.write(0, source.keys, source.values)
            if loaded < columns - pad:
                row.compute(model, ids[None, loaded : columns - pad], loaded)
            rows.append(row)
        for index, layer in enumerate(self.layers):
            keys, values = (
                torch.cat([_pad_left(getattr(rows[row].layers[index], name), columns) for row in prompts.row])
                for name in ("keys", "values")
            )
            _install(layer, keys, values)

    def _refine_now(self, loader: Loader) -> None:
        """Of one prompt among several the residuals come before the next prompt is loaded."""
        if (refiner := loader.refiner()) is None:
            return
        refiner.start()
        try:
            refiner.wait()
        finally:
            refiner.close()
        for index, layer in enumerate(loader.cache.layers):
            for start, keys, values in refiner.take(index):
                layer.write(start, keys[None].to(layer.keys), values[None].to(layer.values))
        self._report = replace(
            self._report,
            coarse=self._report.coarse + refiner.coarse,
            bytes_refined=self._report.bytes_refined + refiner.bytes_streamed,
            fallback=refiner.failure or self._report.fallback,
        )

    def _fall_back(self, reason: str) -> None:
        logger.warning("the prompt is computed, not loaded: %s", reason)
        self._report = replace(self._report, fallback=reason)

    def _note(self, result: LoadResult) -> None:
        """Add a load to the report."""
        report = self._report
        if result.goodput is not None:
            _last_goodput[self._store.uri] = result.goodput
        _last_slowdown[str(result.cache.layers[0].keys.device)] = result.slowdown
        predicted = result.predicted_seconds
        self._report = replace(
            report,
            loaded_tokens=report.loaded_tokens + result.cache.layers[0].capacity,
            depths=report.depths + result.depths,
            bytes_streamed=report.bytes_streamed + result.bytes_streamed,
            seconds=report.seconds + result.seconds,
            predicted_seconds=predicted if predicted is None else predicted + (report.predicted_seconds or 0.0),
            compute_seconds=report.compute_seconds + result.compute_seconds,
            stream_seconds=report.stream_seconds + result.stream_seconds,
            goodput=result.goodput,
            joules=None if result.joules is None else result.joules + (report.joules or 0.0),
            plans=report.plans + result.plans,
            timeline=report.timeline + result.timeline,
            fallback=result.fallback or report.fallback,
        )


@dataclass
class _Taking:
    """A prefix that is being taken over: its loader, the rows to fill with it, and the layers still to be taken."""

    loader: Loader
    batch: int
    left: set[int]


@dataclass(frozen=True)
class _Prompts:
    """The distinct prompts of a batch: ids `[n]` without padding, columns of padding, and for each row its prompt."""

    ids: list[torch.Tensor]
    padding: list[int]
    row: list[int]


def _has_hole(attention_mask: torch.Tensor | None) -> bool:
    """Whether the mask hides anything but padding on the left; one that is not `[batch, n]` may well."""
    if attention_mask is None:
        return False
    seen = (attention_mask != 0).int()
    return seen.ndim != 2 or bool((seen.cummax(dim=1).values > seen).any())


def _distinct_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> _Prompts:
    """Rows that are the same, as the beams of a search are, count once."""
    known: dict[tuple[int, bytes], int] = {}
    prompts = _Prompts([], [], [])
    masks = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    for one, mask in zip(input_ids, masks, strict=True):
        pad = int((mask != 0).int().argmax())
        key = (pad, one[pad:].cpu().numpy().tobytes())
        if key not in known:
            known[key] = len(known)
            prompts.ids.append(one[pad:])
            prompts.padding.append(pad)
        prompts.row.append(known[key])
    return prompts


def _install(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Give a layer a prefix `[batch, heads, tokens, head_dim]`, as transformers keeps it: whole, or its window."""
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if layer.is_sliding:
        kept = slice(1 - layer.sliding_window, None)
        layer.keys, layer.values = keys[:, :, kept].clone(), values[:, :, kept].clone()
        layer.cumulative_length = keys.shape[2]


def _pad_left(states: torch.Tensor, columns: int) -> torch.Tensor:
    """`[1, heads, n, head_dim]` moved to the right end of `columns` columns; the rest is zero and masked anyway."""
    return torch.nn.functional.pad(states, (0, 0, columns - states.shape[2], 0))
