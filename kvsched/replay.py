"""Replay: a recorded run decoded again by any policy, step by step, and compared with exact attention.

The layers are those of `generate()`; what is measured is computed beside them, in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kvsched_kernels import Part, merge_parts

from .config import DynaKVConfig
from .dynakv.decode import Decoder
from .dynakv.layer import DynaKVLayer
from .dynakv.policies import POLICIES, policy_named
from .dynakv.retrieval import Retrieval
from .dynakv.storage import ClusterStorage
from .errors import ConfigError, TraceError
from .trace import LayerTrace, Trace

ORACLE = "oracle"
"""The exact top-k: as many tokens as budget, sinks and recent window allow, chosen by what they turn out to weigh."""


@dataclass(frozen=True)
class Row:
    """What one KV head did in one measured step.

    Args:
        policy, layer, head: which; `head` counts KV heads.
        step: position of the token that was decoded.
        recall: share of the exact attention that the attended tokens hold, mean over the query heads of the group.
        oracle_recall: the same for the best choice of as many tokens, whichever they are.
        error: |output - exact| / |exact|, Euclidean over the outputs of the group, without the estimate.
        error_estimated: the same with the estimate, as decoding has it; equal to `error` where a policy makes none.
        tokens: attended; sinks, window and waiting tokens are counted.
        bytes_read, reads: from flash in this step. A read that serves several heads is shared by its entries.
        run_length: mean of the entries that a read brings in one piece; 0 without reads.
        splits, bytes_moved: since the row before (or the prompt): clusters split, and bytes put elsewhere by that.
    """

    policy: str
    layer: int
    head: int
    step: int
    recall: float
    oracle_recall: float
    error: float
    error_estimated: float
    tokens: int
    bytes_read: float
    reads: float
    run_length: float
    splits: int
    bytes_moved: int


@dataclass(frozen=True)
class Outcome:
    """All rows of a policy, and what its index came to.

    Args:
        index_bytes: DRAM that the index of all replayed layers takes at the end.
        table_bytes: DRAM of the tables that say where clusters lie; those of resident clusters grow with `dram`.
        kv_bytes: keys and values of all tokens, as the trace has them.
    """

    policy: str
    rows: list[Row]
    index_bytes: int
    table_bytes: int
    kv_bytes: int


class _WatchedDecoder(Decoder):
    """A decoder as it is, which notes what took part in a step and what was read for it."""

    def watch(self) -> None:
        """Begin a measured step."""
        streams = self.clusters.streams
        self.reads = np.zeros((streams, 3))  # of each head: bytes, reads, sum of run lengths
        self.taking_part = np.zeros(streams)  # reads that brought anything for the head
        self.chosen: list[torch.Tensor] = [torch.empty(0, dtype=torch.long)] * streams

    def read(self, count: int, addresses: np.ndarray) -> bool:
        """Share a read of `count` bytes among the heads that own `addresses`; False if none of them is here."""
        address, size = self.clusters.index.address.numpy(), self.clusters.index.size.numpy()
        found = np.isin(address, addresses) & (size > 0)
        entries = (size * found).sum(1, dtype=np.int64)
        if not found.any():
            return False
        share = entries / entries.sum()
        self.reads += np.outer(share, [count, 1, 0])
        self.reads[:, 2] += np.where(share > 0, entries.sum(), 0)
        self.taking_part += share > 0
        return True

    def parts(self, *arguments: Any) -> list[Part]:
        self.answer = super().parts(*arguments)
        used = self.dense.position[:, self.dense.used]
        self.attended = [torch.cat([row[row >= 0], more]) for row, more in zip(used, self.chosen, strict=True)]
        return self.answer

    def retrieve(self, found: Retrieval) -> tuple[torch.Tensor, torch.Tensor]:
        entries, position = super().retrieve(found)
        self.chosen = [row[row >= 0] for row in position]
        return entries, position


class _WatchedLayer(DynaKVLayer):
    """A layer as it is, whose decoder is watched."""

    decoder_class = _WatchedDecoder
    decoder: _WatchedDecoder


@torch.no_grad()
def replay(trace: Trace, config: DynaKVConfig, layers: Sequence[int], every: int) -> Outcome:
    """Decode a trace with `config.policy` and measure every `every`-th step, the first one included.

    Raises:
        ConfigError: `dram` cannot hold the clusters of one step.
        TraceError: a layer could not be read.
        FlashError: as in decoding.
    """
    tensors = {number: trace.layer(number) for number in layers}
    kv_bytes = sum(one.keys.nbytes + one.values.nbytes for one in tensors.values())
    if config.policy == ORACLE:
        return Outcome(ORACLE, _best_possible(trace, config, tensors, every), 0, 0, kv_bytes)
    rows: list[Row] = []
    storage = ClusterStorage(config)
    try:
        dense = policy_named(config.policy).dense_layers
        watched = {number: _WatchedLayer(config, storage, number) for number in layers if number >= dense}
        for number, layer in watched.items():
            _feed(layer, tensors[number], slice(0, trace.prompt_length), trace.scaling)
        before = {
            number: torch.stack([layer.clusters.splits, layer.clusters.moved]) for number, layer in watched.items()
        }
        for step in tqdm(range(trace.prompt_length, trace.tokens), desc=config.policy, unit=" steps"):
            measured = (step - trace.prompt_length) % every == 0
            storage.transfers.on_read = _share_reads(watched) if measured else None
            for layer in watched.values() if measured else ():
                layer.decoder.watch()
            for number, layer in watched.items():
                _feed(layer, tensors[number], slice(step, step + 1), trace.scaling)
            for number in layers if measured else ():
                if number not in watched:
                    rows += _whole(config.policy, number, step, trace.kv_heads)
                    continue
                layer = watched[number]
                changes = torch.stack([layer.clusters.splits, layer.clusters.moved])
                exact = _Exact(tensors[number], step, trace.scaling)
                rows += _measure(config.policy, number, step, layer.decoder, exact, changes - before[number])
                before[number] = changes
        index_bytes, table_bytes = sum(layer.index_bytes for layer in watched.values()), storage.table_bytes
    finally:
        storage.close()
    return Outcome(config.policy, rows, index_bytes, table_bytes, kv_bytes)


def _feed(layer: DynaKVLayer, tensors: LayerTrace, tokens: slice, scaling: float) -> None:
    """Give a layer tokens as a model would. The answer to a prompt is nobody's concern here."""
    keys, values, queries = (part[None, :, tokens] for part in (tensors.keys, tensors.values, tensors.queries))
    marked, values = layer.update(keys, values)

    def unanswered(*_: object, **__: object) -> tuple[torch.Tensor, None]:
        return queries, None

    layer.attention(unanswered, torch.nn.Identity(), queries.float(), marked, values, None, scaling=scaling)


def _share_reads(layers: dict[int, _WatchedLayer]) -> Callable[[int, np.ndarray], None]:
    def on_read(count: int, addresses: np.ndarray) -> None:
        any(layer.decoder.read(count, addresses) for layer in layers.values())

    return on_read


class _Exact:
    """Attention of one step over all tokens so far: weights `[H, G, n]` and output `[H, G, Dv]`, float64."""

    def __init__(self, tensors: LayerTrace, step: int, scaling: float) -> None:
        heads, _, dim = tensors.keys.shape
        query = tensors.queries[:, step].double().view(heads, -1, dim)
        self.weight = (query @ tensors.keys[:, : step + 1].double().mT * scaling).softmax(-1)
        self.values = tensors.values[:, : step + 1].double()
        self.output = self.weight @ self.values
        self.mass = self.weight.mean(1)
        self.entry_bytes = tensors.keys[0, 0].nbytes + tensors.values[0, 0].nbytes
        self.best = self.mass.sort(dim=1, descending=True).values.cumsum(1)

    def error(self, head: int, output: torch.Tensor) -> float:
        """|output - exact| / |exact| for `[G, Dv]`; 0 where both are 0."""
        norm = self.output[head].norm()
        distance = (output.double() - self.output[head]).norm()
        return float(distance / norm) if norm > 0 else float(distance)


def _measure(
    policy: str, number: int, step: int, decoder: _WatchedDecoder, exact: _Exact, changes: torch.Tensor
) -> list[Row]:
    """One row for each head; `changes` `[2, H]` are the splits and the entries moved since the row before."""
    plain, estimated = merge_parts(decoder.answer[:2]), merge_parts(decoder.answer)
    rows = []
    for head, attended in enumerate(decoder.attended):
        count, reads = len(attended), decoder.reads[head]
        rows.append(
            Row(
                policy,
                number,
                head,
                step,
                recall=float(exact.mass[head, attended].sum()),
                oracle_recall=float(exact.best[head, count - 1]),
                error=exact.error(head, plain[head]),
                error_estimated=exact.error(head, estimated[head]),
                tokens=count,
                bytes_read=float(reads[0]),
                reads=float(reads[1]),
                run_length=float(reads[2] / max(1.0, decoder.taking_part[head])),
                splits=int(changes[0, head]),
                bytes_moved=int(changes[1, head]) * exact.entry_bytes,
            )
        )
    return rows


def _whole(policy: str, number: int, step: int, heads: int) -> list[Row]:
    """Rows of a layer that the policy leaves dense: everything takes part, nothing is read."""
    return [Row(policy, number, head, step, 1.0, 1.0, 0.0, 0.0, step + 1, 0.0, 0.0, 0.0, 0, 0) for head in range(heads)]


def _best_possible(trace: Trace, config: DynaKVConfig, tensors: dict[int, LayerTrace], every: int) -> list[Row]:
    rows = []
    for step in tqdm(range(trace.prompt_length, trace.tokens, every), desc=ORACLE, unit=" steps"):
        count = min(step + 1, config.tokens_for(step + 1) + config.sinks + config.recent)
        for number, layer in tensors.items():
            exact = _Exact(layer, step, trace.scaling)
            best = exact.mass.topk(count, dim=1).indices
            for head, tokens in enumerate(best):
                weight = exact.weight[head][:, tokens]
                output = (weight / weight.sum(-1, keepdim=True)) @ exact.values[head, tokens]
                recall, error = float(exact.best[head, count - 1]), exact.error(head, output)
                rows.append(Row(ORACLE, number, head, step, recall, recall, error, error, count, 0.0, 0.0, 0.0, 0, 0))
    return rows


def table(outcomes: Sequence[Outcome]) -> str:
    """Means over all rows of each policy, and the worst head, as text."""
    titles = ["recall", "oracle", "share", "worst", "error", "with est.", "tokens", "KB read", "reads", "run", "splits"]
    titles += ["index %", "tables %"]
    lines = [f"{'policy':<12}" + "".join(f"{title:>10}" for title in titles)]
    for outcome in outcomes:
        rows = outcome.rows
        mean = {name: float(np.mean([getattr(row, name) for row in rows])) for name in _MEANS}
        heads: dict[tuple[int, int], list[Row]] = {}
        for row in rows:
            heads.setdefault((row.layer, row.head), []).append(row)
        worst = min(sum(row.recall for row in own) / sum(row.oracle_recall for row in own) for own in heads.values())
        runs = [row.run_length for row in rows if row.reads]
        quality = (mean["recall"], mean["oracle_recall"], mean["recall"] / mean["oracle_recall"], worst)
        error = (mean["error"], mean["error_estimated"])
        cost = (mean["tokens"], mean["bytes_read"] / 1e3, mean["reads"], float(np.mean(runs)) if runs else 0.0)
        dram = (100 * part / outcome.kv_bytes for part in (outcome.index_bytes, outcome.table_bytes))
        lines.append(
            f"{outcome.policy:<12}"
            + "".join(f"{value:10.4f}" for value in (*quality, *error))
            + "".join(f"{value:10.1f}" for value in cost)
            + f"{sum(row.splits for row in rows):10}"
            + "".join(f"{share:10.2f}" for share in dram)
        )
    return "\n".join(lines)


_MEANS = ("recall", "oracle_recall", "error", "error_estimated", "tokens", "bytes_read", "reads")


def select_layers(trace: Trace, layers: str | None) -> tuple[int, ...]:
    """The layers that a text such as `"0,6,12"` names; all of the trace for `None`.

    Raises:
        ConfigError: it is no list of numbers, or the trace lacks one of them.
    """
    if layers is None:
        return trace.layers
    try:
        chosen = tuple(sorted({int(part) for part in layers.split(",")}))
    except ValueError:
        raise ConfigError(f"--layers {layers!r}: write numbers separated by commas, such as 0,6,12.") from None
    if missing := set(chosen) - set(trace.layers):
        raise ConfigError(f"the trace has no layer {min(missing)}: it has {', '.join(map(str, trace.layers))}.")
    return chosen


def write_rows(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write all rows as one JSON list.

    Raises:
        TraceError: the file cannot be written.
    """
    rows = [asdict(row) for outcome in outcomes for row in outcome.rows]
    try:
        path.write_text(json.dumps(rows, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise TraceError(f"cannot write {path}: {error.strerror}. Choose another --json file.") from error


def configured(policy: str, config: DynaKVConfig) -> DynaKVConfig:
    """`config` with another policy, by a name that the replay knows.

    Raises:
        ConfigError: there is no such policy.
    """
    names = (*POLICIES, ORACLE)  # as they are now: a user may have entered one
    if policy not in names:
        raise ConfigError(f"--policy {policy!r}: choose one of {', '.join(names)}.")
    return replace(config, policy=policy)
