from __future__ import annotations

from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch

import kvsched
from kvsched.errors import ConfigError
from kvsched.sparkv.grid import Grid
from kvsched.sparkv.predictor import LearnedProfile, active_blocks

GRID = Grid(chunks=10, chunk_tokens=16, layers=4)


def test_full_attention_reaches_every_block_up_to_the_chunk(tiny_model) -> None:
    blocks = active_blocks(tiny_model("qwen2").config, Grid(3, 16, 3))
    assert blocks.tolist() == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]


def test_a_sliding_layer_reaches_its_window(tiny_model) -> None:
    blocks = active_blocks(tiny_model("gemma3").config, Grid(4, 8, 4))  # a window of 16 tokens, every second layer
    assert blocks.tolist() == [[1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3], [3, 4, 3, 4]]


def synthetic(blocks: np.ndarray, utilisation: np.ndarray) -> np.ndarray:
    """`[runs, chunks, layers + 1]`: a step costs by its blocks and by what other work leaves."""
    steps = (1 + 0.1 * blocks) * (1 + utilisation[..., None])
    first = np.full((*steps.shape[:2], 1), 0.3)
    zero = np.zeros_like(first)
    return np.concatenate([zero, (zero + first), first + steps[..., :-1].cumsum(axis=2)], axis=2)


@pytest.fixture(scope="module")
def learned() -> LearnedProfile:
    rng = np.random.default_rng(0)
    blocks = np.minimum(np.arange(1, 11)[:, None], [10, 4, 10, 4])
    utilisation = rng.random((8, 10))
    seconds = synthetic(blocks, utilisation) * rng.normal(1, 0.01, (8, 10, 1))
    return LearnedProfile.train(blocks, seconds, utilisation)


def test_it_learns_blocks_and_utilisation(learned: LearnedProfile) -> None:
    utilisation = np.linspace(0.1, 0.9, 10)
    expected = synthetic(learned.blocks, utilisation[None])[0]
    np.testing.assert_allclose(learned.compute_seconds(GRID, utilisation), expected, rtol=0.05)


def test_its_table_is_one_that_planners_take(learned: LearnedProfile) -> None:
    table = learned.compute_seconds(GRID)
    assert table.shape == (10, 5) and (table[:, 0] == 0).all() and (np.diff(table, axis=1) >= 0).all()
    np.testing.assert_allclose(learned.compute_seconds(Grid(4, 16, 4)), table[:4])


def test_the_same_seed_gives_the_same_network(learned: LearnedProfile) -> None:
    utilisation = np.full((2, 10), 0.5)
    seconds = synthetic(learned.blocks, utilisation)
    first, second = (LearnedProfile.train(learned.blocks, seconds, utilisation, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.compute_seconds(GRID), second.compute_seconds(GRID))


def test_a_trained_one_is_kept_and_plans_a_load(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache"))
    model, ids = tiny_model("qwen2"), torch.randint(1, 256, (1, 70), generator=torch.Generator().manual_seed(0))
    options = {"store": tmp_path / "store", "codec": "lossless", "chunk_tokens": 16, "cost_model": "learned"}
    kvsched.publish(model, ids, config=options)
    cache = kvsched.SparKVCache(model.config, options)
    with pytest.raises(ConfigError, match="kvsched profile --chunk-tokens 16 --learned 64"):
        cache.load(model, ids)

    grid = Grid(4, 16, model.config.num_hidden_layers)
    trained = LearnedProfile.renew(model, grid)
    np.testing.assert_array_equal(LearnedProfile.of(model, grid).compute_seconds(grid), trained.compute_seconds(grid))
    assert cache.load(model, ids).loaded_tokens == 64
    with pytest.raises(ConfigError, match="4 chunks at most"):
        LearnedProfile.of(model, Grid(5, 16, grid.layers))
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-8])
    with pytest.raises(ConfigError, match="no learned cost model"):
        LearnedProfile.of(model, grid)
