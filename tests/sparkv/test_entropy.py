"""Entropy coders: exact, close to the entropy, the same everywhere, and ChunkError for everything else."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsched.errors import ChunkError
from kvsched.sparkv.entropy import Ans, EntropyCoder, Zstd, _weights

CODERS = st.sampled_from([Ans(), Zstd()])


def bells(rows: int, count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    width = np.exp(random.uniform(-2, 3, (rows, 1)))
    return (np.clip(random.normal(size=(rows, count)) * width, -127, 127).round() + 128).astype(np.uint8)


@given(CODERS, st.integers(1, 9), st.integers(1, 60), st.data())
def test_any_symbols_come_back(coder: EntropyCoder, rows: int, count: int, data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=rows * count, max_size=rows * count))
    symbols = np.frombuffer(raw, np.uint8).reshape(rows, count)
    assert np.array_equal(coder.decode(coder.encode(symbols), (rows, count)), symbols)


def test_ans_comes_within_a_twentieth_of_the_entropy_of_each_row() -> None:
    symbols = bells(200, 2000)
    counts = np.stack([np.bincount(row, minlength=256) for row in symbols])
    shares = counts / 2000
    entropy = -(counts * np.log2(np.where(counts, shares, 1))).sum() / 8
    assert entropy < len(Ans().encode(symbols)) < 1.05 * entropy < len(Zstd().encode(symbols))


def test_the_tables_are_the_same_on_every_machine() -> None:
    """A decoder whose tables differ in one bit would read noise, so they are part of the format."""
    tables = _weights().astype("<i8").tobytes()
    assert hashlib.sha256(tables).hexdigest() == "b7d1852a6af0109864df1979ffbc00a7a896dbc83749a94ff9122513016220c0"


@given(CODERS, st.data())
def test_damaged_bytes_are_refused_or_give_the_right_shape(coder: EntropyCoder, data: st.DataObject) -> None:
    encoded = bytearray(coder.encode(bells(4, 50)))
    for _ in range(data.draw(st.integers(0, 6))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        symbols = coder.decode(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]), (4, 50))
    except ChunkError:
        return
    assert symbols.shape == (4, 50)


@pytest.mark.parametrize("shape", [(4, 1 << 40), (1 << 40, 50), (1 << 30, 1 << 30)])
@pytest.mark.parametrize("coder", [Ans(), Zstd()], ids=["ans", "zstd"])
def test_a_shape_of_terabytes_is_refused_before_anything_is_allocated(
    coder: EntropyCoder, shape: tuple[int, int]
) -> None:
    with pytest.raises(ChunkError):
        coder.decode(coder.encode(bells(4, 50)), shape)
