"""One decoding step of a layer: score the clusters, choose, gather what was chosen, estimate the rest, attend."""

from __future__ import annotations

import math

import torch

from kvsched_kernels import Part, cap_scores, decode_attention

from .dense import DenseTokens
from .retrieval import Retrieval
from .stored import StoredClusters


class Decoder:
    """Answers a single new token from the tokens in DRAM and the clusters that its query retrieves."""

    def __init__(self, clusters: StoredClusters, dense: DenseTokens) -> None:
        self.clusters, self.dense, self.policy = clusters, dense, clusters.policy

    def parts(
        self, query: torch.Tensor, scaling: float, softcap: float | None, sinks: torch.Tensor | None, step: int
    ) -> list[Part]:
        """Attention of `query` `[S, G, D]` over tokens in DRAM, over clusters it retrieves, and the estimate of others.

        The second and the third are missing where there are no clusters or no estimate.

        Args:
            scaling, softcap, sinks: as in `decode_attention`.
            step: tokens seen so far.
        """
        held, index, form = self.dense.used, self.clusters.index, self.clusters.form
        entries, present = self.dense.entries[:, held], self.dense.position[:, held] >= 0
        parts = [decode_attention(query, *form.apart(entries), present, scaling, softcap, sinks)]
        if index.width == 0:
            return parts
        score = cap_scores(self.policy.score(query, index).mul_(scaling), softcap)
        tokens = self.policy.tokens(index)
        peak = score.amax(-1, keepdim=True)
        mass = (score - peak).exp_().mul_(tokens.unsqueeze(1))
        # The heads of a group differ in what they find here at all: one that looks at its sinks has no say.
        total = mass.sum(-1, keepdim=True) + (parts[0][1].unsqueeze(-1) - peak).exp_()
        worth = (mass / total).sum(1) / tokens
        waiting = (self.dense.position[:, self.dense.waiting] >= 0).sum(1, keepdim=True)
        found = self.policy.choose(worth, index, (self.policy.config.budget - waiting).clamp_min(0))
        entries, position = self.retrieve(found, step)
        parts.append(decode_attention(query, *form.apart(entries), position >= 0, scaling, softcap))
        if self.policy.estimated:
            parts.append(self._estimate(mass, peak[..., 0], found, parts[1][1]))
        return parts

    def retrieve(self, found: Retrieval, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries `[S, n, width]` and positions `[S, n]` (-1 where none is) of what was chosen."""
        self.clusters.storage.begin(step)
        return self.clusters.gather(found.stream, found.cluster, found.kept)

    def _estimate(self, mass: torch.Tensor, peak: torch.Tensor, found: Retrieval, total: torch.Tensor) -> Part:
        """Attention over the clusters left out: each as `size` tokens with its mean key and mean value.

        A mean key underrates its cluster, since exp is convex. By how much shows on the retrieved clusters, whose exact
        sum is known: all others are corrected by the same factor, within [1/e, e].

        Args:
            mass: float32 `[S, G, C]`, size times exp(score of the mean key - peak); peak: `[S, G]`.
            total: `[S, G]`, log of the exact sum over the retrieved clusters.
        """
        left = torch.ones(mass.shape[0], mass.shape[2], dtype=torch.bool, device=mass.device)
        left[found.stream, found.cluster] = False
        others = mass * left.unsqueeze(1)
        if self.policy.corrects:
            known = peak + (mass.sum(-1) - others.sum(-1)).log()
            factor = (total - known).nan_to_num(0.0, 0.0, 0.0).clamp_(-1.0, 1.0)
        if self.policy.estimated < 1:
            best = others.sum(1).topk(math.ceil(self.policy.estimated * left.shape[1]), dim=1).indices
            others = others * torch.zeros_like(left).scatter_(1, best, True).unsqueeze(1)
        together = others.sum(-1, keepdim=True)
        output = self.clusters.index.tables["value"].mix(others / together.clamp_min(torch.finfo(torch.float32).tiny))
        estimate = peak + together[..., 0].log()
        if self.policy.corrects:
            estimate = estimate + factor
        return output, estimate
