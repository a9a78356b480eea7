"""One decoding step of a layer: score the clusters, choose, gather what was chosen, estimate the rest, attend."""

from __future__ import annotations

import math

import torch

from kvsched_kernels import ClusterMasses, Part, choose_tokens, decode_attention, token_masses

from .choice import CLOSE, LEFT, REACH, tokens_that_hold
from .dense import DenseTokens
from .retrieval import Retrieval
from .stored import StoredClusters


class Decoder:
    """Answers a single new token from the tokens in DRAM and the clusters that its query retrieves.

    Attributes:
        found: what it retrieved last; `None` where there was nothing to retrieve.
    """

    def __init__(self, clusters: StoredClusters, dense: DenseTokens) -> None:
        self.clusters, self.dense, self.policy = clusters, dense, clusters.policy
        self.found: Retrieval | None = None

    def parts(
        self, query: torch.Tensor, scaling: float, softcap: float | None, sinks: torch.Tensor | None, step: int
    ) -> list[Part]:
        """Attention of `query` `[S, G, D]` over tokens in DRAM, over clusters it retrieves, and the estimate of others.

        The second and the third are missing where there are no clusters or no estimate.

        Args:
            scaling, softcap, sinks: as in `decode_attention`.
            step: tokens seen so far.
        """
        self.found = None
        held, index, form = self.dense.used, self.clusters.index, self.clusters.form
        entries, present = self.dense.entries[:, held], self.dense.position[:, held] >= 0
        dense = decode_attention(query, *form.apart(entries), present, scaling, softcap, sinks)
        if index.width == 0:
            return [dense]
        asked = query.float() * scaling
        score = self.policy.score(asked, index)
        clusters = ClusterMasses(score, self.policy.tokens(index), dense[1], softcap)
        waiting = (self.dense.position[:, self.dense.waiting] >= 0).sum(1, keepdim=True)
        budget = (self.policy.config.tokens_for(step) - waiting).clamp_min(0)
        self.clusters.storage.begin(step)
        if index.residuals is None:
            found = self._choose_clusters(clusters, budget)
        else:
            found, thought = self._choose_tokens(asked, clusters, budget)
        if self.policy.estimated:  # while clusters arrive from flash
            estimate = self._estimate(clusters.mass, clusters.peak[..., 0])
        self.found = found
        entries, position = self.retrieve(found)
        fetched = decode_attention(query, *form.apart(entries), position >= 0, scaling, softcap)
        if not self.policy.estimated:
            return [dense, fetched]
        if self.policy.corrects:
            estimate = estimate[0], estimate[1] + _missed(fetched[1], thought)
        return [dense, fetched, estimate]

    def retrieve(self, found: Retrieval) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries `[S, n, width]` and positions `[S, n]` (-1 where none is) of what was chosen."""
        return self.clusters.gather(found.stream, found.cluster, found.kept)

    def _choose_clusters(self, clusters: ClusterMasses, budget: torch.Tensor) -> Retrieval:
        """Clusters as the policy chooses them; their mass becomes 0."""
        worth, heads = clusters.worth(), clusters.mass.shape[1]
        if (wanted := self.policy.config.mass) is not None:
            budget = torch.minimum(budget, tokens_that_hold(wanted, worth / heads, clusters.tokens))
        found = self.policy.choose(worth, self.clusters.index, budget)
        if self.policy.estimated:
            clusters.mass.transpose(1, 2)[found.stream, found.cluster] = 0.0  # to mask them takes five times as long
        self.clusters.read_ahead(found.stream, found.cluster)
        return found

    def _choose_tokens(
        self, asked: torch.Tensor, clusters: ClusterMasses, budget: torch.Tensor
    ) -> tuple[Retrieval, torch.Tensor]:
        """Single tokens of the best clusters, and the log of what they are thought to hold, `[S, G]`.

        What flash has of them is being read afterwards.

        Args:
            asked: float32 `[S, G, D]`, the query, scaled.
        """
        index, heads = self.clusters.index, asked.shape[1]
        assert index.residuals is not None
        near = self._candidates(asked, clusters, int(budget.max()))
        tokens = token_masses(asked, clusters, near, *index.residuals.lie(near))
        if (wanted := self.policy.config.mass) is not None:
            rest, size = clusters.worth().scatter_(1, near, 0.0), clusters.tokens.scatter(1, near, 0)
            size = torch.cat([tokens.there.flatten(1).to(size), size], dim=1)
            each = torch.cat([tokens.worth.flatten(1), rest], dim=1) / heads
            budget = torch.minimum(budget, tokens_that_hold(wanted, each, size))
        here = None if self.clusters.storage.complete else self.clusters.in_dram(near)
        choice = choose_tokens(clusters, tokens, budget, here, self.policy.patience * heads, LEFT)
        if here is not None and bool(choice.read.any()):
            stream, nth = choice.read.nonzero(as_tuple=True)
            self.clusters.read_ahead(stream, near[stream, nth])
        return Retrieval.of_tokens(near, choice.kept), clusters.peak[..., 0] + choice.held.log()

    def _candidates(self, asked: torch.Tensor, clusters: ClusterMasses, budget: int) -> torch.Tensor:
        """The clusters whose tokens are looked at, int64 `[S, k]`: those whose best token may hold most of the
        attention, or all if the budget may be for all."""
        width, index = clusters.tokens.shape[1], self.clusters.index
        assert index.residuals is not None
        count = max(1, math.ceil(CLOSE * budget / self.policy.cluster_size))
        if count >= width or budget >= int(clusters.tokens.sum(1).max()):
            return torch.arange(width, device=clusters.tokens.device).repeat(len(clusters.tokens), 1)
        distance = index.deviation[:, :width].float().div_(clusters.tokens.clamp_min(1)).sqrt_()
        best = torch.addcmul(clusters.score, index.residuals.spread(asked), distance.unsqueeze(1), value=REACH)
        return clusters.share_of(best).topk(count, dim=1, sorted=False).indices

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


def _missed(exact: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:
    """log of what tokens hold by what they were thought to (logs, `[S, G]` both), within [-1, 1].

    Codes are off by as much as they are; those thought best are on average worse than that.
    """
    return (exact - thought).nan_to_num_(0.0, 0.0, 0.0).clamp_(-1.0, 1.0)
