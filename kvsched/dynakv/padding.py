"""Which tokens are padding, as the model's attention mask shows it: a cache layer is told nothing else."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError, UnsupportedModelError


def real_tokens(mask: Any, batch: int, new: int) -> torch.Tensor:
    """Which of the newest tokens are no padding, read off the model's attention mask: bool `[batch, new]`.

    Args:
        mask: bool `[B, 1, q, kv]`, True to attend (sdpa); floating `[B, 1, q, kv]`, very negative where masked
            (eager); or `[B, kv]`, 0 for padding (flash attention).

    Raises:
        InputError: a row that has begun ends in padding.
        UnsupportedModelError: the mask is none of these.
    """
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        raise UnsupportedModelError(
            f"DynaKV cannot read padding off an attention mask of type {type(mask).__name__}. Load the model with "
            "attn_implementation='sdpa' or 'eager'."
        )
    seen = mask if mask.ndim == 2 else mask[:, 0, -1]
    seen = seen > torch.finfo(seen.dtype).min / 2 if seen.is_floating_point() and mask.ndim == 4 else seen != 0
    # A row may be all padding so far: a chunk of a prompt that is much shorter than its neighbours.
    if bool((seen.any(1) & ~seen[:, -1]).any()):
        raise InputError(
            "the attention mask ends in padding. Decoding goes on from the last token of every row, so pad on the "
            "left: tokenizer.padding_side = 'left'."
        )
    return seen[:, -new:].expand(batch, -1)
