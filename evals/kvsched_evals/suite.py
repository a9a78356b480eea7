"""Suites: which tasks are asked through which caches, read from `configs/evals/*.yaml`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvsched.errors import ConfigError

from .results import Cell

SUITES = Path(__file__).parent / "suites"

Share = Annotated[float, Field(gt=0, le=1)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskEntry(_Checked):
    """A task of a suite.

    Args:
        task: its name in lm-eval, or among `kvsched_evals.data.TASKS`.
        contexts: lengths in tokens, for tasks whose prompts are made to a length; `None` for all others.
        limit: how many questions of each context and seed.
        max_gen_toks: tokens generated at most, if not as many as the task says; of a text that is scored, its first.
        num_fewshot: examples in front of the question, if not as many as the task says.
        chat: the question is put as the model's chat template has it.
    """

    task: str
    contexts: Annotated[list[Annotated[int, Field(ge=128)] | None], Field(min_length=1)] = [None]
    limit: Annotated[int, Field(ge=1)]
    max_gen_toks: Annotated[int, Field(ge=1)] | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    chat: bool = False


class CacheEntry(_Checked):
    """Caches of a suite: one for each combination of policy, budget and codec.

    Args:
        cache: `full`, `dynakv`, `sparkv`, `sparkv+dynakv`, or a peer: `hf-quantized`, which is transformers'
            QuantizedCache, or `kvpress`, which needs `make kvpress`.
        policy: of `dynakv`; of `kvpress` a press, `snapkv` or `expected-attention`.
        budget: of both: tokens of each KV head, beside sinks and recent ones, as a share of the prompt's.
        codec: of `sparkv`; of `hf-quantized` its backend and bits.
        options: further options of the cache, for all alike.
    """

    cache: Literal["full", "dynakv", "sparkv", "sparkv+dynakv", "hf-quantized", "kvpress"]
    policy: Annotated[list[str | None], Field(min_length=1)] = [None]
    budget: Annotated[list[Share | None], Field(min_length=1)] = [None]
    codec: Annotated[list[str | None], Field(min_length=1)] = [None]
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _complete(self) -> CacheEntry:
        selective = self.cache.endswith("dynakv") or self.cache == "kvpress"
        wanted = {
            "policy": selective,
            "budget": selective,
            "codec": self.cache.startswith("sparkv") or self.cache == "hf-quantized",
        }
        for name, needed in wanted.items():
            if needed == (None in getattr(self, name)):
                raise ValueError(f"{self.cache} {'needs a' if needed else 'has no'} {name}")
        return self


@dataclass(frozen=True)
class Variant:
    """One cache of a suite; see `CacheEntry`."""

    cache: str
    policy: str | None = None
    budget: float | None = None
    codec: str | None = None
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        budget = None if self.budget is None else f"{self.budget:.0%}"
        return " ".join(filter(None, (self.cache, self.policy, self.codec, budget)))


class Suite(_Checked):
    """Everything that a run asks, and through which caches.

    Args:
        seeds: each asks other questions where a task makes them up.
        tasks: a question of each is asked before the next question of any.
        caches: the first is `full`, which all others are compared with.
    """

    name: str
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    tasks: Annotated[list[TaskEntry], Field(min_length=1)]
    caches: Annotated[list[CacheEntry], Field(min_length=1)]

    @model_validator(mode="after")
    def _begins_with_the_reference(self) -> Suite:
        if self.caches[0].cache != "full":
            raise ValueError("the first of `caches` has to be `cache: full`, which all others are compared with")
        if len(set(self.variants)) != len(self.variants):
            raise ValueError("a cache is named twice in `caches`")
        return self

    @classmethod
    def load(cls, name: str) -> Suite:
        """A suite by the name of a file in `configs/evals`, or by the path of a YAML file.

        Raises:
            ConfigError: there is none, or it is invalid.
        """
        path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls.model_validate({"name": path.stem, **read})
        except OSError as error:
            known = ", ".join(sorted(each.stem for each in SUITES.glob("*.yaml")))
            raise ConfigError(f"cannot read the suite {path}: {error}. Give a YAML file, or one of {known}.") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the suite"
            raise ConfigError(f"{path}: {place}: {first['msg']}.") from error
        except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
            raise ConfigError(f"{path} should hold a suite, a mapping as in configs/evals: {error}") from error

    def limited(self, questions: int | None) -> Suite:
        """The same suite with at most so many questions of each task, context and seed; `None` changes nothing."""
        if questions is None:
            return self
        tasks = [entry.model_copy(update={"limit": min(entry.limit, questions)}) for entry in self.tasks]
        return self.model_copy(update={"tasks": tasks})

    @property
    def variants(self) -> list[Variant]:
        """All caches, the full one first."""
        return [
            Variant(entry.cache, policy, budget, codec, entry.options)
            for entry in self.caches
            for policy, budget, codec in itertools.product(entry.policy, entry.budget, entry.codec)
        ]

    @property
    def groups(self) -> list[tuple[TaskEntry, int | None, int]]:
        """Task, context and seed of each set of questions."""
        return [(entry, context, seed) for entry in self.tasks for context in entry.contexts for seed in self.seeds]

    def cell(self, task: str, context: int | None, seed: int, variant: Variant) -> Cell:
        """The cell of a task through a cache."""
        return Cell(
            suite=self.name,
            task=task,
            context=context,
            cache=variant.cache,
            policy=variant.policy,
            budget=variant.budget,
            codec=variant.codec,
            seed=seed,
        )

    @property
    def cells(self) -> list[Cell]:
        """All cells, as results are kept."""
        return [
            self.cell(entry.task, context, seed, variant)
            for entry, context, seed in self.groups
            for variant in self.variants
        ]
