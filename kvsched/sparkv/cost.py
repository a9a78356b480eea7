"""What a piece costs: seconds to compute it on this device, seconds to stream it over this link.

Both are measured. A device's profile comes from a few timed forwards and is kept under the user's cache folder; a
link's goodput comes from the bytes that arrive. Both are corrected while a prefix loads.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import platformdirs
import torch
from pydantic import TypeAdapter, ValidationError
from tqdm.auto import trange
from transformers.cache_utils import DynamicCache

from .address import fingerprint
from .forward import PrefixCache, wait_for
from .grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FAR_CHUNKS = 16
_SHORT = 4  # of a chunk's tokens, by this, a short prompt is made
_ROUNDS = 3
# Mobile links fall and rise within seconds: what a shorter look sees is not what the rest of a load will get.
_WINDOW_SECONDS = 4.0
_LEAST_ARRIVALS = 3
_LEAST_SECONDS = 0.02
_SETTLED = 10, 0.15  # arrivals, and the seconds they span
_SILENCE_SECONDS = 0.1
_WINDOW_LAYERS = 48


@dataclass(frozen=True)
class DeviceProfile:
    """Seconds of depth-limited prefill on one device, for chunks of one size.

    Args:
        chunk_tokens: tokens in a chunk.
        base: `[layers + 1]`, seconds to compute a chunk without context to each depth; 0 at depth 0.
        per_token: `[layers + 1]`, seconds that each token of context before the chunk adds, by attention.
        short: seconds of the model's whole pass over a prompt of a quarter of a chunk, without context. It costs more
            than its share of a chunk: weights and context are read however few the tokens.
        short_per_token: seconds that each token of context before it adds.
    """

    chunk_tokens: int
    base: tuple[float, ...]
    per_token: tuple[float, ...]
    short: float
    short_per_token: float

    def compute_seconds(self, grid: Grid) -> np.ndarray:
        """`[chunks, layers + 1]`: seconds to compute each chunk of `grid` to each depth."""
        context = np.arange(grid.chunks)[:, None] * grid.chunk_tokens
        return np.array(self.base) + np.array(self.per_token) * context

    def pass_seconds(self, tokens: int, context: int) -> float:
        """Seconds of the model's whole pass over `tokens` behind `context` tokens; a short prompt's at least."""
        short = self.short + self.short_per_token * context
        chunk = self.base[-1] + self.per_token[-1] * context
        return float(short + max(chunk - short, 0.0) * max(_SHORT * tokens / self.chunk_tokens - 1, 0.0) / (_SHORT - 1))

    @classmethod
    def measure(cls, model: PreTrainedModel, chunk_tokens: int) -> DeviceProfile:
        """Time a chunk's forward at the start of a sequence and far into it, in turn: about 10 seconds on a CPU.

        The time of each depth is read off when its layer hands over keys and values, so one forward gives all depths,
        with the last layer counted as what it is: a K/V projection. The fastest of a few rounds counts: that is the
        device; what else keeps it busy at a moment is left to `ComputeRate`.
        """
        config = model.config.get_text_config(decoder=True)
        far = min(_FAR_CHUNKS * chunk_tokens, config.max_position_embeddings // 2)
        cache = PrefixCache(model.config, far + chunk_tokens)
        ids = torch.arange(chunk_tokens)[None] % config.vocab_size
        time_layers(cache, model, ids, 0)  # the first forward of a process also pays for memory and thread pools
        for layer in cache.layers:
            # What the context holds does not matter to time: the first chunk's keys, over and over.
            for start in range(chunk_tokens, far, chunk_tokens):
                first = slice(0, min(chunk_tokens, far - start))
                layer.write(start, layer.keys[:, :, first].clone(), layer.values[:, :, first].clone())
        rounds = [
            (time_layers(cache, model, ids, 0), time_layers(cache, model, ids, far))
            for _ in trange(_ROUNDS, desc="measuring this device", leave=False, disable=None)
        ]
        near_seconds, far_seconds = np.min(rounds, axis=0)
        slope = np.maximum(far_seconds - near_seconds, 0) / far
        prompt = ids[:, : max(1, chunk_tokens // _SHORT)]
        short, short_far = (min(_time_pass(cache, model, prompt, n) for _ in range(_ROUNDS)) for n in (0, far))
        per_token = max(short_far - short, 0.0) / far
        return cls(chunk_tokens, tuple(near_seconds.tolist()), tuple(slope.tolist()), short, per_token)

    @classmethod
    def of(cls, model: PreTrainedModel, chunk_tokens: int) -> DeviceProfile:
        """The kept profile of this model, device and chunk size; measured and kept if there is none."""
        try:
            profile = TypeAdapter(cls).validate_json(profile_path(model, chunk_tokens).read_bytes())
            if len(profile.base) == len(profile.per_token) == len(PrefixCache(model.config, 0).layers) + 1:
                return profile
        except (OSError, ValidationError):
            pass  # none was kept, or not by this version: a new one takes its place
        return cls.renew(model, chunk_tokens)

    @classmethod
    def renew(cls, model: PreTrainedModel, chunk_tokens: int) -> DeviceProfile:
        """Measure a profile and keep it for this model, device and chunk size."""
        profile, path = cls.measure(model, chunk_tokens), profile_path(model, chunk_tokens)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(asdict(profile)))
        draft.replace(path)
        return profile


def time_layers(cache: PrefixCache, model: PreTrainedModel, token_ids: torch.Tensor, start: int) -> np.ndarray:
    """`[layers + 1]`: seconds until `model` has computed `token_ids` `[1, n]` at position `start` to each depth."""
    seconds = [0.0]

    def note(layer: int) -> bool:
        seconds.append(time.perf_counter() - begin)
        return True

    begin = time.perf_counter()
    cache.compute(model, token_ids, start, note)
    return np.array(seconds)


@torch.no_grad()
def _time_pass(prefix: PrefixCache, model: PreTrainedModel, token_ids: torch.Tensor, context: int) -> float:
    """Seconds of a pass over `token_ids` `[1, n]` behind `prefix`'s first `context` tokens, as in `generate()`."""
    cache = DynamicCache(config=model.config)
    for number, layer in enumerate(prefix.layers):
        cache.update(layer.keys[:, :, :context], layer.values[:, :, :context], number)
    begin = time.perf_counter()
    model.base_model(input_ids=token_ids.to(model.device), past_key_values=cache, use_cache=True)
    wait_for(model.device)
    return time.perf_counter() - begin


def profile_path(model: PreTrainedModel, chunk_tokens: int) -> Path:
    """The file in which the profile of this model, device and chunk size is kept."""
    device = f"{model.device} {torch.get_num_threads()} {_device_name(model.device)}"
    name = hashlib.sha256(f"{fingerprint(model)} {device} {chunk_tokens}".encode()).hexdigest()[:32]
    return Path(platformdirs.user_cache_dir("kvsched")) / "profiles" / f"{name}.json"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()


class Slowdown(NamedTuple):
    """Actual over predicted seconds of computing beside a stream, as the last load on a device found them.

    Args:
        chunks: of chunks.
        passing: of the model's pass over the rest of the prompt, which meets the stream's last layers.
    """

    chunks: float = 1.0
    passing: float = 1.0


class ComputeRate:
    """Actual over predicted compute time, over the last layers computed.

    Args:
        prior: predicted seconds of computing that are taken to have gone by `factor`. They outweigh the first layers,
            which are quick to compute and so say little: they wait for memory and for whatever else runs.
        factor: actual over predicted until something is observed; of a device that loaded before, what it was then. A
            profile is taken alone, whereas a load shares the processor with its own stream.
    """

    def __init__(self, prior: float, factor: float = 1.0) -> None:
        self.prior, self._known = prior, factor
        self._recent: deque[tuple[float, float]] = deque(maxlen=_WINDOW_LAYERS)

    def observe(self, actual: float, predicted: float) -> None:
        """Add one layer's seconds."""
        self._recent.append((actual, predicted))

    @property
    def factor(self) -> float:
        """What predictions are to be multiplied by."""
        recent = [(self.prior * self._known, self.prior), *self._recent]
        actual, predicted = (sum(column) for column in zip(*recent, strict=True))
        return actual / predicted if predicted > 0 else self._known


class LinkRate:
    """Goodput and latency of a link over the last seconds; told by one thread, asked by another.

    Args:
        goodput: bytes a second to assume until enough has arrived; `None` where nothing is known.

    Attributes:
        latency: seconds from a request to its first bytes, the least so far; 0 until one was answered.
        is_settled: whether so much has arrived that the goodput is no first guess any more.
    """

    def __init__(self, goodput: float | None = None) -> None:
        self.latency = 0.0
        self.is_settled = goodput is not None
        self._known = goodput
        self._count, self._first = 0, math.inf
        self._decoded_bytes, self._decode_seconds = 0, 0.0
        self._arrivals: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def observe(self, size: int, now: float) -> None:
        """`size` bytes arrived at `now` (seconds, monotonic)."""
        with self._lock:
            self._arrivals.append((now, size))
            self._count, self._first = self._count + 1, min(self._first, now)
            self.is_settled |= self._count >= _SETTLED[0] and now - self._first >= _SETTLED[1]
            while len(self._arrivals) > _LEAST_ARRIVALS and now - self._arrivals[0][0] > _WINDOW_SECONDS:
                self._arrivals.popleft()

    def decoded(self, size: int, seconds: float) -> None:
        """`size` bytes took `seconds` to decode, beside whatever else the processor had to do."""
        self._decoded_bytes, self._decode_seconds = self._decoded_bytes + size, self._decode_seconds + seconds

    def answered(self, seconds: float) -> None:
        """A request's first bytes came after `seconds`."""
        self.latency = min(self.latency or seconds, seconds)

    def pause(self, now: float) -> None:
        """Nothing is asked of the link from `now` on: what follows is no silence, and what was measured stays known."""
        known = self.goodput(now)
        with self._lock:
            self._known = known
            self._arrivals.clear()

    def throughput(self, now: float) -> float | None:
        """Bytes a second that come into place: the link's goodput, or what decoding makes of it if that is less."""
        goodput = self.goodput(now)
        if goodput is None or self._decode_seconds == 0:
            return goodput
        return min(goodput, self._decoded_bytes / self._decode_seconds)

    def goodput(self, now: float) -> float | None:
        """Bytes a second of the link at `now`.

        Measured from arrival to arrival: what comes before the first is latency, and what comes after the last is part
        of the next. Only silence that is longer than the gaps so far counts.
        """
        with self._lock:
            times = [time for time, _ in self._arrivals]
            size = sum(size for _, size in self._arrivals) - self._arrivals[0][1] if times else 0
        if len(times) < _LEAST_ARRIVALS or times[-1] - times[0] < _LEAST_SECONDS:
            return self._known
        gap = (times[-1] - times[0]) / (len(times) - 1)
        is_silent = now - times[-1] > max(4 * gap, _SILENCE_SECONDS)
        return size / ((now if is_silent else times[-1]) - times[0])
