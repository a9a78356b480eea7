"""Attention of one new token over gathered keys."""

from __future__ import annotations

import torch


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of each stream's query group over its own keys, in float32.

    Args:
        query: `[S, G, D]`, the query heads that share a KV head.
        key: `[S, n, D]`, value: `[S, n, Dv]`, any floating dtype. Masked entries may hold any finite numbers.
        mask: bool `[S, n]`, True where an entry takes part. A stream without any gets finite numbers without meaning.
        scaling: factor on the scores before the softmax.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sinks: `[S, G]`, a learned score per query head that takes part in the softmax with no value (GPT-OSS).

    Returns:
        `[S, G, Dv]` in the dtype of `query`.
    """
    score = torch.matmul(query.float(), key.float().transpose(1, 2)) * scaling
    if softcap is not None:
        score = torch.tanh(score / softcap) * softcap
    score = score.masked_fill(~mask.unsqueeze(1), torch.finfo(torch.float32).min)
    if sinks is not None:
        score = torch.cat([score, sinks.float().unsqueeze(-1)], dim=-1)
    weight = score.softmax(dim=-1)
    if sinks is not None:
        weight = weight[..., :-1]
    return torch.matmul(weight, value.float()).to(query.dtype)
