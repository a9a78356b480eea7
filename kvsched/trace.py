"""Traces: queries, keys and values of a real run, kept so that any policy can be judged on them (see `replay`).

A trace is a safetensors file. For each full-attention layer of the model, number i, it holds what attention saw, after
RoPE and all of one floating dtype: `layers.{i}.keys` and `layers.{i}.values` `[kv_heads, n, head_dim]`, and
`layers.{i}.queries` `[query_heads, n, head_dim]`. Its metadata, all texts, are `model`, `prompt_length` (the tokens
after these count as decoded) and `scaling` (the factor on scores before the softmax). Any such file can be replayed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, DynamicLayer, get_layer_types_and_kwargs

from .attention import carry
from .errors import InputError, TraceError, UnsupportedModelError

_NAME = re.compile(r"layers\.(0|[1-9]\d{0,5})\.(keys|values|queries)")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_KINDS = ("keys", "values", "queries")


@dataclass(frozen=True)
class LayerTrace:
    """One layer: `keys` `[H, n, D]`, `values` `[H, n, Dv]`, `queries` `[Hq, n, D]`, finite, of the trace's dtype."""

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor


@dataclass(frozen=True)
class Trace:
    """A trace file whose header was checked; `layer` reads the tensors of one layer.

    Args:
        path: the file.
        model: the name of the model that ran.
        prompt_length: tokens of the prompt, at least 1 and fewer than `tokens`.
        scaling: factor on the scores before the softmax.
        layers: numbers of the layers it holds, ascending.
        tokens: n.
        kv_heads, query_heads: heads of every layer.
    """

    path: Path
    model: str
    prompt_length: int
    scaling: float
    layers: tuple[int, ...]
    tokens: int
    kv_heads: int
    query_heads: int

    @classmethod
    def open(cls, path: str | Path) -> Trace:
        """Read and check the header.

        Raises:
            TraceError: the file is missing or no trace; the message says what is wrong with it.
        """
        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                forms = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
        except (OSError, SafetensorError) as error:
            raise TraceError(f"cannot read the trace {path}: {error}. `kvsched trace record` makes one.") from error
        layers, tokens, heads, query_heads = _check_forms(path, forms)
        prompt_length = _number(path, metadata, "prompt_length", int)
        if not 1 <= prompt_length < tokens:
            raise TraceError(f"{path}: prompt_length is {prompt_length}; it must be from 1 to {tokens - 1}, so that "
                             f"some of the {tokens} tokens are decoded.")  # fmt: skip
        scaling = _number(path, metadata, "scaling", float)
        if not (math.isfinite(scaling) and scaling > 0):
            raise TraceError(f"{path}: scaling is {scaling}; it must be a finite number above zero.")
        if "model" not in metadata:
            raise TraceError(f"{path} has no metadata 'model': write the model's name there, as text.")
        return cls(path, metadata["model"], prompt_length, scaling, layers, tokens, heads, query_heads)

    def layer(self, number: int) -> LayerTrace:
        """The tensors of layer `number`.

        Raises:
            TraceError: the file cannot be read, or holds numbers that are not finite.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {kind: file.get_tensor(f"layers.{number}.{kind}") for kind in _KINDS}
        except (OSError, SafetensorError) as error:
            raise TraceError(f"cannot read layer {number} of the trace {self.path}: {error}") from error
        for kind, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise TraceError(
                    f"{self.path}: layers.{number}.{kind} holds infinite numbers or NaN. Record in float32 if the "
                    "model's numbers do not fit float16."
                )
        return LayerTrace(**tensors)


def _check_forms(path: Path, forms: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[tuple[int, ...], int, int, int]:
    """Layers, tokens, KV heads and query heads of tensors named with dtype and shape; all layers must be alike."""
    for name in forms:
        if _NAME.fullmatch(name) is None:
            raise TraceError(f"{path} holds a tensor {name!r}; a trace holds layers.N.keys, .values and .queries only.")
    layers = tuple(sorted({int(name.split(".")[1]) for name in forms}))
    if not layers:
        raise TraceError(f"{path} holds no layers: a trace has layers.N.keys, .values and .queries.")
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in layers:
        for kind in _KINDS:
            name = f"layers.{layer}.{kind}"
            if name not in forms:
                raise TraceError(f"{path} lacks {name}: a layer has keys, values and queries.")
            dtype, shape = forms[name]
            if dtype not in _DTYPES:
                raise TraceError(f"{path}: {name} is of dtype {dtype}; write float16, bfloat16 or float32.")
            if len(shape) != 3 or 0 in shape:
                raise TraceError(f"{path}: {name} has shape {list(shape)}; it must be [heads, tokens, head_dim].")
            if expected.setdefault(kind, forms[name]) != forms[name]:
                was, of = expected[kind]
                raise TraceError(f"{path}: {name} is {dtype}{list(shape)}, but layers.{layers[0]}.{kind} is "
                                 f"{was}{list(of)}; all layers must be alike.")  # fmt: skip
    (dtype, (heads, tokens, dim)), (of_values, value), (of_queries, query) = (expected[kind] for kind in _KINDS)
    if value[:2] != (heads, tokens) or query[1:] != (tokens, dim) or {of_values, of_queries} != {dtype}:
        raise TraceError(
            f"{path}: keys are {dtype}{[heads, tokens, dim]}, values {of_values}{list(value)} and queries "
            f"{of_queries}{list(query)}; tokens and dtype must be the same, heads too for keys and values, and "
            "head_dim for keys and queries."
        )
    if query[0] % heads:
        raise TraceError(f"{path}: {query[0]} query heads cannot share {heads} KV heads; they must be a multiple.")
    return layers, tokens, heads, query[0]


def _number(path: Path, metadata: dict[str, str], name: str, kind: type[Any]) -> Any:
    try:
        return kind(metadata[name])
    except KeyError:
        raise TraceError(f"{path} has no metadata {name!r}: write it there, as text.") from None
    except ValueError:
        raise TraceError(f"{path}: metadata {name}={metadata[name]!r} is not a number.") from None


class _RecordedLayer(DynamicLayer):
    """Keeps everything as transformers does, and notes the queries that it is asked."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self.queries: list[torch.Tensor] = []
        self.scaling: float | None = None

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(*args, **kwargs)
        return carry(keys, self), values

    def attention(
        self,
        inner: Any,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if softcap is not None or s_aux is not None:
            raise UnsupportedModelError("this model caps its scores or has learned sinks, which a trace cannot hold.")
        self.queries.append(query[0].to(self._dtype))
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return inner(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@torch.no_grad()
def record(
    model: PreTrainedModel,
    ids: torch.Tensor,
    prompt_length: int,
    path: str | Path,
    dtype: torch.dtype = torch.float16,
    chunk: int = 512,
) -> Trace:
    """Run a text through `model`, every token given (teacher-forced), and write its trace.

    Args:
        model: a decoder-only model; layers that are not full attention are left out.
        ids: int64 `[n]`.
        prompt_length: how many of them count as the prompt.
        path: the file to write.
        dtype: of the trace.
        chunk: tokens per forward pass; the answer does not depend on it.

    Raises:
        InputError: the text has no tokens beyond the prompt.
        TraceError: the file cannot be written.
        UnsupportedModelError: attention does more than a scaled softmax, or is not looked up where it can be recorded.
    """
    if not 1 <= prompt_length < len(ids):
        raise InputError(f"the text has {len(ids)} tokens, which leaves none to decode after a prompt of "
                         f"{prompt_length}. Take a longer text or a shorter prompt.")  # fmt: skip
    kinds, arguments = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    recorded = {i: _RecordedLayer(dtype) for i, kind in enumerate(kinds) if kind == "full_attention"}
    layers = [
        recorded[i] if i in recorded else DYNAMIC_LAYER_TYPE_MAPPING[kind](**given)
        for i, (kind, given) in enumerate(zip(kinds, arguments, strict=True))
    ]
    cache = Cache(layers=layers)
    with tqdm(total=len(ids), unit=" tokens", desc="record") as progress:
        for part in ids.to(model.device).split(chunk):
            model(part[None], past_key_values=cache, logits_to_keep=1)
            progress.update(len(part))

    tensors: dict[str, torch.Tensor] = {}
    for i, layer in recorded.items():
        queries = torch.cat(layer.queries, dim=1) if layer.queries else torch.empty(0, 0)
        if queries.shape[1] != len(ids):
            raise UnsupportedModelError(
                f"layer {i} of this model was not asked once for each token: it does not look its attention up in "
                "transformers' AttentionInterface, or shares its keys with another layer."
            )
        tensors[f"layers.{i}.keys"] = layer.keys[0].to(dtype).contiguous()
        tensors[f"layers.{i}.values"] = layer.values[0].to(dtype).contiguous()
        tensors[f"layers.{i}.queries"] = queries.contiguous()
        layer.queries.clear()
    scalings = {layer.scaling for layer in recorded.values()}
    if len(scalings) != 1:
        raise UnsupportedModelError("a trace needs full-attention layers that all scale their scores alike.")
    name = str(getattr(model.config, "_name_or_path", "") or model.config.model_type)
    metadata = {"model": name, "prompt_length": str(prompt_length), "scaling": repr(scalings.pop())}
    try:
        save_file(tensors, path, metadata)
    except (OSError, SafetensorError) as error:
        raise TraceError(f"cannot write the trace {path}: {error}") from error
    return Trace.open(path)
