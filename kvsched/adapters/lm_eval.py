"""lm-eval through the caches: the model `kvsched`, an `HFLM` whose every answer comes out of a kvsched cache.

lm-eval's own `hf` model scores multiple choice and perplexity in one plain forward pass, which no custom cache ever
sees. Here all of a context but its last token is prefilled, and everything after that, the continuation to be scored
or the answer to be generated, goes through the cache.

```sh
python -m kvsched.adapters.lm_eval --model kvsched --tasks hellaswag \\
    --model_args pretrained=Qwen/Qwen2.5-Coder-0.5B-Instruct,cache=dynakv,budget=256,dram=64MiB
```
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..config import DynaKVConfig, SparKVConfig
from ..errors import ConfigError, UnsupportedModelError
from ..generation import CACHES
from ..hub import fetch_model

_HFLM_ARGUMENTS = inspect.signature(HFLM.__init__).parameters.keys()
_OPTIONS = {
    field.name for config in (SparKVConfig, DynaKVConfig) for field in dataclasses.fields(config)
} - _HFLM_ARGUMENTS

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What lm-eval asks for: the texts, the context's token ids and the continuation's."""


@register_model("kvsched")
class KVSchedLM(HFLM):
    """lm-eval's `HFLM` with a cache of kvsched.

    Args:
        pretrained: a folder, a name on the hub, or a loaded model; `None` takes kvsched's default model.
        cache: `full` (transformers' DynamicCache), or a name that `generate(cache_implementation=...)` takes.
        cache_config: options of the cache. They can be given beside it under their own names as well (`budget=256`),
            but for `device`, which is where the model runs, as in HFLM.
        prefill_chunk: tokens of the prompt that are computed at once; `None` computes all together.
        score_chunk: tokens of a continuation that are scored at once, 0 for all together. Only 1, token by token,
            exercises a cache that decodes otherwise than it prefills, so that is the default of those.
        kwargs: further arguments of `HFLM`.

    Raises:
        ConfigError: the cache is unknown, or an option is.
        UnsupportedModelError: the model is an encoder-decoder.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        cache: str = "full",
        cache_config: Mapping[str, Any] | None = None,
        prefill_chunk: int | None = None,
        score_chunk: int | None = None,
        **kwargs: Any,
    ) -> None:
        names = ("full", *CACHES)
        if cache not in names:
            raise ConfigError(f"cache={cache!r}: choose one of {', '.join(map(repr, names))}.")
        for name, chunk, least in (("prefill_chunk", prefill_chunk, 1), ("score_chunk", score_chunk, 0)):
            if chunk is not None and not (isinstance(chunk, int) and chunk >= least):
                raise ConfigError(f"{name}={chunk!r}: it must be a whole number of tokens, at least {least}.")
        own = {name: kwargs.pop(name) for name in _OPTIONS & kwargs.keys()}
        if not isinstance(pretrained, str | None) and (unknown := kwargs.keys() - _HFLM_ARGUMENTS):
            raise ConfigError(  # HFLM would pass them to from_pretrained, which a loaded model does not need
                f"neither HFLM nor a cache has an option {', '.join(sorted(unknown))}. The caches' options: "
                f"{', '.join(sorted(_OPTIONS))}."
            )
        self.cache = cache
        self.cache_options = {**(cache_config or {}), **own}
        if cache == "full" and self.cache_options:
            raise ConfigError(f"cache='full' has no options, but got {', '.join(self.cache_options)}.")
        self.prefill_chunk = prefill_chunk
        self.score_chunk = int("dynakv" in cache) if score_chunk is None else score_chunk
        super().__init__(str(fetch_model()) if pretrained is None else pretrained, **kwargs)
        if self.backend != "causal":
            raise UnsupportedModelError("kvsched's caches are for decoder-only models: use --model hf for this one.")
        if hasattr(self, "accelerator"):  # HFLM shares the questions out among GPUs only; here among CPUs as well
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.new_cache()  # a wrong option shows now, not when the first context comes

    def new_cache(self) -> Cache:
        """An empty cache as configured."""
        if self.cache == "full":
            return DynamicCache(config=self.model.config)
        return CACHES[self.cache](self.model.config, self.cache_options)

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor) -> Cache:
        """A new cache that holds prompts.

        Args:
            ids: int64 `[batch, n]`, n may be 0.
            mask: int64 `[batch, n]`, 0 where a prompt is padded, on the left.
        """
        cache, n = self.new_cache(), ids.shape[1]
        cache.activate_past_recording()  # sliding layers, too, have to be cropped between two continuations
        loads, step = n > 1 and hasattr(cache, "loading"), self.prefill_chunk or max(n, 1)
        with cache.loading(self.model, ids, mask) if loads else contextlib.nullcontext():
            for start in range(cache.get_seq_length(), n, step):
                part = slice(start, min(start + step, n))
                self._forward(ids[:, part], mask[:, : part.stop], cache, logits_to_keep=1)
        return cache

    def rewound(self, cache: Cache, tokens: int) -> Cache:
        """The cache without the `tokens` tokens that came after the prompt."""
        cache.crop(-tokens)
        return cache

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache, **kwargs: Any) -> torch.Tensor:
        """Logits `[batch, new, vocabulary]` of new tokens `[batch, new]`; the mask covers the earlier ones as well."""
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, self.mixed_precision_dtype, self.mixed_precision_dtype is not None),
        ):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            return self.model(**inputs, **kwargs).logits

    def log_probs(self, cache: Cache, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[torch.Tensor]:
        """Read tokens into a cache, and give the distribution of what follows each of them.

        Args:
            cache: holds what comes before.
            ids: int64 `[batch, t]`, the tokens.
            mask: int64 `[batch, n + t]`, 0 where a prompt is padded.

        Returns:
            Log-probabilities `[batch, score_chunk, vocabulary]`, one tensor for each chunk.
        """
        before = mask.shape[1] - ids.shape[1]
        for part in torch.arange(ids.shape[1]).split(self.score_chunk or ids.shape[1]):
            logits = self._forward(ids[:, part], mask[:, : before + int(part[-1]) + 1], cache)
            yield torch.nn.functional.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        mask = generation_kwargs["attention_mask"]
        cache = self.prefill(context[:, :-1], mask[:, :-1])
        return super()._model_generate(context, max_length, stop, past_key_values=cache, **generation_kwargs)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        contexts: dict[tuple[int, ...], _Context] = {}
        for number, (_, context, continuation) in enumerate(requests):
            ids = tuple(context[-max(1, self.max_length + 1 - len(continuation)) :])
            contexts.setdefault(ids, _Context(ids)).add(number, continuation)
        ordered = sorted(contexts.values(), key=lambda one: -len(one.ids))
        size = override_bs or (self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size))
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests"
        ) as bar:
            for start in range(0, len(ordered), size):
                for number, answer in self._score(ordered[start : start + size]):
                    answers[number] = answer
                    if (texts := requests[number][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                    bar.update()
        return [answers[number] for number in range(len(requests))]

    def _score(self, contexts: list[_Context]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Prefill a batch of contexts, then read one continuation of each after the other into the cache.

        Returns:
            The number of each request, its log-probability, and whether it is what greedy decoding would give.
        """
        ids, mask = self._padded([context.ids for context in contexts], left=True)
        cache = self.prefill(ids[:, :-1], mask[:, :-1])
        rounds = max(len(context.paths) for context in contexts)
        for turn in range(rounds):
            # A row with fewer continuations than its neighbours reads its last one again, and nobody looks.
            paths = [list(context.paths)[min(turn, len(context.paths) - 1)] for context in contexts]
            read, _ = self._padded(paths, left=False)  # behind their end rows may hold anything
            tokens = torch.cat([ids[:, -1:], read], dim=1)
            scores = [_Scores(path) for path in paths]
            for part in self.log_probs(cache, tokens, torch.cat([mask, torch.ones_like(read)], dim=1)):
                for row, score in zip(part, scores, strict=True):
                    score.add(row)
            if turn < rounds - 1:
                cache = self.rewound(cache, tokens.shape[1])
            for context, path, score in zip(contexts, paths, scores, strict=True):
                if turn < len(context.paths):
                    yield from ((number, score.of(last)) for number, last in context.paths[path])

    def _padded(self, rows: Sequence[Sequence[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of unequal length, padded to one tensor, and its mask, both int64 `[batch, longest]`."""
        length = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
        for row, given in enumerate(rows):
            here = slice(length - len(given), None) if left else slice(len(given))
            ids[row, here], mask[row, here] = torch.tensor(given, dtype=torch.long), 1
        return ids.to(self.device), mask.to(self.device)


class _Context:
    """A context and all continuations that are asked of it.

    Attributes:
        paths: continuations without their last token; for each the requests' numbers and last tokens. So choices of
            a single token, as in MMLU, are read off one distribution.
    """

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids
        self.paths: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def add(self, number: int, continuation: Sequence[int]) -> None:
        *path, last = continuation
        self.paths.setdefault(tuple(path), []).append((number, last))


class _Scores:
    """Sums up a path's log-probability as its chunks come, and keeps the distribution behind its end."""

    def __init__(self, path: tuple[int, ...]) -> None:
        self._left = list(path)
        self._sum, self._greedy = 0.0, True
        self._end: torch.Tensor | None = None

    def add(self, log_probs: torch.Tensor) -> None:
        """The next `[t, vocabulary]`; rows behind the end of the path are ignored."""
        here, self._left = self._left[: len(log_probs)], self._left[len(log_probs) :]
        if here:
            tokens = torch.tensor(here, device=log_probs.device)
            self._sum += float(log_probs[: len(here)].gather(1, tokens[:, None]).sum())
            self._greedy &= bool((log_probs[: len(here)].argmax(-1) == tokens).all())
        if len(here) < len(log_probs) and self._end is None:
            self._end = log_probs[len(here)]

    def of(self, last: int) -> tuple[float, bool]:
        """Log-probability of the path followed by the token `last`, and whether it is greedy."""
        assert self._end is not None
        return self._sum + float(self._end[last]), self._greedy and int(self._end.argmax()) == last


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
