"""How a prefix is divided between computing and streaming.

Pure functions over two tables, `compute[t, d]` (seconds to compute token chunk t to depth d, never falling with d) and
`stream[t, d]` (seconds to stream its layers d..L-1, never rising with d), both float `[chunks, layers + 1]`; infinity
in either forbids a depth. A planner returns depths `[chunks]` that never rise from chunk to chunk and are not
forbidden, and raises `ValueError` where there are none.

Both paths run at the same time and, with such a staircase, computing never waits for a stream, so a plan takes the
longer of the two sums (`makespan`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

# Steps into which compute time is rounded: they keep the result within 0.5 % of the exact optimum.
_STEPS = 2000
# Plans of the rounded problem whose true cost is looked at.
_CANDIDATES = 16
# The greedy planner's stages last this share of the better single path; the paper leaves dt open.
_STAGES = 32


@dataclass(frozen=True)
class Objective:
    """What a plan costs: a weighted sum of its compute seconds, its stream seconds and the longer of the two.

    The default is time. Watts as weights make it joules; `energy.PowerProfile.objective` mixes both. None is negative.
    """

    compute: float = 0.0
    stream: float = 0.0
    makespan: float = 1.0

    def __call__(self, compute: np.ndarray, stream: np.ndarray) -> np.ndarray:
        """Cost of plans that compute and stream for so many seconds; arrays of one shape."""
        parts = ((self.compute, compute), (self.stream, stream), (self.makespan, np.maximum(compute, stream)))
        # A weight of 0 is left out rather than multiplied: a forbidden depth's infinity would become no number.
        return sum((weight * seconds for weight, seconds in parts if weight), np.zeros_like(compute))


TIME = Objective()


class Planner(Protocol):
    """Chooses depths `[chunks]` from `compute` and `stream`, both `[chunks, layers + 1]`."""

    def __call__(self, compute: np.ndarray, stream: np.ndarray, objective: Objective = TIME) -> np.ndarray: ...


def totals(compute: np.ndarray, stream: np.ndarray, depths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seconds computed and seconds streamed by plans `[..., chunks]`, both `[...]`."""
    rows = np.arange(compute.shape[0])
    return compute[rows, depths].sum(-1), stream[rows, depths].sum(-1)


def makespan(compute: np.ndarray, stream: np.ndarray, depths: np.ndarray) -> float:
    """Seconds until both paths have ended."""
    return float(TIME(*totals(compute, stream, depths)))


def local(compute: np.ndarray, stream: np.ndarray, objective: Objective = TIME) -> np.ndarray:
    """Compute everything that may be computed."""
    return _nearest(compute, stream, np.full((1, len(compute)), compute.shape[1] - 1))[0]


def stream_all(compute: np.ndarray, stream: np.ndarray, objective: Objective = TIME) -> np.ndarray:
    """Stream everything that may be streamed, as CacheGen does."""
    return _nearest(compute, stream, np.zeros((1, len(compute)), dtype=int))[0]


def token_split(compute: np.ndarray, stream: np.ndarray, objective: Objective = TIME) -> np.ndarray:
    """Early chunks computed to full depth, late ones streamed, with the best meeting point (Cake, Strong Hybrid).

    As in Cake (arXiv 2410.03065) a chunk goes one way as a whole: the two ends meet at a chunk's boundary.
    """
    chunks, columns = compute.shape
    wanted = np.tri(chunks + 1, chunks, -1, dtype=int) * (columns - 1)
    return _best(compute, stream, _nearest(compute, stream, wanted), objective)


def layer_split(compute: np.ndarray, stream: np.ndarray, objective: Objective = TIME) -> np.ndarray:
    """Every chunk computed to the same depth, the best one."""
    chunks, columns = compute.shape
    wanted = np.repeat(np.arange(columns)[:, None], chunks, axis=1)
    return _best(compute, stream, _nearest(compute, stream, wanted), objective)


def greedy(compute: np.ndarray, stream: np.ndarray, objective: Objective = TIME) -> np.ndarray:
    """The SparKV paper's scheduler: stage by stage, first the pieces that are cheap and unlock cheap ones.

    In each stage of length dt the compute side takes ready pieces by 1/t_compute plus the sum of 1/t_compute over the
    pieces that each would unlock, choosing anew after every piece, until dt is used up; then the stream side does the
    same by 1/t_stream. Adapted to where it runs here:

    * A piece is a layer of a token chunk, not one head of it: with dense attention heads cannot part (`grid.py`).
    * The paper lets (t, l) be computed once (t-1, l) is there by either route. Here it has to be computed, and a piece
      is streamed only after those above it and behind it, so that depths never rise and computing never waits.
      Streaming therefore unlocks pieces to stream, not to compute, and its potential is that of those.
    * A stage ends before the first piece that does not fit, but never empty; dt is 1/32 of the better single path (the
      paper is silent).

    The objective is not looked at: the paper schedules by time.
    """
    lowest, highest = stream_all(compute, stream), local(compute, stream)
    stage = min(makespan(compute, stream, lowest), makespan(compute, stream, highest)) / _STAGES
    layers = compute.shape[1] - 1
    # Seen from the last chunk and the last layer, streaming advances just as computing does from the first.
    computing = _Front(_seconds(compute), lowest.copy())
    streaming = _Front(_seconds(stream[::-1, ::-1]), layers - highest[::-1])
    while (open_layers := layers - streaming.depths[::-1] - computing.depths).any():
        computing.advance(open_layers, stage)
        open_layers = layers - streaming.depths[::-1] - computing.depths
        streaming.advance(open_layers[::-1], stage)
    return _nearest(compute, stream, computing.depths[None])[0]


class _Front:
    """One side of the greedy schedule: how deep each chunk is done, and which piece comes next.

    Args:
        seconds: `[chunks, layers]`, of each piece.
        depths: `[chunks]`, where the front starts; advanced in place.
    """

    def __init__(self, seconds: np.ndarray, depths: np.ndarray) -> None:
        self.seconds, self.depths = seconds, depths
        with np.errstate(divide="ignore"):
            self.speed = np.pad(1 / seconds, ((0, 1), (0, 2)))  # nothing is gained beyond the last chunk and layer

    def advance(self, open_layers: np.ndarray, stage: float) -> None:
        """Take pieces for `stage` seconds; `open_layers` `[chunks]` is how many the other side has left to take."""
        left, used, rows = open_layers.copy(), 0.0, np.arange(len(self.depths))
        while True:
            behind = np.append(self.depths[1:], -1)
            ahead = np.append(np.iinfo(int).max, self.depths[:-1])
            ready = (left > 0) & (ahead > self.depths)
            if not ready.any():
                return
            # The next layer of the chunk is unlocked if the chunk before has it, the same layer of the next chunk if
            # that one waits for it.
            deeper = np.where(ahead > self.depths + 1, self.speed[rows, self.depths + 1], 0)
            after = np.where(behind == self.depths, self.speed[rows + 1, self.depths], 0)
            chunk = int(np.argmax(np.where(ready, self.speed[rows, self.depths] + deeper + after, -1)))
            seconds = self.seconds[chunk, self.depths[chunk]]
            if used > 0 and used + seconds > stage:
                return
            used += seconds
            self.depths[chunk] += 1
            left[chunk] -= 1


def _seconds(table: np.ndarray) -> np.ndarray:
    """`[chunks, layers]`: what each further layer costs; a forbidden depth costs what the last allowed one did."""
    return np.diff(np.maximum.accumulate(np.where(np.isfinite(table), table, 0), axis=1), axis=1)


def optimal(compute: np.ndarray, stream: np.ndarray, objective: Objective = TIME) -> np.ndarray:
    """The staircase with the lowest cost, by dynamic programming from the last chunk to the first.

    `least[d, s]` is the least time streamed by the chunks from t on, when they compute for `s` steps in all and none is
    deeper than `d`; any objective can be read off the last row. Steps are the differences of rounded sums over chunks,
    so that a run of chunks of equal depth is off by one step at most. A Lagrangian relaxation would be quicker and
    misses the optimum by up to a half, because few staircases lie on the convex hull of (compute, stream).
    """
    chunks, columns = compute.shape
    simple = [plan(compute, stream, objective) for plan in (local, stream_all, token_split, layer_split)]
    allowed = np.isfinite(compute) & np.isfinite(stream)
    finite = np.where(allowed, compute, 0)
    # What a plan of no more than the best simple cost can compute at most: cost >= (compute + makespan) x seconds.
    bound = float(finite.max(axis=1).sum())
    if objective.compute + objective.makespan > 0:
        cost = min(float(objective(*totals(compute, stream, depths))) for depths in simple)
        bound = min(bound, cost / (objective.compute + objective.makespan))
    step = bound / _STEPS or 1.0
    steps = np.diff(np.rint(finite.cumsum(axis=0) / step), axis=0, prepend=0).astype(int)

    least = np.full((columns, _STEPS + 1), np.inf)
    least[:, 0] = 0.0
    choices = np.empty((chunks, columns, _STEPS + 1), dtype=np.int16)
    for t in reversed(range(chunks)):
        after, least = least, np.full((columns, _STEPS + 1), np.inf)
        for d in range(columns):
            if d:
                least[d], choices[t, d] = least[d - 1], choices[t, d - 1]
            used = steps[t, d]
            if used > _STEPS or not allowed[t, d]:
                continue
            here = stream[t, d] + after[d, : _STEPS + 1 - used]
            better = here < least[d, used:]
            least[d, used:][better] = here[better]
            choices[t, d, used:][better] = d
    ends = np.flatnonzero(np.isfinite(least[-1]))
    ends = ends[np.argsort(objective(ends * step, least[-1][ends]), kind="stable")[:_CANDIDATES]]
    plans = [*(_walk(choices, steps, int(end)) for end in ends), *simple]
    return _best(compute, stream, np.array(plans), objective)


def _walk(choices: np.ndarray, steps: np.ndarray, left: int) -> np.ndarray:
    """The depths that led to `left` compute steps in all."""
    depths, d = [], choices.shape[1] - 1
    for t in range(len(choices)):
        d = int(choices[t, d, left])
        left -= steps[t, d]
        depths.append(d)
    return np.array(depths)


def _best(compute: np.ndarray, stream: np.ndarray, plans: np.ndarray, objective: Objective) -> np.ndarray:
    """The cheapest of `plans` `[n, chunks]`."""
    return plans[int(np.argmin(objective(*totals(compute, stream, plans))))]


def _nearest(compute: np.ndarray, stream: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Plans `[n, chunks]` that come near `wanted` `[n, chunks]` and neither rise nor use a forbidden depth.

    Each is the deepest such plan that is nowhere deeper than `wanted`, or than the shallowest possible plan where that
    is deeper still.
    """
    chunks, columns = compute.shape
    allowed = np.isfinite(compute) & np.isfinite(stream)
    depth = np.arange(columns)
    at_most = np.maximum.accumulate(np.where(allowed, depth, -1), axis=1)
    at_least = np.minimum.accumulate(np.where(allowed, depth, columns)[:, ::-1], axis=1)[:, ::-1]
    lowest, floor = np.empty(chunks, dtype=int), 0
    for t in reversed(range(chunks)):
        lowest[t] = floor = at_least[t, floor]
        if floor == columns:
            raise ValueError("every staircase of depths has one that is forbidden")
    plans, ceiling = np.empty_like(wanted), np.full(len(wanted), columns - 1)
    for t in range(chunks):
        plans[:, t] = ceiling = at_most[t, np.minimum(np.maximum(wanted[:, t], lowest[t]), ceiling)]
    return plans


def lower_bound(compute: np.ndarray, stream: np.ndarray) -> float:
    """Seconds that no plan can beat.

    For any weight w in [0, 1] the longer of two times is at least w x compute + (1 - w) x stream, so the makespan of
    every staircase is at least the smallest such sum over all staircases. That minimum splits by chunk and is found
    exactly by dynamic programming; the best of many weights is returned. In the limit this is the Lagrangian dual, that
    is the optimum where a mix of two staircases would count as one plan too.
    """
    allowed = np.isfinite(compute) & np.isfinite(stream)
    low, high, bound = 0.0, 1.0, 0.0
    for _ in range(3):  # the bound is concave in w: each round looks closer around the best of the last
        weights = np.linspace(low, high, 33)[:, None]
        least = np.zeros((len(weights), compute.shape[1]))
        for allow, c, s in zip(allowed[::-1], compute[::-1], stream[::-1], strict=True):
            c, s = np.where(allow, c, 0), np.where(allow, s, 0)
            here = np.where(allow, weights * c + (1 - weights) * s, np.inf)
            least = np.minimum.accumulate(here + least, axis=1)
        best = int(np.argmax(least[:, -1]))
        bound = max(bound, float(least[best, -1]))
        low, high = weights[max(best - 1, 0), 0], weights[min(best + 1, 32), 0]
    return bound


PLANNERS: dict[str, Planner] = {
    "optimal": optimal,
    "greedy": greedy,
    "local": local,
    "stream": stream_all,
    "token_split": token_split,
    "layer_split": layer_split,
}
