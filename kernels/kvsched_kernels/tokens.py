"""Single tokens out of a query's best clusters: what each holds of the attention, and which of them to attend to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .attention import cap_scores
from .codes import Vectors
from .dispatch import numba_runs, too_wide, triton_runs


class ClusterMasses:
    """What the clusters of each stream hold of a query's attention, by their mean keys.

    Args:
        score: float `[S, G, C]`, of query and mean key, before the soft cap; it becomes -inf where there is no cluster.
        tokens: integer `[S, C]`, how many a score stands for; 0 where there is no cluster.
        elsewhere: `[S, G]`, log of what the tokens hold that always take part, -inf if there are none.
        softcap: as in `decode_attention`.

    Attributes:
        mass: `[S, G, C]`, tokens times exp(score - peak).
        peak: `[S, G, 1]`.
    """

    def __init__(
        self, score: torch.Tensor, tokens: torch.Tensor, elsewhere: torch.Tensor, softcap: float | None = None
    ) -> None:
        self.score = score.masked_fill_((tokens == 0).unsqueeze(1), float("-inf"))
        self.tokens, self.elsewhere, self.softcap = tokens, elsewhere.unsqueeze(-1), softcap
        self.weigh(cap_scores(self.score, softcap))

    def weigh(self, score: torch.Tensor, apart: torch.Tensor | None = None) -> None:
        """Take masses from capped scores, relative to the highest of them, of `apart` `[S, G, 1]`, and elsewhere."""
        highest = torch.maximum(score.amax(-1, keepdim=True), self.elsewhere)
        highest = highest if apart is None else torch.maximum(highest, apart)
        self.peak = highest.clamp_min(torch.finfo(torch.float32).min)  # there may be nothing at all
        self.mass = (score - self.peak).exp_().mul_(self.tokens.unsqueeze(1))

    def total(self) -> torch.Tensor:
        """Mass of all clusters, and of what is elsewhere: `[S, G, 1]`. So a head that looks at its sinks has no say."""
        elsewhere = (self.elsewhere - self.peak).exp_()
        return elsewhere.add_(self.mass.sum(-1, keepdim=True)).clamp_min_(torch.finfo(torch.float32).tiny)

    def worth(self) -> torch.Tensor:
        """A token's share of attention, summed over the query heads: `[S, C]`."""
        return torch.bmm(self.total().reciprocal_().transpose(1, 2), self.mass)[:, 0].div_(self.tokens.clamp_min(1))

    def share_of(self, score: torch.Tensor) -> torch.Tensor:
        """What one more token in each cluster, of `score` `[S, G, C]` before the soft cap, would hold of the attention.

        Returns:
            `[S, C]`, shares summed over the query heads; 0 where there is no cluster.
        """
        odds = cap_scores(score, self.softcap) - (self.peak + self.total().log_())
        return odds.sigmoid_().sum(1).mul_(self.tokens > 0)


@dataclass(frozen=True)
class Tokens:
    """The tokens of k clusters of each stream, m of the largest.

    Args:
        near: int64 `[S, k]`, which clusters.
        size: int64 `[S, k]`, the tokens of each.
        mass: `[S, G, k, m]`, as `ClusterMasses.mass`; 0 where there is none.
        worth: `[S, k, m]`, shares of the attention, summed over the query heads; 0 where there is none.
    """

    near: torch.Tensor
    size: torch.Tensor
    mass: torch.Tensor
    worth: torch.Tensor

    @property
    def there(self) -> torch.Tensor:
        """bool `[S, k, m]`, where there is a token."""
        return torch.arange(self.mass.shape[3], device=self.size.device) < self.size.unsqueeze(2)


@dataclass(frozen=True)
class TokenChoice:
    """What to attend to.

    Args:
        kept: bool `[S, k, m]`, the tokens.
        read: bool `[S, k]`, the clusters that have to be read for them.
        held: `[S, G]`, the mass of all that is kept.
    """

    kept: torch.Tensor
    read: torch.Tensor
    held: torch.Tensor


def token_masses(
    query: torch.Tensor, clusters: ClusterMasses, near: torch.Tensor, residuals: Vectors, first: torch.Tensor,
    size: torch.Tensor,
) -> Tokens:  # fmt: skip
    """Take the tokens of some clusters one by one, by how their keys differ from the mean key.

    The masses of all clusters follow a new peak, and those of `near` are their tokens'.

    Args:
        query: float32 `[S, G, D]`, scaled.
        near: int64 `[S, k]`, the clusters, each once.
        residuals: `[S, n, D]`, of which the tokens of a cluster are consecutive.
        first, size: int64 `[S, k]`, the first of them and how many.
    """
    if numba_runs("token_masses", query):
        return _masses_compiled(query, clusters, near, residuals, first, size)
    offset = torch.arange(max(1, int(size.max())), device=size.device)
    there = offset < size.unsqueeze(2)
    product = _products(query, residuals, first, size, there)
    of = near.unsqueeze(1).expand(-1, query.shape[1], -1)
    score = cap_scores(product + clusters.score.gather(2, of).unsqueeze(3), clusters.softcap)
    score.masked_fill_(~there.unsqueeze(1), float("-inf"))
    # The old peak may be a mean key's of which no token is near: relative to that, everything could be 0.
    others = cap_scores(clusters.score, clusters.softcap).scatter(2, of, float("-inf"))
    clusters.weigh(others, score.flatten(2).amax(-1, keepdim=True))
    mass = (score - clusters.peak.unsqueeze(3)).exp_()
    clusters.mass.scatter_(2, of, mass.sum(3))
    worth = (mass / clusters.total().unsqueeze(3)).sum(1)
    return Tokens(near, size, mass, worth)


def _products(
    query: torch.Tensor, residuals: Vectors, first: torch.Tensor, size: torch.Tensor, there: torch.Tensor
) -> torch.Tensor:
    """Of the query and each token's residual: float `[S, G, k, m]`; anything where bool `there` `[S, k, m]` is not."""
    if triton_runs("token_masses", query, too_wide(query.shape[2], dtype=query.dtype)):
        from .gpu.tokens import token_products as kernel

        return kernel(query, residuals, first, size, there.shape[2])
    row = (first.unsqueeze(2) + torch.arange(there.shape[2], device=size.device)).mul_(there).flatten(1)
    return residuals.rows(row).dot(query).unflatten(2, there.shape[1:])


def choose_tokens(
    clusters: ClusterMasses,
    tokens: Tokens,
    budget: torch.Tensor,
    here: torch.Tensor | None = None,
    enough: float = 0.0,
    left: float = 0.0,
) -> TokenChoice:
    """The best tokens in memory; with them those of a few clusters elsewhere, in streams where these bring enough.

    The mass of each cluster looked at becomes that of its tokens left out.

    Args:
        budget: int64 `[S, 1]`, tokens of each stream. One for all tokens asks for all of them.
        here: bool `[S, k, m]`, which are in memory; `None` if all are.
        enough: share of the attention, summed over the query heads, that clusters elsewhere have to bring together,
            beyond what tokens in memory would hold in their stead.
        left: part of `enough` that is left there: the clusters that bring least.
    """
    if numba_runs("choose_tokens", tokens.worth):
        return _choose_compiled(clusters, tokens, budget, here, enough, left)
    worth, there = tokens.worth, tokens.there
    here = there if here is None else there & here
    kept, least = _within(worth, here, budget)
    gain = (worth - least.unsqueeze(2)).clamp_min(0.0).masked_fill(here | ~there, 0.0).sum(2)
    least_gain = torch.where(tokens.size.sum(1, keepdim=True) <= budget, 0.0, enough)
    read = _fewest_to_read(gain, least_gain, left)
    if bool(read.any()):
        kept, _ = _within(worth, here | (there & read.unsqueeze(2)), budget)
    of = tokens.near.unsqueeze(1).expand(-1, tokens.mass.shape[1], -1)
    held = (tokens.mass * kept.unsqueeze(1)).sum((2, 3))
    clusters.mass.scatter_(2, of, tokens.mass.masked_fill(kept.unsqueeze(1), 0.0).sum(3))
    return TokenChoice(kept, read, held)


def _within(worth: torch.Tensor, there: torch.Tensor, budget: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool `[S, k, m]`, the best tokens within the budget; `[S, 1]`, what another has to be worth to be among them."""
    flat = worth.masked_fill(~there, -1.0).flatten(1)
    best = flat.sort(dim=1, descending=True)
    fits = (torch.arange(flat.shape[1], device=flat.device) < budget) & (best.values >= 0)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best.indices, fits)
    least = torch.where(fits, best.values, float("inf")).amin(1, keepdim=True)
    return kept.view_as(worth), torch.where(fits.sum(1, keepdim=True) == budget, least, 0.0)


def _fewest_to_read(gain: torch.Tensor, enough: torch.Tensor, left: float) -> torch.Tensor:
    """bool `[S, k]`: where all gain more than `enough` `[S, 1]` together, the best but for `left` of that."""
    best = gain.sort(dim=1)
    below = best.values.cumsum(1)
    wanted = (gain.sum(1, keepdim=True) > enough) & (below > left * enough) & (best.values > 0)
    return torch.zeros_like(wanted).scatter_(1, best.indices, wanted)


def _masses_compiled(
    query: torch.Tensor, clusters: ClusterMasses, near: torch.Tensor, residuals: Vectors, first: torch.Tensor,
    size: torch.Tensor,
) -> Tokens:  # fmt: skip
    from .cpu import tokens as compiled

    assert residuals.step is not None and residuals.offset is not None
    mass = torch.empty(*query.shape[:2], near.shape[1], max(1, int(size.max())))
    worth = torch.zeros(len(near), *mass.shape[2:])
    compiled.token_masses(
        (query * residuals.step).numpy(), (query * residuals.offset).sum(-1).numpy(), residuals.data.numpy(),
        residuals.bits, clusters.score.numpy(), clusters.softcap or 0.0, near.numpy(), first.numpy(), size.numpy(),
        clusters.tokens.contiguous().numpy(), clusters.elsewhere.numpy(), clusters.mass.numpy(), clusters.peak.numpy(),
        mass.numpy(), worth.numpy(),
    )  # fmt: skip
    return Tokens(near, size, mass, worth)


def _choose_compiled(
    clusters: ClusterMasses, tokens: Tokens, budget: torch.Tensor, here: torch.Tensor | None, enough: float, left: float
) -> TokenChoice:
    from .cpu import tokens as compiled

    worth = tokens.worth
    kept, read = torch.zeros_like(worth, dtype=torch.bool), torch.zeros_like(tokens.near, dtype=torch.bool)
    held = torch.zeros(tokens.mass.shape[:2])
    here = torch.ones_like(kept) if here is None else here
    compiled.choose_tokens(
        worth.numpy(), tokens.size.numpy(), here.numpy(), budget[:, 0].numpy(), np.float32(enough), np.float32(left),
        tokens.mass.numpy(), tokens.near.numpy(), clusters.mass.numpy(), kept.numpy(), read.numpy(), held.numpy(),
    )  # fmt: skip
    return TokenChoice(kept, read, held)
