"""Takes a model's rotary position embedding off its keys and puts it back.

A rotated channel oscillates over the tokens of a chunk and uses up its whole range; before the rotation it is a mean
with a little noise, which a codec can use. Only the angles matter here: a rotation that is undone and done again with
the same angles gives the same keys back, so scaling, growing contexts and the like need no treatment.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

import torch

from kvsched_kernels import rotate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rotation:
    """The rotation of the keys of every layer.

    Args:
        frequencies: for each layer, radians a token of each pair of channels; none where keys are left as they are.
            Channel `i` is paired with channel `i + len(frequencies[layer])`.
    """

    def __init__(self, frequencies: list[tuple[float, ...]]) -> None:
        self.frequencies = frequencies

    @classmethod
    def of(cls, model: PreTrainedModel, layers: int) -> Rotation:
        """The rotation that `model` applies, read from its rotary embedding.

        Layers of different types may turn at different rates (Gemma 3). A model that has no rotary embedding of the
        usual kind, or pairs neighbouring channels, gets none: its keys are coded as they are.
        """
        rotary = getattr(model.base_model, "rotary_emb", None)
        if rotary is None or not _pairs_halves(rotary):
            return cls([()] * layers)
        kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or [""] * layers
        # The `original` frequencies do not change while a model of a growing rope type runs.
        names = [(f"{kind}_original_inv_freq", "original_inv_freq", "inv_freq") for kind in kinds]
        found = [
            next((getattr(rotary, name).tolist() for name in layer if hasattr(rotary, name)), ()) for layer in names
        ]
        return cls([tuple(rates) for rates in found])

    def apply(self, keys: torch.Tensor, layer: int, position: int) -> torch.Tensor:
        """Rotate `keys` `[heads, tokens, head_dim]` (float32, CPU) whose first token stands at `position`."""
        return self._turn(keys, layer, position, 1.0)

    def remove(self, keys: torch.Tensor, layer: int, position: int) -> torch.Tensor:
        """What `apply` has been given, up to float32 rounding."""
        return self._turn(keys, layer, position, -1.0)

    def _turn(self, keys: torch.Tensor, layer: int, position: int, direction: float) -> torch.Tensor:
        rates = self.frequencies[layer]
        pairs = len(rates)
        if not 0 < 2 * pairs <= keys.shape[2]:
            return keys
        cos, sin = _waves(rates, position, keys.shape[1])
        return rotate(keys, (cos, sin * direction))


@functools.lru_cache(maxsize=8)  # the layers of a chunk share their angles
def _waves(rates: tuple[float, ...], position: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angles, `[tokens, pairs]` float32; angles are rounded as models round them."""
    angles = torch.arange(position, position + tokens).float()[:, None] * torch.tensor(rates)
    return angles.cos(), angles.sin()


def _pairs_halves(rotary: torch.nn.Module) -> bool:
    rotate_half = getattr(sys.modules[type(rotary).__module__], "rotate_half", None)
    return rotate_half is not None and rotate_half(torch.arange(4.0)).tolist() == [-2.0, -3.0, 0.0, 1.0]
