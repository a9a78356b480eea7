"""Two cost models against prefills that neither has seen: the measured profile and the paper's learned predictor.

Utilisation, the learned predictor's third input, is what other work on the machine happens to make of it. Both models
are also looked at as the loader uses them, corrected by how long the last two chunks took.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm.auto import trange

import kvsched
from kvsched.sparkv.cost import DeviceProfile
from kvsched.sparkv.grid import Grid
from kvsched.sparkv.predictor import LearnedProfile, active_blocks, time_prefill

from .machine import keep

CHUNK_TOKENS = 256


def corrected(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Predictions `[chunks]` times actual over predicted of the two chunks before, as `cost.ComputeRate` does."""
    result = predicted.copy()
    for chunk in range(1, len(result)):
        last = slice(max(0, chunk - 2), chunk)
        result[chunk] *= actual[last].sum() / predicted[last].sum()
    return result


def errors(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Relative errors of prefills `[runs, chunks]`: of a chunk, and of a whole prefill."""
    chunk, whole = np.abs(predicted / actual - 1), np.abs(predicted.sum(axis=1) / actual.sum(axis=1) - 1)
    return {
        "chunk_median": float(np.median(chunk)),
        "chunk_p95": float(np.percentile(chunk, 95)),
        "prefill_mean": float(whole.mean()),
    }


def main(
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write everything measured to this file.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of a prefill.", min=2 * CHUNK_TOKENS)] = 4096,
    train: Annotated[int, typer.Option(help="Prefills to train on.", min=1)] = 3,
    test: Annotated[int, typer.Option(help="Prefills to compare with.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Of token ids and of the network.")] = 0,
) -> None:
    """Compare the cost models on the real model."""
    model, _ = kvsched.load_model()
    grid = Grid(tokens // CHUNK_TOKENS, CHUNK_TOKENS, model.config.num_hidden_layers)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (1, grid.tokens), generator=generator)
    begin = time.perf_counter()
    physical = DeviceProfile.measure(model, CHUNK_TOKENS)
    physical_seconds = time.perf_counter() - begin

    runs = [time_prefill(model, ids, grid) for _ in trange(train + test, desc="prefills")]
    seconds, utilisation = (np.array(part) for part in zip(*runs, strict=True))

    begin = time.perf_counter()
    blocks = active_blocks(model.config, grid)
    learned = LearnedProfile.train(blocks, seconds[:train], utilisation[:train], seed)
    training_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    learned.compute_seconds(grid)
    predicting_seconds = time.perf_counter() - begin

    actual = seconds[train:, :, -1]
    predicted = {
        "profile": np.repeat(physical.compute_seconds(grid)[None, :, -1], test, axis=0),
        "learned": np.array([learned.compute_seconds(grid, busy)[:, -1] for busy in utilisation[train:]]),
    }
    for name in list(predicted):
        predicted[f"{name}, corrected"] = np.array(
            [corrected(*pair) for pair in zip(predicted[name], actual, strict=True)]
        )
    rows = {name: errors(guess, actual) for name, guess in predicted.items()}
    for name, error in rows.items():
        typer.echo(
            f"{name:20} chunk {error['chunk_median']:.1%} median, {error['chunk_p95']:.1%} p95; "
            f"prefill {error['prefill_mean']:.1%}"
        )
    typer.echo(f"profile measured in {physical_seconds:.1f} s, network trained in {training_seconds:.1f} s")
    if json_path is not None:
        result = {
            "chunk_tokens": CHUNK_TOKENS,
            "tokens": grid.tokens,
            "train": train,
            "seed": seed,
            "profile_seconds": physical_seconds,
            "training_seconds": training_seconds,
            "training_samples": train * grid.chunks * (grid.layers - 1),
            "predicting_seconds": predicting_seconds,
            "errors": rows,
            "chunk_seconds": {name: guess.tolist() for name, guess in {"actual": actual, **predicted}.items()},
            "utilisation": utilisation[train:].tolist(),
        }
        keep(json_path, "predictor_bench", result)
        typer.echo(f"written to {json_path}")


if __name__ == "__main__":
    typer.run(main)
