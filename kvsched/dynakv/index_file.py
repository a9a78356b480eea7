"""Tables of the index that live on flash, because those of all layers together take too much of the budget.

After the paper's space virtualisation: a layer's tables are read while the layer before it computes, so that no more
than two layers' are in DRAM, however many there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import FlashError
from .engine import Request, Transfer
from .flash import PAGE, Buffer, FlashFile
from .pools import FreePlaces

_ALIGNED = 64
"""Bytes to whose multiples tables begin in a buffer: any dtype can be viewed there, and a vector register loaded."""

_ROOM = 9 / 8
"""Of buffers and places, beyond what is needed: tables grow by a little all the time."""


Form = tuple[torch.Size, torch.dtype]
Spot = tuple[int, torch.Size, torch.dtype]


@dataclass
class _Place:
    """Where a layer's tables lie: pages of the file, in which each begins at a byte, `nbytes` in all."""

    page: int
    pages: int
    spots: list[Spot]
    nbytes: int


@dataclass
class _Turn:
    """A buffer, the layer whose tables are in it, and what moves them."""

    buffer: Buffer | None = None
    layer: int | None = None
    transfer: Transfer | None = None


class IndexFile:
    """Tables of layers, in a file of their own and two buffers.

    Args:
        flash: the file; it is closed with this.
    """

    def __init__(self, flash: FlashFile) -> None:
        self.flash = flash
        self._free, self._end = FreePlaces(), 0
        self._places: dict[int, _Place] = {}
        self._turns = _Turn(), _Turn()
        self._after: dict[int, int] = {}
        self._latest: int | None = None
        self._failed: FlashError | None = None

    @classmethod
    def in_directory(cls, directory: str | os.PathLike[str] | None, threads: int) -> IndexFile:
        """With a nameless file in `directory`.

        Raises:
            FlashError: it cannot be made.
        """
        return cls(FlashFile(directory, threads))

    @property
    def nbytes(self) -> int:
        """DRAM of the buffers."""
        return sum(len(turn.buffer.memory) for turn in self._turns if turn.buffer is not None)

    def take(self, layer: int) -> list[torch.Tensor] | None:
        """The tables that `put` was given, in a buffer, good until `put`; `None` if there are none.

        Those of the layer that followed this one last time are being read afterwards.

        Raises:
            FlashError: reading or writing failed, now or before, so that they are lost.
        """
        if self._latest is not None:
            self._after[self._latest] = layer
        self._latest = layer
        if layer not in self._places:
            return None
        with self._failing():
            turn = self._turn(layer)
            if turn.layer != layer:
                self._read(layer, turn)
            self._finish(turn)
            following = self._after.get(layer)
            other = self._turns[turn is self._turns[0]]
            if following in self._places and following not in (turn.layer, other.layer):
                self._read(following, other)
        return self._tables(turn, self._places[layer])

    def put(self, layer: int, tables: Sequence[torch.Tensor], changed: bool) -> None:
        """Keep a layer's tables; what is `changed` since `take`, or new, is being written afterwards.

        Raises:
            FlashError: the file could not be written or grown.
        """
        if layer in self._places and not changed:
            return
        with self._failing():
            turn = self._turn(layer)
            self._finish(turn)
            place = self._place(layer, [(table.shape, table.dtype) for table in tables])
            into = self._tables(turn, place)
            # What grew lies elsewhere now and moves the others, so all are copied out of each other's way first.
            moved = [one.data_ptr() != table.data_ptr() for one, table in zip(into, tables, strict=True)]
            copies = [table.clone() if away else table for table, away in zip(tables, moved, strict=True)]
            for one, table, away in zip(into, copies, moved, strict=True):
                if away:
                    one.copy_(table)
            turn.layer, turn.transfer = layer, self.flash.write(_request(turn, place))

    def forget(self, layer: int) -> None:
        """A layer has no tables any more."""
        if (place := self._places.pop(layer, None)) is not None:
            self._free.give_back(place.page, place.pages)
        for turn in self._turns:
            if turn.layer == layer:
                turn.layer = None

    def close(self) -> None:
        """Give the file's space and threads back."""
        self.flash.close()

    def _turn(self, layer: int) -> _Turn:
        """The turn that holds a layer, or else one that does not hold the layer that follows it."""
        for turn in self._turns:
            if turn.layer == layer:
                return turn
        following = self._after.get(layer)
        return next(turn for turn in self._turns if turn.layer is None or turn.layer != following)

    def _read(self, layer: int, turn: _Turn) -> None:
        self._finish(turn)
        place = self._places[layer]
        turn.layer, turn.buffer = layer, self._large_enough(turn.buffer, place)
        turn.transfer = self.flash.read(_request(turn, place))

    def _tables(self, turn: _Turn, place: _Place) -> list[torch.Tensor]:
        """Views of the tables in a turn's buffer."""
        turn.buffer = self._large_enough(turn.buffer, place)
        return [_view(turn.buffer, *spot) for spot in place.spots]

    @staticmethod
    def _large_enough(buffer: Buffer | None, place: _Place) -> Buffer:
        return buffer if buffer is not None and len(buffer.memory) >= place.nbytes else Buffer(place.pages * PAGE)

    def _finish(self, turn: _Turn) -> None:
        transfer, turn.transfer = turn.transfer, None
        if transfer is not None:
            self.flash.wait(transfer)

    def _place(self, layer: int, forms: Sequence[Form]) -> _Place:
        """The place of a layer for tables of such forms: another one if they have outgrown that it had."""
        place = self._places.get(layer)
        spots, nbytes = _spots(forms)
        if place is None or nbytes > place.pages * PAGE:
            if place is not None:
                self._free.give_back(place.page, place.pages)
            pages = max(1, -(-int(nbytes * _ROOM) // PAGE))
            start = self._free.take(pages)
            if start is None:
                start, self._end = self._end, self._end + pages
                self.flash.reserve(self._end * PAGE)
            place = _Place(start, pages, [], 0)
        place.spots, place.nbytes = spots, nbytes
        self._places[layer] = place
        return place

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What fails in between loses tables, so nothing may be taken from here afterwards."""
        if self._failed is not None:
            raise FlashError(f"the index was lost when a transfer failed. Make a new DynaKVCache. ({self._failed})")
        try:
            yield
        except FlashError as error:
            self._failed = error
            raise


def _spots(forms: Sequence[Form]) -> tuple[list[Spot], int]:
    """The byte at which each table begins in a buffer, with its form; and where the last one ends."""
    spots, end = [], 0
    for shape, dtype in forms:
        start = -(-end // _ALIGNED) * _ALIGNED
        spots.append((start, shape, dtype))
        end = start + shape.numel() * dtype.itemsize
    return spots, end


def _view(buffer: Buffer, start: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    if shape.numel() == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer.memory, dtype=dtype, count=shape.numel(), offset=start).view(shape)


def _request(turn: _Turn, place: _Place) -> list[Request]:
    """All pages of a place that hold anything."""
    assert turn.buffer is not None
    return [(place.page * PAGE, turn.buffer.memory[: max(1, -(-place.nbytes // PAGE)) * PAGE])]
