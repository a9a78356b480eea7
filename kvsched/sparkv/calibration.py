"""What a codec should know of a model: how finely each channel of its keys and values has to be kept.

The loss that counts is the divergence of the next tokens' distributions. To second order it is half the sum of F d^2
over all errors d, F being the Fisher information: the mean square of the gradient of the log-probability of tokens
drawn from the model itself. So a few backward passes price every channel of every layer at once, where damaging one
layer at a time would take a forward for each of them.

At equal price a bit buys most where F step^2 is the same everywhere. Because F is a tangent and steps are large, a
channel's step is the geometric mean of that and of a fixed part of its standard deviation, which measures better than
either (the hybrid step). Keys are taken without their rotation.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Annotated, Literal

import platformdirs
import torch
from pydantic import Field, TypeAdapter, ValidationError
from tqdm.auto import tqdm
from transformers import DynamicCache

from ..errors import ChunkError, InputError
from .address import fingerprint
from .forward import kv_shapes
from .rope import Rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SINKS = 4
"""First tokens of a sequence that stay in half precision: attention sinks, with keys and values unlike all others."""

Part = Literal["keys", "values"]
Step = Annotated[float, Field(gt=1e-30, lt=1e30)]

_CONTEXT, _FOLLOWING, _CHUNK = 1024, 256, 256  # tokens
_STRETCH = _CONTEXT + _FOLLOWING
_CHAPTERS = ("customization", "typesseq")
_DRAWS = 2
_MAX_BYTES = 1 << 26


@dataclass(frozen=True)
class LayerSteps:
    """Steps of one layer's keys and values, one for each channel of each head, `[heads * head_dim]`."""

    keys: tuple[Step, ...]
    values: tuple[Step, ...]


@dataclass(frozen=True)
class Calibration:
    """The codec's knowledge of one model.

    Args:
        fingerprint: of the model.
        source: the text that it was measured on.
        tokens: how many tokens of it.
        layers: steps at which a channel's standard deviation is one step in the geometric mean over all channels.
    """

    version: Literal[1]
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    source: Annotated[str, Field(max_length=1000)]
    tokens: Annotated[int, Field(ge=1)]
    layers: tuple[LayerSteps, ...]

    def to_bytes(self) -> bytes:
        """The calibration as JSON; equal calibrations give equal bytes."""
        return _CALIBRATION.dump_json(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Calibration:
        """Read and check a calibration.

        Raises:
            ChunkError: `data` is none of this version.
        """
        if len(data) > _MAX_BYTES:
            raise ChunkError("a calibration is too long")
        try:
            return _CALIBRATION.validate_json(data)
        except ValidationError as error:
            raise ChunkError(f"a calibration cannot be read: {error}") from error

    @functools.cached_property
    def id(self) -> str:
        """SHA-256 of its bytes, 64 hex digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def check(self, model_fingerprint: str, shapes: list[tuple[int, int]]) -> None:
        """Make sure that it belongs to a model with KV heads and head dimensions `shapes`.

        Raises:
            ChunkError: it does not.
        """
        rows = [heads * head_dim for heads, head_dim in shapes]
        if self.fingerprint != model_fingerprint or any(
            [len(part) for part in parts] != rows
            for parts in ([layer.keys for layer in self.layers], [layer.values for layer in self.layers])
        ):
            raise ChunkError("a calibration belongs to another model")

    def steps(self, layer: int, part: Part) -> torch.Tensor:
        """Steps of one layer, `[heads * head_dim, 1]` float32."""
        return self._tensors[layer][part]

    @functools.cached_property
    def _tensors(self) -> list[dict[Part, torch.Tensor]]:
        return [
            {"keys": torch.tensor(layer.keys)[:, None], "values": torch.tensor(layer.values)[:, None]}
            for layer in self.layers
        ]

    @classmethod
    def find(cls, model_fingerprint: str) -> Calibration | None:
        """The calibration of a model that this machine has kept."""
        try:
            return cls.from_bytes(kept_path(model_fingerprint).read_bytes())
        except (OSError, ChunkError):
            return None  # none was kept, or not by this version

    def keep(self) -> Path:
        """Keep it on this machine, for `find`, and say where."""
        path = kept_path(self.fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_bytes(self.to_bytes())
        return draft.replace(path)

    @classmethod
    def measure(cls, model: PreTrainedModel, texts: Iterable[torch.Tensor], source: str) -> Calibration:
        """Measure the steps of `model` (a minute for each text on two cores).

        Args:
            texts: token ids `[1, n]` with `n >= 8`; the first 1024 are the context and the next 256, or the last fifth
                of a shorter text, the tokens that it is to serve.
            source: what the texts are.

        Raises:
            InputError: there is no text, or one is too short.
        """
        rotation = Rotation.of(model, len(kv_shapes(model.config)))
        sums: list[torch.Tensor] = []
        tokens = 0
        for count, ids in enumerate(tqdm(list(texts), desc="calibrate", unit="text"), start=1):
            tokens += ids.shape[1]
            found = [torch.stack(pair) for pair in _spread_and_price(model, ids, rotation)]
            sums = [(a * (count - 1) + b) / count for a, b in zip(sums, found, strict=True)] if sums else found
        if not sums:
            raise InputError("A calibration needs at least one text.")
        relative = []
        for variance, price in sums:
            cost = (variance * price).clamp_min(1e-30)
            relative.append((cost * cost.mean()) ** -0.25)
        unit = torch.cat([part.log() for part in relative]).mean().exp()
        steps = [
            tuple(float(f"{step:.4g}") for step in (variance.sqrt() * part / unit).clamp_min(1e-20).tolist())
            for (variance, _), part in zip(sums, relative, strict=True)
        ]
        layers = tuple(LayerSteps(keys, values) for keys, values in zip(steps[::2], steps[1::2], strict=True))
        return cls(1, fingerprint(model), source, tokens, layers)


_CALIBRATION = TypeAdapter(Calibration)


def read_texts(path: Path | None, tokenizer: PreTrainedTokenizerBase) -> tuple[list[torch.Tensor], str]:
    """Token ids `[1, n]` of up to three stretches of a text, or of chapters that come with Python; and its name.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        texts = [topics[name] for name in _CHAPTERS] if path is None else [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no UTF-8 text: {error}") from error
    split = [tokenizer(text, return_tensors="pt").input_ids.split(_STRETCH, dim=1) for text in texts]
    if path is None:
        return [stretches[0] for stretches in split], f"pydoc_data.topics: {', '.join(_CHAPTERS)}"
    whole = [stretch for stretch in split[0] if stretch.shape[1] == _STRETCH]
    return whole[:3] or list(split[0]), path.name


def calibration_path(calibration_id: str) -> str:
    """Where a calibration lies in a store."""
    return f"calibrations/{calibration_id[:2]}/{calibration_id}.json"


def kept_path(model_fingerprint: str) -> Path:
    """Where this machine keeps the calibration of a model."""
    return Path(platformdirs.user_cache_dir("kvsched")) / "calibrations" / f"{model_fingerprint}.json"


def _spread_and_price(
    model: PreTrainedModel, ids: torch.Tensor, rotation: Rotation
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Variance within a chunk and Fisher information of each channel, for keys and values of each layer in turn."""
    if ids.shape[1] < 2 * SINKS:
        raise InputError(f"A text of {ids.shape[1]} tokens is too short to calibrate with.")
    context = min(_CONTEXT, ids.shape[1] * _CONTEXT // _STRETCH)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.base_model(ids[:, :context], past_key_values=cache)
    states = []
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.detach().requires_grad_(), layer.values.detach().requires_grad_()
        states += [layer.keys, layer.values]
    following = ids[:, context : context + _FOLLOWING]
    with torch.enable_grad():
        scores = model(following, past_key_values=cache).logits[0].float().log_softmax(-1)
    draws = torch.multinomial(
        scores.detach().exp(), _DRAWS, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    prices = [torch.zeros_like(state) for state in states]
    for draw in range(_DRAWS):
        score = scores.gather(1, draws[:, draw : draw + 1]).sum()
        gradients = torch.autograd.grad(score, states, retain_graph=draw + 1 < _DRAWS)
        # A rotation keeps lengths, so the gradient by an unrotated key is the gradient, unrotated.
        for index, gradient in enumerate(gradients):
            if index % 2 == 0:
                gradient = rotation.remove(gradient[0].float(), index // 2, context - gradient.shape[2])[None]
            prices[index] += gradient**2 / (_DRAWS * len(following[0]))
    found = []
    for index, (state, price) in enumerate(zip(states, prices, strict=True)):
        start, numbers = context - state.shape[2], state.detach()[0].float()
        if index % 2 == 0:
            numbers = rotation.remove(numbers, index // 2, start)
        sinks = max(SINKS - start, 0)
        chunks = numbers[:, sinks:].split(_CHUNK, dim=1)
        variance = torch.stack([chunk.var(1, correction=0) for chunk in chunks]).mean(0)
        found.append((variance.flatten(), price[0, :, sinks:].mean(1).flatten()))
    return found
