"""Symbols as bytes: zstd for speed, asymmetric numeral systems (`constriction`) for size."""

from __future__ import annotations

import functools
from typing import Protocol

import constriction
import numpy as np
import zstandard

from ..errors import ChunkError

_TABLES = 28
_MOST_SYMBOLS = 1 << 16  # for each byte: a row has a byte of its own and at most as many tokens


class EntropyCoder(Protocol):
    """Bytes for symbols `[rows, n]` u8 and back; most lie near 128, how near differs from row to row."""

    def encode(self, symbols: np.ndarray) -> bytes:
        """Bytes of `symbols`."""
        ...

    def decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray:
        """Symbols of `shape`.

        Raises:
            ChunkError: `data` holds something else.
        """
        ...


class Zstd:
    """Huffman codes fitted to all rows at once."""

    def encode(self, symbols: np.ndarray) -> bytes:
        return compress(symbols)

    def decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray:
        return np.frombuffer(decompress(data, shape[0] * shape[1]), np.uint8).reshape(shape)


class Ans:
    """Each row by the one of 28 fixed tables that makes it shortest: bell curves, each wider than the one before.

    table of each row, u8 | words, u32
    """

    def encode(self, symbols: np.ndarray) -> bytes:
        rows = len(symbols)
        counts = np.bincount((symbols + np.arange(rows)[:, None] * 256).ravel(), minlength=rows * 256)
        choice = (counts.reshape(rows, 256) @ -np.log2(_weights() / _weights().sum(0))).argmin(1).astype(np.uint8)
        coder = constriction.stream.stack.AnsCoder()
        for table in reversed(np.unique(choice)):  # a stack: what goes in last comes out first
            coder.encode_reverse(symbols[choice == table].ravel().astype(np.int32), _model(int(table)))
        return choice.tobytes() + coder.get_compressed().astype("<u4").tobytes()

    def decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray:
        rows, count = shape
        choice = np.frombuffer(data[:rows], np.uint8)
        if len(choice) < rows or count > _MOST_SYMBOLS or (len(data) - rows) % 4 or int(choice.max()) >= _TABLES:
            raise ChunkError("a part of a payload is not what its shape asks for")
        try:
            coder = constriction.stream.stack.AnsCoder(np.frombuffer(data[rows:], "<u4").astype(np.uint32))
        except ValueError as error:
            raise ChunkError(f"a part of a payload cannot be decoded: {error}") from error
        symbols = np.empty(shape, np.uint8)
        for table in np.unique(choice):
            chosen = choice == table
            symbols[chosen] = coder.decode(_model(int(table)), int(chosen.sum()) * count).reshape(-1, count)
        if not coder.is_empty():
            raise ChunkError("a part of a payload holds more than its shape asks for")
        return symbols


@functools.cache
def _weights() -> np.ndarray:
    """How often each symbol is to be expected, `[256, tables]`, whole numbers in proportion.

    Student's t with 15 degrees of freedom, a normal distribution with heavier tails: all it takes is arithmetic that
    comes out the same on every machine, which exponentials need not.
    """
    distance = (np.arange(256) - 128.0)[:, None]
    width = np.array([2.0 ** (n // 3) * (1.0, 1.5874, 2.5198)[n % 3] for n in range(-12, 2 * _TABLES - 12, 2)])
    bell = np.ones((256, _TABLES))
    for _ in range(8):
        bell /= 1 + distance**2 / (15 * width)
    return np.floor(bell * 2**22) + 1


@functools.cache
def _model(table: int) -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical(_weights()[:, table].copy(), perfect=False)


def compress(data: np.ndarray) -> bytes:
    """A zstd frame that holds the bytes of `data` and says how many they are."""
    return zstandard.compress(np.ascontiguousarray(data).data, 1)


def decompress(frame: bytes, most: int, least: int | None = None) -> bytes:
    """The `least` to `most` bytes in a zstd frame; exactly `most` if `least` is left out.

    Raises:
        ChunkError: the frame is damaged, or says that it holds more or fewer; nothing is allocated then.
    """
    try:
        size = zstandard.frame_content_size(frame)
        if not (most if least is None else least) <= size <= most:
            raise ChunkError(f"a part of a payload should hold {most} bytes, not {size}")
        return zstandard.ZstdDecompressor().decompress(frame)
    except zstandard.ZstdError as error:
        raise ChunkError(f"a part of a payload cannot be decompressed: {error}") from error
