"""How a prefix is divided between computing and streaming.

Pure functions over two tables, `compute[t, d]` (seconds to compute token chunk t to depth d, 0 at d = 0) and
`stream[t, d]` (seconds to stream its layers d..L-1, 0 at d = L), both `[chunks, layers + 1]`; infinity forbids a depth.
Each returns depths `[chunks]` that never rise from chunk to chunk.

Both paths run at the same time and, with such a staircase, computing never waits for a stream, so a plan takes the
longer of the two sums (`makespan`).
"""

from __future__ import annotations

import numpy as np

# Steps into which compute time is rounded; 2,000 keep the result within 0.5 % of the exact optimum.
_STEPS = 2000


def makespan(compute: np.ndarray, stream: np.ndarray, depths: np.ndarray) -> float:
    """Seconds until both paths have ended."""
    rows = np.arange(len(depths))
    return float(max(compute[rows, depths].sum(), stream[rows, depths].sum()))


def local(compute: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """Compute everything."""
    return np.full(len(compute), compute.shape[1] - 1)


def stream_all(compute: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """Stream everything, as CacheGen does."""
    return np.zeros(len(compute), dtype=int)


def optimal(compute: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """The staircase with the smallest makespan, by dynamic programming from the last chunk to the first.

    `least[d, s]` is the least time streamed by the chunks from t on, when they compute for `s` steps in all and none is
    deeper than `d`. A Lagrangian relaxation would be quicker and misses the optimum by up to a half, because few
    staircases lie on the convex hull of (compute, stream).
    """
    chunks, columns = compute.shape
    simple = [plan(compute, stream) for plan in (local, stream_all)]
    bound = min(makespan(compute, stream, depths) for depths in simple)
    if not np.isfinite(bound):
        bound = float(compute[np.isfinite(compute)].sum())
    step = bound / _STEPS or 1.0
    with np.errstate(invalid="ignore"):
        steps = np.where(np.isfinite(compute), np.rint(compute / step), _STEPS + 1).astype(int)

    least = np.full((columns, _STEPS + 1), np.inf)
    least[:, 0] = 0.0
    choices = np.empty((chunks, columns, _STEPS + 1), dtype=np.int16)
    for t in reversed(range(chunks)):
        after, least = least, np.full((columns, _STEPS + 1), np.inf)
        for d in range(columns):
            if d:
                least[d], choices[t, d] = least[d - 1], choices[t, d - 1]
            used = steps[t, d]
            if used > _STEPS or not np.isfinite(stream[t, d]):
                continue
            here = stream[t, d] + after[d, : _STEPS + 1 - used]
            better = here < least[d, used:]
            least[d, used:][better] = here[better]
            choices[t, d, used:][better] = d
    ends = np.maximum(np.arange(_STEPS + 1) * step, least[-1])
    candidates = [
        _walk(choices, steps, int(end)) for end in np.argsort(ends, kind="stable")[:8] if np.isfinite(ends[end])
    ]
    return min([*candidates, *simple], key=lambda depths: makespan(compute, stream, depths))


def _walk(choices: np.ndarray, steps: np.ndarray, left: int) -> np.ndarray:
    """The depths that led to `left` compute steps in all."""
    depths, d = [], choices.shape[1] - 1
    for t in range(len(choices)):
        d = int(choices[t, d, left])
        left -= steps[t, d]
        depths.append(d)
    return np.array(depths)


PLANNERS = {"optimal": optimal, "local": local, "stream": stream_all}
