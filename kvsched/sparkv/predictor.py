"""The SparKV paper's learned cost model, beside `cost.DeviceProfile`: a small network instead of a physical form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from .grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_EPOCHS = 600


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
            network = torch.nn.Sequential(
                torch.nn.Linear(3, 48),
                torch.nn.ReLU(),
                torch.nn.Linear(48, 24),
                torch.nn.ReLU(),
                torch.nn.Linear(24, 1),
            )
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
