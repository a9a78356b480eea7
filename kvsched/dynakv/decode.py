"""One decoding step of a layer: score the clusters, choose, gather what was chosen, estimate the rest, attend."""

from __future__ import annotations

import math

import torch

from kvsched_kernels import Part, cap_scores, decode_attention

from .choice import CLOSE, fewest_to_read, tokens_that_hold, within
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
        dense = decode_attention(query, *form.apart(entries), present, scaling, softcap, sinks)
        if index.width == 0:
            return [dense]
        asked = query.float() * scaling
        score = self.policy.score(asked, index)
        clusters = _Clusters(score, softcap, self.policy.tokens(index), dense[1])
        waiting = (self.dense.position[:, self.dense.waiting] >= 0).sum(1, keepdim=True)
        budget = (self.policy.config.tokens_for(step) - waiting).clamp_min(0)
        self.clusters.storage.begin(step)
        if index.residuals is None:
            found = self._choose_clusters(clusters, budget)
        else:
            found = self._choose_tokens(asked, clusters, budget)
        if self.policy.estimated:  # while clusters arrive from flash
            estimate = self._estimate(clusters.mass, clusters.peak[..., 0])
        entries, position = self.retrieve(found)
        fetched = decode_attention(query, *form.apart(entries), position >= 0, scaling, softcap)
        if not self.policy.estimated:
            return [dense, fetched]
        if self.policy.corrects:
            estimate = estimate[0], estimate[1] + clusters.missed(fetched[1])
        return [dense, fetched, estimate]

    def retrieve(self, found: Retrieval) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries `[S, n, width]` and positions `[S, n]` (-1 where none is) of what was chosen."""
        return self.clusters.gather(found.stream, found.cluster, found.kept)

    def _choose_clusters(self, clusters: _Clusters, budget: torch.Tensor) -> Retrieval:
        """Clusters as the policy chooses them; their mass becomes 0."""
        worth, heads = clusters.worth(), clusters.mass.shape[1]
        if (wanted := self.policy.config.mass) is not None:
            budget = torch.minimum(budget, tokens_that_hold(wanted, worth / heads, clusters.tokens))
        found = self.policy.choose(worth, self.clusters.index, budget)
        if self.policy.estimated:
            clusters.mass.transpose(1, 2)[found.stream, found.cluster] = 0.0  # to mask them takes five times as long
        self.clusters.read_ahead(found.stream, found.cluster)
        return found

    def _choose_tokens(self, asked: torch.Tensor, clusters: _Clusters, budget: torch.Tensor) -> Retrieval:
        """Single tokens of the best clusters; the mass of a cluster becomes that of the tokens left out.

        Args:
            asked: float32 `[S, G, D]`, the query, scaled.
        """
        index, heads = self.clusters.index, asked.shape[1]
        assert index.residuals is not None
        near = self._candidates(clusters, int(budget.max()))
        residual, there = index.residuals.dot(asked, near)
        mass = clusters.resolve(near, residual, there)
        worth = torch.bmm(clusters.share().transpose(1, 2), mass.flatten(2))[:, 0].view(there.shape)
        if (wanted := self.policy.config.mass) is not None:
            rest = clusters.worth().scatter_(1, near, 0.0)
            tokens = torch.cat([there.flatten(1), clusters.tokens.scatter(1, near, 0)], dim=1)
            each = torch.cat([worth.flatten(1), rest], dim=1) / heads
            budget = torch.minimum(budget, tokens_that_hold(wanted, each, tokens))
        kept = self._kept(worth.masked_fill_(~there, -1.0), near, budget, heads)
        clusters.leave_out(near, mass, kept)
        return Retrieval.of_tokens(near, kept)

    def _candidates(self, clusters: _Clusters, budget: int) -> torch.Tensor:
        """The clusters whose tokens are looked at, int64 `[S, k]`: the best, or all if the budget may be for all."""
        width = clusters.tokens.shape[1]
        count = max(1, math.ceil(CLOSE * budget / self.policy.cluster_size))
        if count >= width or budget >= int(clusters.tokens.sum(1).max()):
            return torch.arange(width, device=clusters.tokens.device).repeat(len(clusters.tokens), 1)
        return clusters.worth().topk(count, dim=1, sorted=False).indices

    def _kept(self, worth: torch.Tensor, near: torch.Tensor, budget: torch.Tensor, heads: int) -> torch.Tensor:
        """The tokens to attend to: bool `[S, k, m]`. What flash has of them is being read afterwards.

        The best in DRAM, and with them, in streams where others hold enough more, those of the fewest clusters on flash
        that bring most of it.

        Args:
            worth: float32 `[S, k, m]`, share of attention, summed over `heads` query heads; -1 where there is no token.
            near: int64 `[S, k]`, the clusters.
            budget: int64 `[S, 1]`.
        """
        if self.clusters.storage.complete:
            return within(worth, budget)[0]
        here = self.clusters.in_dram(near)[:, :, : worth.shape[2]]
        kept, least = within(worth.masked_fill(~here, -1.0), budget)
        gain = (worth - least.unsqueeze(2)).clamp_min_(0.0).masked_fill_(here, 0.0).sum(2)
        # A budget for all tokens asks for all of them.
        enough = torch.where((worth >= 0).sum((1, 2)) <= budget[:, 0], 0.0, self.policy.patience * heads).unsqueeze(1)
        read = fewest_to_read(gain, enough)
        if not bool(read.any()):
            return kept
        stream, nth = read.nonzero(as_tuple=True)
        self.clusters.read_ahead(stream, near[stream, nth])
        return within(worth.masked_fill_(~(here | read.unsqueeze(2)), -1.0), budget)[0]

    def _estimate(self, mass: torch.Tensor, peak: torch.Tensor) -> Part:
        """Attention over what is left out: each cluster as so much `mass` `[S, G, C]`, times exp(peak `[S, G]`), on its
        mean value."""
        if self.policy.estimated < 1:
            best = mass.sum(1).topk(math.ceil(self.policy.estimated * mass.shape[2]), dim=1).indices
            mass = mass * torch.zeros_like(mass[:, 0]).scatter_(1, best, 1.0).unsqueeze(1)
        together = mass.sum(-1)
        output = self.clusters.index.tables["value"].mix(mass)
        output /= together.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        return output, peak + together.log_()


class _Clusters:
    """What the clusters of a layer hold of a query's attention, by their mean keys.

    Args:
        score: float32 `[S, G, C]`, before the soft cap.
        tokens: integer `[S, C]`, how many a score stands for.
        dense: `[S, G]`, log of what the tokens hold that always take part.

    Attributes:
        mass: float32 `[S, G, C]`, tokens times exp(score - peak).
        peak: `[S, G, 1]`.
    """

    def __init__(self, score: torch.Tensor, softcap: float | None, tokens: torch.Tensor, dense: torch.Tensor) -> None:
        self.score, self.softcap, self.tokens, self._dense = score, softcap, tokens, dense.unsqueeze(-1)
        capped = cap_scores(score, softcap)
        self.peak = capped.amax(-1, keepdim=True)
        self.mass = (capped - self.peak).exp_().mul_(tokens.unsqueeze(1))

    def share(self) -> torch.Tensor:
        """Of all attention by mass, `[S, G, 1]`. A head that looks at its sinks has no say."""
        return (self.mass.sum(-1, keepdim=True) + (self._dense - self.peak).exp_()).reciprocal_()

    def worth(self) -> torch.Tensor:
        """A token's share of attention, summed over the query heads: `[S, C]`."""
        return torch.bmm(self.share().transpose(1, 2), self.mass)[:, 0].div_(self.tokens.clamp_min(1))

    def resolve(self, near: torch.Tensor, residual: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Take the tokens of clusters `near` `[S, k]` one by one; `mass` follows.

        Args:
            residual: float32 `[S, G, k, m]`, what is added to the score of the cluster; it is written over.
            there: bool `[S, k, m]`, where there is a token.

        Returns:
            float32 `[S, G, k, m]`, mass of each token.
        """
        of = near.unsqueeze(1).expand(-1, self.mass.shape[1], -1)
        score = cap_scores(residual.add_(self.score.gather(2, of).unsqueeze(3)), self.softcap)
        score.masked_fill_(~there.unsqueeze(1), float("-inf"))
        peak = torch.maximum(self.peak, score.flatten(2).amax(-1, keepdim=True))
        mass = score.sub_(peak.unsqueeze(3)).exp_()
        self.mass.mul_((self.peak - peak).exp_()).scatter_(2, of, mass.sum(3))
        self.peak = peak
        return mass

    def leave_out(self, near: torch.Tensor, mass: torch.Tensor, kept: torch.Tensor) -> None:
        """Let the clusters `near` hold only those of their tokens' `mass` `[S, G, k, m]` that are not `kept`."""
        of = near.unsqueeze(1).expand(-1, self.mass.shape[1], -1)
        self._kept = (mass * kept.unsqueeze(1)).sum((2, 3))
        self.mass.scatter_(2, of, mass.masked_fill_(kept.unsqueeze(1), 0.0).sum(3))

    def missed(self, exact: torch.Tensor) -> torch.Tensor:
        """log of what the tokens kept hold by what they were thought to: `[S, G]`, within [-1, 1].

        Codes are off by as much as they are; those thought best are on average worse than that.

        Args:
            exact: `[S, G]`, log of the sum over these tokens.
        """
        return (exact - self.peak[..., 0] - self._kept.log_()).nan_to_num_(0.0, 0.0, 0.0).clamp_(-1.0, 1.0)
