"""How fast a model's rotary position embedding turns its keys, read from its configuration: a cache never sees more."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvsched_kernels import rotate


def rates_of(config: PreTrainedConfig, kind: str) -> tuple[float, ...]:
    """Radians a token of each pair of channels in layers of `kind`; channel i is paired with i + the number of pairs.

    None where the model does not turn its keys, or not in a way known here. Rates that are wrong lose precision of keys
    in 8 bits, and nothing else: what was turned back by them is turned forth by the same.
    """
    given = getattr(config, "rope_parameters", None) or {}
    by_kind = kind in given
    rope = given[kind] if by_kind else given
    name = (rope or {}).get("rope_type")
    if name == "default":
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        turned = int(width * rope.get("partial_rotary_factor", 1.0))
        rates = rope["rope_theta"] ** (-torch.arange(0, turned, 2) / turned)
    elif name in ROPE_INIT_FUNCTIONS:
        rates, _ = ROPE_INIT_FUNCTIONS[name](config, layer_type=kind if by_kind else None)
    else:
        return ()
    return tuple(rates.tolist())


def turn(keys: torch.Tensor, position: torch.Tensor, rates: torch.Tensor, direction: float) -> torch.Tensor:
    """Keys `[..., D]` turned by their positions: float32.

    Args:
        position: integer `[...]`.
        rates: float32 `[pairs]`, as `rates_of` gives them. More pairs than channels allow turn nothing.
        direction: 1 turns as the model does, -1 turns back.
    """
    if not 0 < 2 * len(rates) <= keys.shape[-1]:
        return keys.float()
    angle = position.flatten().unsqueeze(1) * rates
    return rotate(keys.flatten(0, -2).unsqueeze(0), (angle.cos(), angle.sin() * direction)).view(keys.shape)
