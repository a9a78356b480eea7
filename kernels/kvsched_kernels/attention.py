"""Attention of one new token over gathered keys, in parts that are put together exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .dispatch import numba_runs

Part = tuple[torch.Tensor, torch.Tensor]
"""Output float32 `[S, G, Dv]` of attention over some of the keys, and the log of its softmax's sum, `[S, G]`."""


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Part:
    """Softmax attention of each stream's query group over its own keys, in float32.

    Args:
        query: `[S, G, D]`, the query heads that share a KV head.
        key: `[S, n, D]`, value: `[S, n, Dv]`, any floating dtype. Masked entries may hold any finite numbers.
        mask: bool `[S, n]`, True where an entry takes part. A stream without any gives zeros and a log of -inf.
        scaling: factor on the scores before the softmax.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sinks: `[S, G]`, a learned score per query head that takes part in the softmax with no value (GPT-OSS).
    """
    if sinks is None and numba_runs("decode_attention", query, key, value) and key.stride(2) == value.stride(2) == 1:
        return _compiled(query, key, value, mask, scaling, softcap)
    score = cap_scores(torch.bmm(query.float() * scaling, key.float().transpose(1, 2)), softcap)
    score.masked_fill_(~mask.unsqueeze(1), float("-inf"))  # not added: what is masked may be infinite
    total = score.logsumexp(dim=-1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.float())
    return torch.bmm(softmax_weights(score, total), value.float()), total


def _compiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> Part:
    from .cpu.attention import attend_masked, memory

    output, total = torch.empty(*query.shape[:2], value.shape[2]), torch.empty(query.shape[:2])
    attend_masked(
        (query * scaling).numpy(), memory(key), key.stride()[:2], memory(value), value.stride()[:2],
        mask.numpy(), softcap or 0.0, output.numpy(), total.numpy(),
    )  # fmt: skip
    return output, total


def cap_scores(score: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Scores after the soft cap, if there is one."""
    return score if softcap is None else torch.tanh(score / softcap) * softcap


def softmax_weights(score: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """`exp(score - total)` for `[..., n]` and `[...]`, 0 where `total` is -inf."""
    return (score - total.clamp_min(torch.finfo(torch.float32).min).unsqueeze(-1)).exp_()


def merge_parts(parts: Sequence[Part]) -> torch.Tensor:
    """Attention over all keys from its parts: float32 `[S, G, Dv]`. A stream without any key gets zeros."""
    outputs, totals = zip(*parts, strict=True)
    weight = torch.stack(totals).clamp_min_(torch.finfo(torch.float32).min).softmax(0)
    return torch.stack(outputs).mul_(weight.unsqueeze(-1)).sum(0)
