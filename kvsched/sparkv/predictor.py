"""The SparKV paper's learned cost model, beside `cost.DeviceProfile`: a small network instead of a physical form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import trange
from transformers.cache_utils import get_layer_types_and_kwargs

from ..errors import ConfigError
from .cost import profile_path, time_layers
from .forward import PrefixCache
from .grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_EPOCHS = 600
_RUNS = 3
_LOOK_SECONDS = 0.1


def active_blocks(config: PreTrainedConfig, grid: Grid) -> np.ndarray:
    """`[chunks, layers]`: blocks of `chunk_tokens` keys that a layer's attention reaches from a chunk, itself included.

    The paper counts what its sparse attention keeps. Full attention reaches every block up to the chunk, a sliding
    layer those of its window.
    """
    text = config.get_text_config(decoder=True)
    kinds, _ = get_layer_types_and_kwargs(text)
    reach = [
        -(-text.sliding_window // grid.chunk_tokens) + 1 if kind == "sliding_attention" else grid.chunks
        for kind in kinds
    ]
    return np.minimum(np.arange(1, grid.chunks + 1)[:, None], np.array(reach))


class LearnedProfile:
    """Seconds of depth-limited prefill, by a network 3-48-24-1 as in the paper (arXiv 2604.21231).

    It predicts what one more layer costs a token chunk from the chunk's index, the active attention blocks of the layer
    that is run through for it, and how busy the device is with other work (0 to 1). What comes before the first layer's
    keys and values is a constant, the paper's "dense constant". The paper predicts a KV head; one head cannot be
    computed alone (`grid.py`).

    Args:
        blocks: `[chunks, layers]`, from `active_blocks`; grids up to that many chunks can be predicted.
        first: seconds to the first layer's keys and values.
        scale: seconds that the network's 1 stands for.
        network: takes `[n, 3]`, gives `[n, 1]`.
    """

    def __init__(self, blocks: np.ndarray, first: float, scale: float, network: torch.nn.Module) -> None:
        self.blocks, self.first, self.scale, self.network = blocks, first, scale, network

    @classmethod
    def of(cls, model: PreTrainedModel, grid: Grid) -> LearnedProfile:
        """The kept predictor of this model, device and chunk size.

        Raises:
            ConfigError: none is kept, or one of shorter contexts.
        """
        fix = f"Train one with: kvsched profile --chunk-tokens {grid.chunk_tokens} --learned {grid.tokens}"
        try:
            with safe_open(_path(model, grid.chunk_tokens), "pt") as file:
                kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                numbers = json.loads((file.metadata() or {})["numbers"])
            network = _network()
            blocks = kept.pop("blocks").numpy()
            network.load_state_dict(kept)
            learned = cls(blocks, float(numbers["first"]), float(numbers["scale"]), network.requires_grad_(False))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"there is no learned cost model of this device and model. {fix}") from error
        if blocks.ndim != 2 or blocks.shape[1] != grid.layers or len(blocks) < grid.chunks:
            raise ConfigError(f"the learned cost model knows contexts of {len(blocks)} chunks at most. {fix}")
        return learned

    def keep(self, model: PreTrainedModel, chunk_tokens: int) -> None:
        """Keep it for this model, device and chunk size."""
        path = _path(model, chunk_tokens)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        numbers = json.dumps({"first": self.first, "scale": self.scale})
        save_file({**self.network.state_dict(), "blocks": torch.tensor(self.blocks)}, draft, {"numbers": numbers})
        draft.replace(path)

    @classmethod
    def renew(cls, model: PreTrainedModel, grid: Grid) -> LearnedProfile:
        """Train on prefills of as many tokens as `grid` has, timed now, and keep the result."""
        ids = torch.arange(grid.tokens)[None] % model.config.get_text_config(decoder=True).vocab_size
        runs = [time_prefill(model, ids, grid) for _ in trange(_RUNS, desc="prefills", leave=False, disable=None)]
        seconds, utilisation = (np.array(part) for part in zip(*runs, strict=True))
        learned = cls.train(active_blocks(model.config, grid), seconds, utilisation)
        learned.keep(model, grid.chunk_tokens)
        return learned

    @classmethod
    def train(cls, blocks: np.ndarray, seconds: np.ndarray, utilisation: np.ndarray, seed: int = 0) -> LearnedProfile:
        """Fit the network to measured prefills, in seconds (the paper leaves loss and optimiser open: Huber and Adam).

        Args:
            blocks: `[chunks, layers]`, from `active_blocks`.
            seconds: `[runs, chunks, layers + 1]`, to compute each chunk to each depth, as `cost.time_layers` gives it.
            utilisation: `[runs, chunks]`, share of the device that other work took when the chunk began.
        """
        inputs = torch.stack([cls._inputs(blocks, busy) for busy in utilisation]).flatten(0, 1)
        steps = np.diff(seconds[:, :, 1:], axis=2)
        scale = float(steps.mean())
        wanted = torch.tensor(steps.reshape(-1, 1) / scale, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _network()
        optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _EPOCHS)
        for _ in range(_EPOCHS):
            optimiser.zero_grad()
            torch.nn.functional.huber_loss(network(inputs), wanted, delta=0.1).backward()
            optimiser.step()
            schedule.step()
        return cls(blocks, float(np.median(seconds[:, :, 1])), scale, network.requires_grad_(False))

    @staticmethod
    def _inputs(blocks: np.ndarray, utilisation: np.ndarray) -> torch.Tensor:
        """`[chunks x (layers - 1), 3]`, each about 0 to 1: for every layer from the second on."""
        chunks, layers = blocks.shape
        index = np.repeat(np.arange(chunks)[:, None], layers - 1, axis=1) / len(blocks)
        busy = np.repeat(np.broadcast_to(utilisation, chunks)[:, None], layers - 1, axis=1)
        columns = [index, blocks[:, :-1] / blocks.max(), busy]  # layer l's keys come after layer l - 1's attention
        return torch.tensor(np.stack(columns, axis=-1).reshape(-1, 3), dtype=torch.float32)

    def compute_seconds(self, grid: Grid, utilisation: float | np.ndarray = 0.0) -> np.ndarray:
        """`[chunks, layers + 1]`: seconds to compute each chunk of `grid` to each depth.

        Args:
            grid: with no more chunks than were trained for.
            utilisation: share of the device that other work takes, one number or `[grid.chunks]`.
        """
        chunks, layers = self.blocks.shape
        busy = np.zeros(chunks)
        busy[: grid.chunks] = utilisation
        steps = self.network(self._inputs(self.blocks, busy)).numpy().reshape(chunks, layers - 1)[: grid.chunks]
        each = np.concatenate([np.full((grid.chunks, 1), self.first), np.maximum(steps, 0) * self.scale], axis=1)
        return np.concatenate([np.zeros((grid.chunks, 1)), each.cumsum(axis=1)], axis=1)


def time_prefill(model: PreTrainedModel, ids: torch.Tensor, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Prefill `ids` `[1, grid.tokens]` chunk by chunk.

    Returns:
        Seconds to compute each chunk to each depth `[chunks, layers + 1]`, and the utilisation before each `[chunks]`.
    """
    cache = PrefixCache(model.config, grid.tokens)
    seconds, utilisation = [], []
    for chunk in trange(grid.chunks, desc="prefill", unit="chunk", leave=False, disable=None):
        utilisation.append(psutil.cpu_percent(interval=_LOOK_SECONDS) / 100)
        span = grid.span(chunk)
        seconds.append(time_layers(cache, model, ids[:, span], span.start))
    return np.array(seconds), np.array(utilisation)


def _network() -> torch.nn.Module:
    first, second, last = torch.nn.Linear(3, 48), torch.nn.Linear(48, 24), torch.nn.Linear(24, 1)
    return torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), last)


def _path(model: PreTrainedModel, chunk_tokens: int) -> Path:
    return profile_path(model, chunk_tokens).with_suffix(".safetensors")
