"""Attention of many new tokens over all that a layer holds, without ever holding all of it in DRAM.

A prompt in chunks, a second turn and the candidates of an assistant come to a layer whose earlier tokens lie on flash.
These pass by in parts, and a softmax that is corrected as it goes on (online) puts the parts together: the answer is
exact. Or, where the configuration says so, a block of queries retrieves clusters as a single query does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvsched_kernels import Part, cap_scores, merge_parts

from .decode import Decoder
from .dense import DenseTokens
from .stored import StoredClusters

ENTRIES_AT_ONCE = 1 << 19
"""Numbers in the entries that pass by at a time, over all streams: 2 MiB in float32."""

SCORES_AT_ONCE = 1 << 19
"""Scores that exist at a time: these fit the caches of a processor, and the memory is the same for any prompt."""


@dataclass(frozen=True)
class Tokens:
    """Entries `[S, n, width]` at `position` (int64 `[S, n]`, -1 where there is no token)."""

    entries: torch.Tensor
    position: torch.Tensor


@dataclass(frozen=True)
class Chunk:
    """The queries of new tokens, and how they see others.

    Args:
        query: `[S, G, q, D]`, of the newest q tokens.
        mask: the model's attention mask, `None` or as `padding.real_tokens` takes it.
        seen: tokens so far, the new ones included.
        scaling, softcap: as in `decode_attention`; sinks: `[S, G]` or `None`.
    """

    query: torch.Tensor
    mask: Any
    seen: int
    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def shown(self, position: torch.Tensor, block: slice) -> torch.Tensor:
        """What is added to the scores that a block of queries gives tokens at `position` `[S, n]`: `[S, b, n]`.

        It is -inf where a token is not to be seen. Masks of two dimensions mark padding alone, which has no position
        here.
        """
        streams, n = position.shape
        own = torch.arange(self.seen - self.query.shape[2], self.seen, device=position.device)[block]
        if self.mask is None or self.mask.ndim == 2:
            seen = torch.zeros(streams, len(own), n, device=position.device)
            seen.masked_fill_(position.unsqueeze(1) > own.unsqueeze(1), float("-inf"))
        else:
            rows = self.mask[:, 0, block].expand(-1, len(own), -1)
            at = position.clamp_min(0).view(len(rows), 1, -1).expand(-1, len(own), -1)
            found = rows.gather(2, at).unflatten(2, (-1, n)).transpose(1, 2).reshape(streams, len(own), n)
            if found.dtype == torch.bool:
                seen = torch.zeros(found.shape, device=found.device).masked_fill_(~found, float("-inf"))
            else:
                seen = found.to(torch.float32, copy=True)
        return seen.masked_fill_((position < 0).unsqueeze(1), float("-inf"))

    def blocks(self, each: int) -> Iterator[slice]:
        """The queries in parts for which `each` scores a query make no more than `SCORES_AT_ONCE`."""
        new = self.query.shape[2]
        step = max(1, SCORES_AT_ONCE // max(1, each * self.query.shape[0] * self.query.shape[1]))
        return (slice(start, min(start + step, new)) for start in range(0, new, step))


class ChunkAttention:
    """Answers the queries of many new tokens at once."""

    def __init__(self, clusters: StoredClusters, dense: DenseTokens, decoder: Decoder) -> None:
        self.clusters, self.dense, self.decoder = clusters, dense, decoder

    def exact(self, chunk: Chunk, own: Tokens | None) -> torch.Tensor:
        """Attention over all tokens held and the chunk's `own`, float32 `[S, G, q, Dv]`."""
        query, form = chunk.query, self.clusters.form
        output = torch.zeros(*query.shape[:3], form.value_width, device=query.device)
        total = torch.full(query.shape[:3], float("-inf"), device=query.device)
        if chunk.sinks is not None:
            total[:] = chunk.sinks.float().unsqueeze(-1)
        for tokens in self._held(own):
            for block in chunk.blocks(tokens.position.shape[1]):
                before = output[:, :, block], total[:, :, block]
                part = self._over(tokens, chunk, block)
                output[:, :, block] = merge_parts([before, part])
                total[:, :, block] = torch.logaddexp(before[1], part[1])
        return output

    def retrieved(self, chunk: Chunk, own: Tokens) -> torch.Tensor:
        """Attention over the chunk's `own` tokens, and of earlier ones over what each block of queries retrieves."""
        outputs = []
        for block in chunk.blocks(max(self.clusters.index.width, own.position.shape[1])):
            query = chunk.query[:, :, block]
            sinks = None if chunk.sinks is None else chunk.sinks.repeat_interleave(query.shape[2], dim=1)
            parts = self.decoder.parts(query.flatten(1, 2), chunk.scaling, chunk.softcap, sinks, chunk.seen)
            output, total = self._over(own, chunk, block)
            parts.append((output.flatten(1, 2), total.flatten(1, 2)))
            outputs.append(merge_parts(parts).view(*query.shape[:3], -1))
        return torch.cat(outputs, dim=2)

    def _held(self, own: Tokens | None) -> Iterator[Tokens]:
        if own is not None:
            yield own
        held = self.dense.used
        yield Tokens(self.dense.entries[:, held], self.dense.position[:, held])
        for stream, cluster in self.clusters.parts(ENTRIES_AT_ONCE // self.clusters.form.width):
            yield Tokens(*self.clusters.gather(stream, cluster))

    def _over(self, tokens: Tokens, chunk: Chunk, block: slice) -> Part:
        """Attention of a block of queries over `tokens`: output `[S, G, b, Dv]` and log of the sum, `[S, G, b]`."""
        query = chunk.query[:, :, block].float()
        key, value = (part.float() for part in self.clusters.form.apart(tokens.entries))
        shape = *query.shape[:3], key.shape[1]
        score = torch.bmm(query.flatten(1, 2), key.transpose(1, 2)).mul_(chunk.scaling).view(shape)
        score = cap_scores(score, chunk.softcap).add_(chunk.shown(tokens.position, block).unsqueeze(1))
        peak = score.amax(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).min)
        score = score.sub_(peak).exp_()
        total = score.sum(-1, keepdim=True)
        output = torch.bmm(score.flatten(1, 2), value).view(*query.shape[:3], -1)
        return output / total.clamp_min(torch.finfo(score.dtype).tiny), (peak + total.log())[..., 0]
