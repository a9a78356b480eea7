"""One decoding step of a layer: score the clusters, choose, gather what was chosen, estimate the rest, attend."""

from __future__ import annotations

import math

import torch

from kvsched_kernels import Part, cap_scores, decode_attention

from .dense import DenseTokens
from .retrieval import Retrieval
from .stored import StoredClusters

LEFT = 0.25
"""Of a policy's patience: what a step that reads leaves on flash at most. The rest costs a quarter of all reads and
more, and drives out of DRAM what is missed later: with it, recall of a recorded run was .001 lower."""


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
        score = cap_scores(self.policy.score(query.float() * scaling, index), softcap)
        tokens = self.policy.tokens(index).float()
        peak = score.amax(-1, keepdim=True)
        mass = score.sub_(peak).exp_().mul_(tokens.unsqueeze(1))
        everything = mass.sum(-1, keepdim=True)
        # The heads of a group differ in what they find here at all: one that looks at its sinks has no say.
        share = (everything + (parts[0][1].unsqueeze(-1) - peak).exp_()).reciprocal_()
        worth = torch.bmm(share.transpose(1, 2), mass)[:, 0].div_(tokens.clamp_min(1.0))
        waiting = (self.dense.position[:, self.dense.waiting] >= 0).sum(1, keepdim=True)
        budget = (self.policy.config.tokens_for(step) - waiting).clamp_min(0)
        if (wanted := self.policy.config.mass) is not None:
            budget = torch.minimum(budget, tokens_that_hold(wanted, worth / query.shape[1], tokens))
        self.clusters.storage.begin(step)
        found = self._choose(worth, budget, query.shape[1])
        if self.policy.estimated:  # while clusters arrive from flash
            estimate = self._estimate(mass, peak[..., 0], found)
            known = peak[..., 0] + (everything - mass.sum(-1, keepdim=True))[..., 0].log_()
        entries, position = self.retrieve(found)
        parts.append(decode_attention(query, *form.apart(entries), position >= 0, scaling, softcap))
        if self.policy.estimated:
            parts.append(self._corrected(estimate, parts[1][1] - known))
        return parts

    def retrieve(self, found: Retrieval) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries `[S, n, width]` and positions `[S, n]` (-1 where none is) of what was chosen."""
        return self.clusters.gather(found.stream, found.cluster, found.kept)

    def _choose(self, worth: torch.Tensor, budget: torch.Tensor, heads: int) -> Retrieval:
        """The best clusters in DRAM, and with them, in streams where others hold enough more, the fewest on flash that
        bring most of it; these are being read afterwards.

        Args:
            worth: as in `Policy.choose`, summed over `heads` query heads, 0 where there is no cluster.
            budget: int64 `[S, 1]`.
        """
        choose, index = self.policy.choose, self.clusters.index
        if self.policy.patience == 0 or self.clusters.storage.complete:
            found = choose(worth, index, budget)
        else:
            here, size = self.clusters.in_dram(), index.size[:, : index.width]
            near = choose(worth, index, budget, here)
            # What a cluster on flash would displace is worth about as much as the best that was not chosen.
            left_out = (worth * (here > near.chosen)).amax(1, keepdim=True)
            gain = (worth - left_out).clamp_min_(0.0).mul_(size * ~here)
            # A budget for all tokens asks for all of them.
            enough = torch.where(size.sum(1) <= budget[:, 0], 0.0, self.policy.patience * heads).unsqueeze(1)
            asks = gain.sum(1, keepdim=True) > enough
            if not bool(asks.any()):
                return near
            best = gain.topk(min(int(budget.max()), gain.shape[1]), dim=1)
            left = best.values.flip(1).cumsum(1).flip(1)  # without it and all that gain less
            wanted = asks & (left > LEFT * enough)
            found = choose(worth, index, budget, torch.zeros_like(here).scatter_(1, best.indices, wanted) | here)
        self.clusters.read_ahead(found.stream, found.cluster)
        return found

    def _estimate(self, mass: torch.Tensor, peak: torch.Tensor, found: Retrieval) -> Part:
        """Attention over the clusters left out: each as `size` tokens with its mean key and mean value.

        Args:
            mass: float32 `[S, G, C]`, size times exp(score of the mean key - peak); what was chosen is set to 0.
            peak: `[S, G]`.
        """
        mass.transpose(1, 2)[found.stream, found.cluster] = 0.0  # to mask them takes five times as long
        others = mass
        if self.policy.estimated < 1:
            best = others.sum(1).topk(math.ceil(self.policy.estimated * others.shape[2]), dim=1).indices
            others = others * torch.zeros_like(others[:, 0]).scatter_(1, best, 1.0).unsqueeze(1)
        together = others.sum(-1)
        output = self.clusters.index.tables["value"].mix(others)
        output /= together.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        return output, peak + together.log_()

    def _corrected(self, estimate: Part, missed: torch.Tensor) -> Part:
        """The estimate, scaled by what it missed in the clusters that were retrieved.

        A mean key underrates its cluster, since exp is convex. By how much shows on the retrieved clusters, whose exact
        sum is known: all others are corrected by the same factor, within [1/e, e].

        Args:
            missed: `[S, G]`, log of the exact sum over the retrieved clusters by the sum of their estimates.
        """
        output, total = estimate
        if not self.policy.corrects:
            return estimate
        return output, total + missed.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1.0, 1.0)


def tokens_that_hold(mass: float, worth: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens of the smallest set of clusters which, with all that lies in DRAM, holds `mass` of attention, estimated.

    Args:
        mass: share of all attention, above 0, up to 1.
        worth: float32 `[S, C]`, a token's share of attention, mean over the query heads; tokens: integer `[S, C]`.

    Returns:
        int64 `[S, 1]`.
    """
    tokens = tokens.long()
    order = worth.masked_fill(tokens == 0, -1.0).argsort(dim=1, descending=True)
    size = tokens.gather(1, order)
    # What is left out has to hold no more than 1 - mass; summed from the small end, so that rounding stays small.
    share = worth.gather(1, order).masked_fill(size == 0, 0.0) * size
    left_out = share.flip(1).cumsum(1).flip(1)
    return (size * (left_out > 1 - mass)).sum(1, keepdim=True)
