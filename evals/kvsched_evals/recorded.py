"""Recorded links: bandwidth logs of real connections, and where in one a load is begun so that it meets a drop."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer

from .link import shaped_link

DROP = 0.5  # the share of its rate, or less, to which a link has to fall
EARLY = 0.25  # of a load's expected time: what passes before the drop
STREAMED = 0.25  # share of the bytes that a plan has to stream, so that the drop can matter to it
KNOWN_SECONDS = 5.0  # of the log before a load begins: what an earlier load would have measured


@dataclass(frozen=True)
class Recording:
    """A log as steps of `seconds` and `mbit` (10^6 bit/s), each `[steps]`."""

    seconds: np.ndarray
    mbit: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Recording:
        """A JSON list of steps with `duration_ms` and `bandwidth_kbps`.

        Raises:
            typer.BadParameter: the file is no such list.
        """
        try:
            steps = [(step["duration_ms"] / 1e3, step["bandwidth_kbps"] / 1e3) for step in json.loads(path.read_text())]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise typer.BadParameter(f"{path} is no recorded link: {error!r}") from error
        if not steps or min(map(min, steps)) < 0:
            raise typer.BadParameter(f"{path} is no recorded link: it has no steps, or negative ones.")
        seconds, mbit = np.array(steps).T
        return cls(seconds, mbit)

    def mean(self, begin: float, end: float) -> float:
        """Mean rate from second `begin` to second `end` of the log; its first and last rate hold outside."""
        return float((self._sent(np.array(end)) - self._sent(np.array(begin))) / (end - begin))

    def _sent(self, second: np.ndarray) -> np.ndarray:
        """Megabits that pass from the log's first second to each of `second`, of any shape; negative before."""
        return np.interp(second, *self._passed())

    def _passed(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds at which the rate changes, and megabits that have passed by then."""
        times = np.concatenate([[-1e6], self.seconds.cumsum()[:-1], [1e6]])
        times = np.insert(times, 1, 0.0)
        rates = np.concatenate([self.mbit[:1], self.mbit])
        sent = np.concatenate([[0.0], (np.diff(times) * rates).cumsum()])
        return times, sent - sent[1]

    def known(self, step: int) -> float:
        """The rate that is known of the link when a load begins at `step`: its mean over the last seconds before."""
        begin = float(self.seconds[:step].sum())
        return self.mean(begin - KNOWN_SECONDS, begin)

    def before_drop(self, compute_seconds: float, megabits: float) -> tuple[int, float] | None:
        """Where to begin a load so that the link falls soon after, and to which share of its rate it falls.

        A load on which both paths work all the time takes `1 / (1 / compute_seconds + known / megabits)` seconds at the
        known rate. Of all steps at which such a load would stream at least a quarter of its bytes, and finds the known
        rate at first, or half of it, the one is taken where the link's mean over the last three quarters of that time
        is the smallest share of what it was before: of the known rate or of the first quarter's, whichever is less.
        `None` where that is never half or less.

        Args:
            compute_seconds: to compute the whole context.
            megabits: to stream it.
        """
        best: tuple[int, float] | None = None
        for step, begin in enumerate(np.concatenate([[0.0], self.seconds.cumsum()[:-1]]).tolist()):
            known = self.known(step)
            seconds = 1 / (1 / compute_seconds + known / megabits)
            if known * seconds < STREAMED * megabits or begin + seconds > self.seconds.sum():
                continue
            turn = begin + EARLY * seconds
            at_first = self.mean(begin, turn)
            if at_first < DROP * known:  # it has fallen already
                continue
            share = self.mean(turn, begin + seconds) / min(known, at_first)
            if share <= (best[1] if best else DROP):
                best = step, share
        return best

    def possible_gain(self, step: int, compute_seconds: np.ndarray, megabits: float) -> float:
        """Time of a load from `step` on whose plan is kept, over that of one that knows the log: no plan gains more.

        The plan that is kept was made with the known rate. Neither path hinders the other, and a load is over when the
        chunks computed from the front meet those streamed from the back.

        Args:
            compute_seconds: `[chunks]`, to compute each chunk.
            megabits: to stream them all.
        """
        begin, known = self.seconds[:step].sum(), self.known(step)
        seconds = np.linspace(0.0, float(compute_seconds.sum()), 10_000)
        streamed = self._sent(begin + seconds) - self._sent(begin)
        done = np.concatenate([[0.0], compute_seconds.cumsum()])
        computed = np.interp(seconds, done, np.linspace(0.0, megabits, len(done)))
        planned = int(np.argmax(computed + known * seconds >= megabits))
        times, sent = self._passed()
        arrived = np.interp(self._sent(begin) + megabits - computed[planned], sent, times) - begin
        kept = max(seconds[planned], float(arrived))
        return float(kept / seconds[np.argmax(computed + streamed >= megabits)])

    @contextlib.contextmanager
    def replayed(self, step: int, target: str, rtt_ms: float) -> Iterator[str]:
        """A link to `target` that follows the log from `step` on; after its end the last rate stays."""
        link, over = shaped_link(target, mbit=float(self.mbit[step]), rtt_ms=rtt_ms), threading.Event()

        def replay() -> None:
            for seconds, mbit in zip(self.seconds[step:].tolist(), self.mbit[step:].tolist(), strict=True):
                link.mbit = mbit
                if over.wait(seconds):
                    return

        with link as url:
            player = threading.Thread(target=replay, name="kvsched-replay")
            player.start()
            try:
                yield url
            finally:
                over.set()
                player.join()
