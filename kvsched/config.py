"""The options of both caches: frozen dataclasses that are checked when they are built.

The same names appear in Python (`SparKVConfig(store=...)`), in YAML (`SparKVConfig.from_yaml(path)`) and in
`model.generate(..., cache_config={...})`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from .errors import ConfigError

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_DURATIONS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_Config = TypeVar("_Config", bound="CacheConfig")


def parse_bytes(size: int | str) -> int:
    """Bytes in `size`: a whole number, or text with a unit such as `"64MiB"` or `"1.5 GB"`.

    Raises:
        ConfigError: `size` is neither, or not above zero.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b)?\s*", size, re.IGNORECASE)
        if match is None:
            raise ConfigError(f"{size!r} is not a size: write a number of bytes, or a text such as '64MiB' or '2GB'.")
        size = int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ConfigError(f"{size!r} is not a size: write a number of bytes above zero, or a text such as '64MiB'.")
    return size


def parse_duration(duration: str) -> timedelta:
    """A duration such as `"90s"`, `"30m"`, `"12h"`, `"30d"` or `"4w"`.

    Raises:
        ConfigError: `duration` is none.
    """
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d+)?)\s*([smhdw])\s*", duration)
    if match is None:
        raise ConfigError(f"{duration!r} is not a duration: write a number and s, m, h, d or w, such as '30d'.")
    return timedelta(**{_DURATIONS[match[2]]: float(match[1])})


@dataclass(frozen=True)
class CacheConfig:
    """What both configurations share: how they are read and checked."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if get_origin(hint) is Literal:
                if value not in get_args(hint):
                    raise ConfigError(f"{field.name}={value!r}: choose one of {', '.join(map(repr, get_args(hint)))}.")
            elif not _fits(value, hint):
                wanted = getattr(hint, "__name__", str(hint))
                raise ConfigError(f"{self._shown(field.name)} should be of type {wanted}, not {type(value).__name__}.")

    @classmethod
    def from_dict(cls: type[_Config], options: Mapping[str, Any] | None) -> _Config:
        """Build from a plain mapping, as `cache_config` carries it.

        Raises:
            ConfigError: an option is not known (the message offers the nearest one) or has an invalid value.
        """
        options = dict(options or {})
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    f"{cls.__name__} has no option {name!r}. Did you mean {near!r}? All options: {', '.join(known)}."
                )
        return cls(**options)

    @classmethod
    def merge(
        cls: type[_Config], options: CacheConfig | Mapping[str, Any] | None, changes: Mapping[str, Any]
    ) -> _Config:
        """`options` with `changes` on top, checked; what both caches accept in their constructors."""
        if isinstance(options, CacheConfig):
            options = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        return cls.from_dict({**(options or {}), **changes})

    @classmethod
    def from_yaml(cls: type[_Config], path: str | Path) -> _Config:
        """Build from a YAML file that holds one mapping of options.

        Raises:
            ConfigError: the file cannot be read, is no mapping, or holds an invalid option.
        """
        try:
            options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read options from {path}: {error}") from error
        if options is not None and not isinstance(options, dict):
            raise ConfigError(f"{path} should hold a mapping of options, not a {type(options).__name__}.")
        return cls.from_dict(options)

    def _require(self, name: str, condition: bool, rule: str) -> None:
        if not condition:
            raise ConfigError(f"{self._shown(name)}: it must be {rule}.")

    def _shown(self, name: str) -> str:
        """An option with its value, but a secret by its name alone."""
        (field,) = (field for field in dataclasses.fields(self) if field.name == name)
        return f"{name}={getattr(self, name)!r}" if field.repr else name


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the plain type or union `hint`; an int passes for a float, a bool never for a number."""
    types = tuple(get_origin(part) or part for part in get_args(hint) or (hint,))
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, (*types, int) if float in types else types)


@dataclass(frozen=True)
class SparKVConfig(CacheConfig):
    """Options of the hybrid prefill cache.

    Args:
        store: where published chunks live: a folder, `file:///folder`, `http(s)://host/path` or `s3://bucket/path`.
        codec: how a layer of a chunk is written. `lossless` keeps every bit of the model's dtype, and so the tokens of
            a local prefill; `int8`, `balanced` and `small` give up more and more precision for fewer bytes;
            `progressive` loads a coarse version of `balanced`, and what it lacks while decoding goes on.
        chunk_tokens: tokens in a chunk, the unit that is published, streamed or computed. The paper uses 1024;
            256 lets a context of a few thousand tokens be divided finely enough for both paths to end together.
        planner: `optimal` divides the work by cost. The rest are for comparison: `stream` streams the whole prefix,
            `local` computes all of it, `token_split` computes the first chunks and streams the others, `layer_split`
            computes the same lower layers of all, `greedy` is the SparKV paper's scheduler.
        cost_model: what predicts compute time: `profile`, measured by itself when first needed, or `learned`, the
            paper's network, which `kvsched profile --learned` trains.
        device: whose power profile energy is reckoned by: a name from `configs/devices`, or a YAML file.
        radio: of that device, over which chunks arrive.
        energy_weight: what `optimal` minimises, from 0 (time) to 1 (energy). In between a joule weighs as much as the
            time in which the device would use it computing; anything above 0 needs `device`.
        stall_timeout: seconds without one arriving byte after which a stream is given up and its part computed.
        token: sent to an HTTP server as `Authorization: Bearer`; give it to `https` stores only. S3 takes its
            credentials, region and endpoint from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...).
        certificate: a PEM file of certificate authorities to trust beside the system's.
        tenant_secret: 16 characters or more, known to those alone who share published prefixes. It hides the addresses
            from everybody else and signs the manifests; what is published without it, or with another, is not found.
    """

    store: str | os.PathLike[str] | None = None
    codec: Literal["lossless", "int8", "balanced", "small", "progressive"] = "balanced"
    chunk_tokens: int = 256
    planner: Literal["optimal", "greedy", "local", "stream", "token_split", "layer_split"] = "optimal"
    cost_model: Literal["profile", "learned"] = "profile"
    device: str | os.PathLike[str] | None = None
    radio: str = "wifi"
    energy_weight: float = 0.0
    stall_timeout: float = 5.0
    token: str | None = dataclasses.field(default=None, repr=False)
    certificate: str | os.PathLike[str] | None = None
    tenant_secret: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("chunk_tokens", 16 <= self.chunk_tokens <= 65536, "between 16 and 65536")
        self._require("energy_weight", 0 <= self.energy_weight <= 1, "between 0 (time) and 1 (energy)")
        self._require("energy_weight", self.energy_weight == 0 or self.device is not None, "0 where no device is named")
        self._require("stall_timeout", self.stall_timeout > 0, "above zero seconds")
        self._require("token", (self.token or "").isascii() and (self.token or "").isprintable(), "ASCII text")
        strong = self.tenant_secret is None or len(self.tenant_secret) >= 16
        self._require("tenant_secret", strong, "at least 16 characters, so that it cannot be guessed")


@dataclass(frozen=True)
class DynaKVConfig(CacheConfig):
    """Options of the clustered-offload decode cache.

    Args:
        directory: an existing folder for the cluster files, on the flash device; `None` takes the system's temporary
            folder. The files are removed when the cache goes away.
        policy: which tokens are grouped, and which groups are fetched. `dynakv` clusters them, follows the decode by
            splits and estimates what is left out. The rest are for comparison: `static`, `local`, `retroinfer`,
            `clusterkv`, `quest` and `token-topk`, as `kvsched.dynakv.policies` describes them.
        budget: tokens of each KV head that take part in a step beside sinks and recent tokens: those that wait for
            their cluster to be in DRAM, and the clusters fetched. A fraction such as 0.1 is of the context so far.
        mass: share of attention to reach, by estimate: of the budget only as much is fetched as that takes, in each
            head and step; `None` fetches all of it.
        sinks: tokens at the start of the sequence that always take part in attention.
        recent: newest tokens that always take part; a token enters a cluster only when it leaves this window.
        dram: bytes that the clustered layers may hold, all together: resident clusters, their index, sinks and recent
            tokens; a number or a text such as `"64MiB"`.
        prefill: how several new tokens attend to earlier ones that lie on flash (a prompt in chunks, a second turn,
            candidates of an assistant): `exact` lets all of them pass by, `retrieval` fetches `budget` tokens for
            every block of queries, which reads less and is not exact.
        cluster_size: mean tokens in a cluster; `None` takes the policy's own, 24 for `dynakv`. Fewer find more of the
            attention with the same budget, need more DRAM for the index, and are read from flash in smaller pieces.
        max_cluster_size: a cluster is split rather than grow beyond this.
        storage: how keys and values lie in clusters, on flash and in DRAM; `auto` is the model's own dtype, so nothing
            is lost. `int8` and `fp8` take 8 bits a number and a factor for each key and value: with `int8` a number of
            the key (turned back by its position and centred) or value is off by up to 1/254 of the largest there, with
            `fp8` by up to 1/16 of itself. docs/storage.md states what that does to a model.
        io_threads: reads in flight at once where the kernel does not take whole batches by itself.
    """

    directory: str | os.PathLike[str] | None = None
    policy: str = "dynakv"
    budget: int | float = 256
    mass: float | None = None
    sinks: int = 16
    recent: int = 64
    dram: int | str = "64MiB"
    prefill: Literal["exact", "retrieval"] = "exact"
    cluster_size: float | None = None
    max_cluster_size: int = 48
    storage: Literal["auto", "float32", "float16", "bfloat16", "int8", "fp8"] = "auto"
    io_threads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_bytes(self.dram)
        counted = isinstance(self.budget, int) and self.budget >= 0
        self._require("budget", counted or 0 < self.budget <= 1, "a number of tokens, or a fraction above 0 up to 1.0")
        self._require("mass", self.mass is None or 0 < self.mass <= 1, "above 0 and at most 1")
        self._require("sinks", self.sinks >= 0, "at least 0 tokens")
        self._require("recent", self.recent >= 1, "at least 1 token, the one just decoded")
        self._require("cluster_size", self.cluster_size is None or self.cluster_size >= 1, "at least 1 token")
        self._require("max_cluster_size", 2 <= self.max_cluster_size <= 4096, "between 2 and 4096 tokens")
        self._require("io_threads", 1 <= self.io_threads <= 256, "between 1 and 256")

    def tokens_for(self, context: int) -> int:
        """The budget in tokens after `context` of them."""
        return self.budget if isinstance(self.budget, int) else math.ceil(self.budget * context)
