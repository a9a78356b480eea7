"""Answers one question through one cache after the other, and measures how far each is from the full cache.

The prompt is prefilled once, exactly, and every cache takes the same keys and values in: as a prefill would hand them
over, or published and loaded. From the prompt's last token on everything goes through the cache.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from kvsched import SparKVConfig, publish
from kvsched.adapters.lm_eval import KVSchedLM
from kvsched.dynakv.layer import DynaKVLayer
from kvsched.errors import StoreError
from kvsched.generation import CACHES
from kvsched.sparkv.energy import EnergyMeter
from kvsched.sparkv.forward import PrefixCache

from .results import Cell, Question
from .suite import Variant

PATIENCE = 600.0  # seconds without a byte: a busy machine must not compute what is to be loaded
_PUBLISHED = {"store", "codec", "chunk_tokens"}  # options that the publisher of a prefix needs as well


@dataclass
class Reading:
    """What a cache made of tokens: the tokens, and the log-probabilities `[tokens, vocabulary]` before each."""

    tokens: list[int] = field(default_factory=list)
    parts: list[torch.Tensor] = field(default_factory=list)

    @property
    def log_probs(self) -> torch.Tensor:
        return torch.cat(self.parts)

    def of_tokens(self) -> torch.Tensor:
        """The log-probability of each token, `[tokens]`."""
        return self.log_probs.gather(1, torch.tensor(self.tokens)[:, None])[:, 0]


@dataclass
class Prompt:
    """A prompt that was prefilled once for all caches.

    Args:
        ids: int64 `[1, n]`, without the prompt's last token.
        cache: their exact keys and values.
        seconds: that computing them took.
    """

    ids: torch.Tensor
    cache: PrefixCache
    seconds: float

    @classmethod
    def of(cls, model: PreTrainedModel, ids: torch.Tensor) -> Prompt:
        begin, cache = time.perf_counter(), PrefixCache(model.config, ids.shape[1])
        if ids.shape[1]:
            cache.compute(model, ids, 0)
        return cls(ids, cache, time.perf_counter() - begin)


class Prompts:
    """The last prompt, as long as the question is the same."""

    def __init__(self) -> None:
        self._held: list[Prompt] = []

    @property
    def last(self) -> Prompt:
        return self._held[0]

    def of(self, model: PreTrainedModel, ids: torch.Tensor) -> tuple[Prompt, bool]:
        """The prefilled prompt, and whether it had to be computed now."""
        if self._held and torch.equal(self.last.ids, ids):
            return self.last, False
        self._held.clear()  # gives its memory back first
        self._held.append(Prompt.of(model, ids))
        return self.last, True


class MeasuredLM(KVSchedLM):
    """The model with one cache of a suite; batches are of one question.

    Attributes:
        reading: what this cache made of the reference tokens of the question.
        answer: the tokens generated; `None` where continuations were scored.
        prompt_tokens, prefill_seconds, bytes_read, dram_bytes: as in `Question`.
        shared_seconds: spent in the question's one prefill, if it came in the time of this cache.
        measuring_seconds: spent on what no user of the cache would do: to publish, and to read the reference.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, variant: Variant, prompts: Prompts
    ) -> None:
        self.variant, self._prompts = variant, prompts
        options, name = dict(variant.options), variant.cache if variant.cache in CACHES else "full"
        if name.endswith("dynakv"):
            options["policy"] = variant.policy
        if variant.cache.startswith("sparkv"):  # all that is published is loaded: the codec's worst case
            self._store = tempfile.TemporaryDirectory()
            options |= {
                "codec": variant.codec,
                "store": self._store.name,
                "planner": "stream",
                "stall_timeout": PATIENCE,
            }
        super().__init__(model, name, options, tokenizer=tokenizer, batch_size=1)
        self.begin([])

    def begin(self, reference: list[int]) -> None:
        """Begin another question, which the full cache has answered with the tokens `reference`."""
        self.reading = Reading()
        self.answer: list[int] | None = None
        self.prompt_tokens = self.bytes_read = self.dram_bytes = 0
        self.prefill_seconds = self.shared_seconds = self.measuring_seconds = 0.0
        self._reference = reference

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor) -> Cache:
        prompt = self.prefilled(ids)
        if self.cache.endswith("dynakv"):
            self.cache_options["budget"] = self.budget
        if self.cache.startswith("sparkv"):
            return self._published(prompt, mask)
        return self.taken(prompt)

    def prefilled(self, ids: torch.Tensor) -> Prompt:
        """The question's prompt, int64 `[1, n]` without its last token."""
        prompt, now = self._prompts.of(self.model, ids)
        self.shared_seconds += prompt.seconds if now else 0.0
        self.prefill_seconds, self.prompt_tokens = prompt.seconds, ids.shape[1] + 1
        return prompt

    @property
    def budget(self) -> int:
        """Tokens of the prompt, beside sinks and recent ones, that take part in a step."""
        assert self.variant.budget is not None
        return round(self.variant.budget * self.prompt_tokens)

    def taken(self, prompt: Prompt) -> Cache:
        """A new cache that has taken a prompt in."""
        cache = self.new_cache()
        cache.activate_past_recording()
        return take(cache, prompt.cache)

    def _published(self, prompt: Prompt, mask: torch.Tensor) -> Cache:
        """Published in nobody's time, into a store of its own, and loaded."""
        begin = time.perf_counter()
        self._store = tempfile.TemporaryDirectory()
        self.cache_options["store"] = self._store.name
        config = SparKVConfig(**{name: self.cache_options[name] for name in _PUBLISHED & self.cache_options.keys()})
        published = prompt.ids.shape[1] >= config.chunk_tokens  # what is shorter is computed by whoever needs it
        if published:
            publish(self.model, prompt.ids, config=config, computed=prompt.cache)
        self.measuring_seconds += time.perf_counter() - begin
        cache = super().prefill(prompt.ids, mask)
        fallback = getattr(cache, "prefix", cache).report().fallback
        if published and fallback is not None:
            raise StoreError(
                f"the prefix was not loaded whole, so its codec cannot be measured: {fallback}. Run again."
            )
        return cache

    def log_probs(self, cache: Cache, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[torch.Tensor]:
        for part in super().log_probs(cache, ids, mask):
            self.reading.parts.append(part[0].cpu())
            yield part
        self._weigh(cache)

    def _score(self, contexts: list[Any]) -> Iterator[tuple[int, tuple[float, bool]]]:
        for path, ends in contexts[0].paths.items():
            self.reading.tokens += [*path, ends[0][1]]
        return super()._score(contexts)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        sequences, logits, cache = self.decoded(context, max_length, stop, **generation_kwargs)
        begin = time.perf_counter()
        self._weigh(cache)
        self.answer = sequences[0, context.shape[1] :].tolist()
        self._read_reference(context, cache, torch.nn.functional.log_softmax(logits, dim=-1))
        self.measuring_seconds += time.perf_counter() - begin
        return sequences

    def decoded(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Cache]:
        """An answer: prompt and tokens `[1, n + t]`, logits `[t, vocabulary]` of these, and the cache, which has read
        all tokens but the last."""
        asked = {"return_dict_in_generate": True, "output_logits": True, **generation_kwargs}
        generated: Any = super()._model_generate(context, max_length, stop, **asked)
        return generated.sequences, torch.cat(generated.logits), generated.past_key_values

    def _read_reference(self, context: torch.Tensor, cache: Cache, log_probs: torch.Tensor) -> None:
        """Make the cache read what the full cache answered; up to the first different token it has done so already."""
        assert self.answer is not None
        tokens = self._reference or self.answer
        known = min(equal_prefix(self.answer, tokens) + 1, len(self.answer), len(tokens))
        self.reading = Reading(tokens, [log_probs[:known].cpu()])
        if known == len(tokens):
            return
        cache = self.rewound(cache, len(self.answer) - known)
        prompt = context.shape[1] - 1
        known = cache.get_seq_length() - prompt  # less than before where a cache can only begin again
        self.reading.parts = [log_probs[:known].cpu()]
        ahead = torch.cat([context[:, -1:], torch.tensor([tokens[:-1]], device=context.device)], dim=1)[:, known:]
        bytes_read, dram_bytes = self.bytes_read, self.dram_bytes
        for _ in self.log_probs(cache, ahead, torch.ones(1, prompt + len(tokens), dtype=torch.long)):
            pass
        self.bytes_read, self.dram_bytes = bytes_read, dram_bytes

    def _weigh(self, cache: Cache) -> None:
        """What the cache has read and holds by now."""
        parts: list[Any] = [cache, getattr(cache, "prefix", None)]
        reports = [one.report() for one in parts if hasattr(one, "report")]
        names = ("bytes_read", "bytes_streamed", "bytes_refined")
        self.bytes_read = sum(getattr(one, name, 0) for one in reports for name in names)
        held = [one.dram_bytes for one in reports if hasattr(one, "dram_bytes")]
        self.dram_bytes = sum(held) if held else sum(map(_held, cache.layers))


def ask(lm: MeasuredLM, task: Task, instances: Sequence[Instance], reference: MeasuredLM, cell: Cell) -> Question:
    """Ask a question through a cache, and compare it with the full cache, which was asked before.

    Args:
        lm: with the cache.
        task: scores the answer.
        instances: the requests of one document of the task.
        reference: with the full cache; `lm` itself when that is asked.
    """
    first = instances[0]
    lm.begin([] if lm is reference or reference.answer is None else reference.answer)
    begin = time.perf_counter()
    with EnergyMeter() as meter:
        responses = getattr(lm, first.request_type)(list(instances), disable_tqdm=True)
    seconds = time.perf_counter() - begin - lm.shared_seconds - lm.measuring_seconds
    metric, score = scored(task, instances, responses, cell.context)
    own, full = lm.reading, reference.reading
    logprob, full_logprob = own.of_tokens(), full.of_tokens()
    if first.request_type == "loglikelihood" and task.OUTPUT_TYPE != "multiple_choice":
        metric, score = "logprob", float(logprob.mean())
    generated = lm.answer is not None
    return Question(
        **dataclasses.asdict(cell),
        question=str(first.doc_id),
        metric=metric,
        score=score,
        prompt_tokens=lm.prompt_tokens,
        answer_tokens=len(lm.answer) if lm.answer is not None else len(own.tokens),
        answer=responses[0] if generated else None,
        logprob=_rounded(logprob),
        full_logprob=_rounded(full_logprob),
        kl=_rounded(divergence(full.log_probs, own.log_probs)),
        equal_prefix=equal_prefix(lm.answer or [], reference.answer or []) if generated else None,
        prefill_seconds=lm.prefill_seconds,
        seconds=max(0.0, seconds),
        bytes_read=lm.bytes_read,
        dram_bytes=lm.dram_bytes,
        joules=meter.joules,
    )


def take(cache: Cache, prefix: PrefixCache) -> Cache:
    """Give an empty cache a prefix, `[1, heads, n, head_dim]` in each layer, as a prefill hands it over."""
    for number, source in enumerate(prefix.layers):
        if not source.is_initialized:
            break  # the prompt has a single token, which is still to come
        layer = cache.layers[number]
        if isinstance(layer, DynaKVLayer):
            layer.take_in(source.keys, source.values, torch.ones(1, source.capacity, dtype=torch.bool))
        else:
            cache.update(source.keys, source.values, number)
    return cache


def divergence(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of each of `full` from `other`, log-probabilities `[n, vocabulary]`: `[n]`, nats."""
    return torch.nn.functional.kl_div(other, full, reduction="none", log_target=True).sum(-1).clamp_min(0.0)


def equal_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers have in common before they part."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def scored(
    task: Task, instances: Sequence[Instance], responses: Sequence[Any], context: int | None
) -> tuple[str, float]:
    """The task's first metric of a question. RULER names its metric by the length of the context."""
    for instance, response in zip(instances, responses, strict=True):
        instance.resps = [response]
    filters = task._filters[0]
    filters.apply(instances)
    found = task.process_results(instances[0].doc, [one.filtered_resps[filters.name] for one in instances])
    metric = str(context) if str(context) in found else next(iter(found))
    value = found[metric]
    return metric, float(value if isinstance(value, int | float) else 0.0)


def _held(layer: Any) -> int:
    """Bytes of a layer's keys and values in memory, quantised ones included."""
    tensors = [getattr(layer, name, None) for name in ("keys", "values", "_quantized_keys", "_quantized_values")]
    return sum(_nbytes(one) for one in tensors)


def _nbytes(held: Any) -> int:
    if isinstance(held, tuple | list):
        return sum(map(_nbytes, held))
    if isinstance(held, dict):
        return sum(map(_nbytes, held.values()))
    inner = getattr(held, "__tensor_flatten__", None)  # quanto's tensors are made of plain ones
    if inner is not None and type(held) is not torch.Tensor:
        return sum(_nbytes(getattr(held, name)) for name in inner()[0])
    return held.nbytes if isinstance(held, torch.Tensor) else 0


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(float(value), 6) for value in values]
