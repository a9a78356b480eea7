"""Target S6: what each codec keeps, saves and costs on the real model.

The cache of a text's first tokens is written and read back by the codec; the model then reads the tokens that follow
on top of it. How far its logits move is told by the Kullback-Leibler divergence and by how often the most likely token
stays the same. Speeds are of one core, in bytes of the cache in half precision.
"""

from __future__ import annotations

import inspect
import statistics
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any, get_args

import torch
import typer
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

import kvsched
from kvsched.errors import ConfigError
from kvsched.sparkv.address import fingerprint
from kvsched.sparkv.calibration import Calibration
from kvsched.sparkv.codec import Base, ChunkHeader, CodecName, Coder, LayerEntry
from kvsched.sparkv.rope import Rotation

from .machine import keep

CONTEXT, FOLLOWING, CHUNK = 1024, 256, 256
REPEATS = 3

Layers = list[tuple[torch.Tensor, torch.Tensor]]


def texts() -> dict[str, str]:
    """Prose, tables and code that come with every Python; neither `kvsched calibrate` nor any choice has read them."""
    chapters = {name: topics[name] for name in ("import", "operator-summary", "debugger")}
    return {**chapters, **{module.__name__: inspect.getsource(module) for module in (statistics, tarfile)}}


@torch.no_grad()
def reading(model: PreTrainedModel, ids: torch.Tensor, layers: Layers | None = None) -> tuple[torch.Tensor, Layers]:
    """Log-probabilities `[n, vocabulary]` after each token of `ids` `[1, n]` on top of `layers`, and the new cache."""
    cache = DynamicCache(config=model.config)
    for index, (keys, values) in enumerate(layers or []):
        cache.update(keys[None], values[None], index)
    logits = model(ids, past_key_values=cache).logits[0]
    return logits.log_softmax(-1), [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def through(coder: Coder, layers: Layers, refined: bool = False) -> tuple[Layers, dict[str, Any]]:
    """`layers`, `[heads, tokens, head_dim]` each, written and read back in chunks, and what that costs.

    Args:
        refined: of `progressive`, with the residuals; else the bases alone.
    """
    threads, encode_seconds, decode_seconds, size = torch.get_num_threads(), [], [], 0
    back: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in layers]
    torch.set_num_threads(1)
    try:
        for start in range(0, CONTEXT, CHUNK):
            chunk = [(keys[:, start : start + CHUNK], values[:, start : start + CHUNK]) for keys, values in layers]
            begin = time.perf_counter()
            objects = [coder.encode(start, chunk)]
            if refined and (refinement := coder.encode_refinement(start, chunk)) is not None:
                objects.append(refinement)
            encode_seconds.append(time.perf_counter() - begin)
            size += sum(len(data) for _, data in objects)
            (header, _), (finer, _) = objects[0], objects[-1]
            entries = [list(payloads(*one)) for one in objects]
            for repeat in range(REPEATS):
                begin = time.perf_counter()
                for (entry, payload), (more, residual) in zip(entries[0], entries[-1], strict=True):
                    if refined:
                        decoded = coder.refine(finer, more, residual, Base(header, entry, payload))
                    else:
                        decoded = coder.decode(header, entry, payload)
                    if repeat == 0:
                        back[entry.layer].append(decoded)
                decode_seconds.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    half = 2 * sum(keys.numel() + values.numel() for keys, values in layers)
    whole = [tuple(torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True)) for chunks in back]
    speed = half / (CONTEXT // CHUNK) / 1e6
    return whole, {  # type: ignore[return-value]
        "ratio": half / size,
        "encode_mb_s": speed / statistics.median(encode_seconds),
        "decode_mb_s": speed / statistics.median(decode_seconds),
    }


def payloads(header: ChunkHeader, data: bytes) -> Iterator[tuple[LayerEntry, bytes]]:
    """Every layer's entry and bytes in a chunk object."""
    offset = len(header.to_bytes())
    for entry in header.layers:
        yield entry, data[offset : offset + entry.length]
        offset += entry.length


def compare(expected: torch.Tensor, actual: torch.Tensor) -> dict[str, float]:
    """Mean divergence in nats and the share of equal most likely tokens of two `[n, vocabulary]`."""
    return {
        "kl": float((expected.exp() * (expected - actual)).sum(-1).mean()),
        "top1": float((expected.argmax(-1) == actual.argmax(-1)).float().mean()),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean, median, least and greatest of each number over the texts."""
    return {
        name: {
            "mean": statistics.mean(values),
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
        for name in ("ratio", "kl", "top1", "encode_mb_s", "decode_mb_s")
        for values in [[run[name] for run in runs]]
    }


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything measured here.")] = None,
) -> None:
    """Measure every codec, with the calibration that `kvsched calibrate` has kept and without one."""
    transformers_logging.set_verbosity_error()
    begin = time.perf_counter()
    model, tokenizer = kvsched.load_model()
    calibration = Calibration.find(fingerprint(model))
    if calibration is None:
        raise ConfigError("this model has no calibration on this machine: run `kvsched calibrate`.")
    rotation, names = Rotation.of(model, model.config.num_hidden_layers), get_args(CodecName)
    coders = {name: Coder(name, model.dtype, rotation, calibration) for name in names}
    for name in ("balanced", "small"):
        coders[f"{name}, not calibrated"] = Coder(name, model.dtype, rotation)
    coders["progressive, refined"] = coders["progressive"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in coders}
    for text, content in tqdm(texts().items(), desc="codec", unit="text"):
        ids = tokenizer(content, return_tensors="pt").input_ids[:, : CONTEXT + FOLLOWING]
        _, layers = reading(model, ids[:, :CONTEXT])
        expected, _ = reading(model, ids[:, CONTEXT:], layers)
        for name, coder in coders.items():
            back, costs = through(coder, layers, refined=name == "progressive, refined")
            runs[name].append({"text": text, **costs, **compare(expected, reading(model, ids[:, CONTEXT:], back)[0])})
    codecs = {name: summary(values) for name, values in runs.items()}
    typer.echo("| codec | ratio to half precision | KL | top-1 | encode MB/s | decode MB/s |\n" + "| --- " * 6 + "|")
    for name, row in codecs.items():
        numbers = row["ratio"], row["kl"], row["top1"], row["encode_mb_s"], row["decode_mb_s"]
        cells = (
            f"{number['mean']:{form}}"
            for number, form in zip(numbers, (".2f", ".5f", ".3f", ".0f", ".0f"), strict=True)
        )
        typer.echo(f"| {name} | {' | '.join(cells)} |")
    if json_path is not None:
        result = {
            "seconds": time.perf_counter() - begin,
            "context_tokens": CONTEXT,
            "following_tokens": FOLLOWING,
            "chunk_tokens": CHUNK,
            "calibration": {"id": calibration.id, "source": calibration.source, "tokens": calibration.tokens},
            "codecs": codecs,
            "runs": runs,
        }
        keep(json_path, "codec_bench", result)
        typer.echo(f"\nwritten to {json_path}")


if __name__ == "__main__":
    typer.run(main)
