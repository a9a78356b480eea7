"""The token-chunk x layer grid over which a prefix is published, streamed and computed.

The paper decides per (token chunk, layer, head). With dense attention the output projection mixes the heads, so layer
l+1 of a chunk needs every head of layer l: what can be decided is a *depth* for each token chunk. Layers `[0, depth)`
are computed, `[depth, layers)` streamed, and depths that never rise from chunk to chunk (a staircase) let computing
go on without ever waiting for a stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """The whole token chunks of a prefix, and the layers of a model.

    Args:
        chunks: number of whole token chunks.
        chunk_tokens: tokens in each of them.
        layers: layers of the model.
    """

    chunks: int
    chunk_tokens: int
    layers: int

    @property
    def tokens(self) -> int:
        """Tokens that the chunks cover."""
        return self.chunks * self.chunk_tokens

    def span(self, chunk: int) -> slice:
        """Token positions of `chunk`."""
        return slice(chunk * self.chunk_tokens, (chunk + 1) * self.chunk_tokens)

    def is_staircase(self, depths: Sequence[int]) -> bool:
        """Whether `depths` (one a chunk) lie in `[0, layers]` and never rise."""
        steps = [self.layers, *depths, 0]
        return len(depths) == self.chunks and all(above >= below for above, below in itertools.pairwise(steps))
