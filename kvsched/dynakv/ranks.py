"""Equal values, counted."""

from __future__ import annotations

import torch


def ranks(group: torch.Tensor) -> torch.Tensor:
    """How many equal values stand before each value: int64 `[N]` for integers `[N]` in any order."""
    order = group.argsort(stable=True)
    position = torch.arange(len(group), device=group.device)
    ordered = group[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(first, position, 0).cummax(0).values if len(group) else position
    return torch.empty_like(position).scatter_(0, order, position - start)
