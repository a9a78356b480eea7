"""Tokens of one layer that lie in DRAM and take part in every attention: sinks, the recent window, and those between.

A token starts in the window, fills up the sinks if those are not full, and else waits until its cluster is in DRAM.
"""

from __future__ import annotations

import torch

BATCH = 16
"""Tokens leave the window together, so that the work on clusters is done once for all of them."""

WAITING = 32
"""Tokens of a stream that may wait for their clusters before the fullest of these are loaded (B_max of Algorithm 1)."""


class DenseTokens:
    """Entries (key and value side by side) of `streams` streams, in one tensor: `[sinks | waiting | window]`.

    Attributes:
        entries: `[S, n, width]`.
        position: int64 `[S, n]`, place in the sequence, -1 where there is no token.
        recent: tokens in the window, the same in all streams (padding counts, with position -1).
    """

    def __init__(
        self, streams: int, width: int, sinks: int, window: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._sinks, self._window = sinks, window
        self._waiting_end = sinks + WAITING + BATCH
        n = self._waiting_end + window + BATCH
        self.entries = torch.zeros(streams, n, width, dtype=dtype, device=device)
        self.position = torch.full((streams, n), -1, dtype=torch.long, device=device)
        self.recent = 0

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.entries.nbytes + self.position.nbytes

    @property
    def used(self) -> slice:
        """The columns that may hold tokens."""
        return slice(0, self._waiting_end + self.recent)

    @property
    def waiting(self) -> slice:
        """The columns of the tokens that wait."""
        return slice(self._sinks, self._waiting_end)

    def push(self, entries: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Take new tokens `[S, q, width]`, `[S, q]` into the window.

        Returns:
            What left it and is no sink, oldest first, in the same form (position -1 for what should be dropped); `None`
            while the window holds fewer than `BATCH` tokens too many.
        """
        start, q = self._waiting_end, entries.shape[1]
        if self.recent + q < self._window + BATCH:
            free = slice(start + self.recent, start + self.recent + q)
            self.entries[:, free], self.position[:, free] = entries, position
            self.recent += q
            return None
        held = slice(start, start + self.recent)
        entries = torch.cat([self.entries[:, held], entries], dim=1)
        position = torch.cat([self.position[:, held], position], dim=1)
        kept = slice(start, start + self._window)
        self.entries[:, kept], self.position[:, kept] = entries[:, -self._window :], position[:, -self._window :]
        self.recent = self._window
        return self._fill_sinks(entries[:, : -self._window], position[:, : -self._window])

    def _fill_sinks(self, entries: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        filled = (self.position[:, : self._sinks] >= 0).sum(1, keepdim=True)
        real = position >= 0
        place = filled + real.cumsum(1) - 1
        stream, token = (real & (place < self._sinks)).nonzero(as_tuple=True)
        if len(stream) == 0:
            return entries, position
        column = place[stream, token]
        self.entries[stream, column], self.position[stream, column] = entries[stream, token], position[stream, token]
        position = position.clone()
        position[stream, token] = -1
        return entries, position

    def wait(self, entries: torch.Tensor, position: torch.Tensor) -> None:
        """Let up to `BATCH` tokens of each stream wait; those with position -1 are dropped."""
        stream, token = (position >= 0).nonzero(as_tuple=True)
        free = (self.position[:, self.waiting] >= 0).to(torch.uint8).argsort(dim=1, stable=True)
        rank = (position >= 0).cumsum(1) - 1
        column = self._sinks + free[stream, rank[stream, token]]
        self.entries[stream, column], self.position[stream, column] = entries[stream, token], position[stream, token]

    def end_wait(self, stream: torch.Tensor, column: torch.Tensor) -> None:
        """Drop waiting tokens that went elsewhere; `column` counts from the start of `waiting`."""
        self.position[stream, self._sinks + column] = -1

    def crop(self, tokens: int) -> None:
        """Drop the newest `tokens`, at most as many as the window holds."""
        self.recent -= tokens

    def rewind(self, end: int) -> int:
        """Let the window end before position `end`, which lies before its start.

        Of the tokens held those that belong into it move there, and later ones are dropped.

        Returns:
            The first position of the window; the caller puts tokens back that lie elsewhere.
        """
        stream, column = (self.position[:, : self._waiting_end] >= max(0, end - self._window)).nonzero(as_tuple=True)
        entries, position = self.entries[stream, column], self.position[stream, column]
        self.position[stream, column] = -1
        self.position[:, self._waiting_end :] = -1
        self.recent = min(end, self._window)
        self.put_back(stream, entries, position, end)
        return end - self.recent

    def put_back(self, stream: torch.Tensor, entries: torch.Tensor, position: torch.Tensor, end: int) -> None:
        """Put `entries` `[N, width]` at `position` `[N]` into the window that ends at `end`, but for later ones."""
        kept = position < end
        column = self._waiting_end + self.recent - end + position[kept]
        self.entries[stream[kept], column], self.position[stream[kept], column] = entries[kept], position[kept]

    def select(self, streams: torch.Tensor) -> None:
        """Keep `streams` (int64, repeats allowed) in this order."""
        self.entries, self.position = self.entries[streams], self.position[streams]
