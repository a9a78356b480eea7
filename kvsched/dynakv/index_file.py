"""Vectors of the index that live on flash, because those of all layers together take too much of the budget.

After the paper's space virtualisation: a layer's vectors are read while the layer before it computes, so that no more
than two layers' are in DRAM, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import FlashError
from .clusters import ClusterIndex
from .engine import Request, Transfer
from .flash import PAGE, Buffer, FlashCounters, FlashFile
from .pools import FreePlaces
from .prefetch import Order

_ALIGNED = 64
"""Bytes to whose multiples tables begin in a buffer: any dtype can be viewed there, and a vector register loaded."""

_ROOM = 9 / 8
"""Of buffers and places, beyond what is needed: tables grow by a little all the time."""


Form = tuple[torch.Size, torch.dtype]
Spot = tuple[int, torch.Size, torch.dtype]


@dataclass
class _Place:
    """Where a layer's vectors lie: pages of the file, in which each table begins at a byte, `nbytes` in all."""

    page: int
    pages: int
    spots: list[Spot]
    nbytes: int


@dataclass
class _Turn:
    """A buffer, the layer whose vectors are in it, and what moves them."""

    buffer: Buffer | None = None
    layer: int | None = None
    transfer: Transfer | None = None


class IndexFile:
    """Vectors of the layers' indexes, in a file of their own and two buffers once they take too much of DRAM.

    Args:
        flash: makes the file, when it is needed.
        most: bytes that the indexes of all layers may take in DRAM.
    """

    def __init__(self, flash: Callable[[], FlashFile], most: float) -> None:
        self._open, self._most = flash, most
        self._flash: FlashFile | None = None
        self._in_dram: dict[int, int] = {}
        self._free, self._end = FreePlaces(), 0
        self._places: dict[int, _Place] = {}
        self._turns = _Turn(), _Turn()
        self._order = Order()
        self._failed: FlashError | None = None

    @property
    def used(self) -> bool:
        """Whether the indexes have moved here."""
        return self._flash is not None

    @property
    def counters(self) -> FlashCounters:
        """Of the file."""
        return FlashCounters() if self._flash is None else self._flash.counters

    @property
    def nbytes(self) -> int:
        """DRAM of the buffers."""
        return sum(len(turn.buffer.memory) for turn in self._turns if turn.buffer is not None)

    def take(self, layer: int, index: ClusterIndex) -> None:
        """Give an index the vectors back that `put` took, if it did; they are good until the next `put`.

        Those of the layer that followed this one last time are being read afterwards.

        Raises:
            FlashError: reading or writing failed, now or before, so that they are lost.
        """
        following = self._order.follow(layer)
        if layer not in self._places and self._failed is None:
            return
        with self._failing() as flash:
            turn = self._turn(layer, following)
            if turn.layer != layer:
                self._read(layer, turn, flash)
            self._finish(turn, flash)
            other = self._turns[turn is self._turns[0]]
            if following in self._places and following not in (turn.layer, other.layer):
                self._read(following, other, flash)
        index.take_back(self._vectors(turn, self._places[layer]))

    def put(self, layer: int, index: ClusterIndex) -> None:
        """Take the vectors of an index, if all take too much of DRAM; what changed since `take` is being written.

        Raises:
            FlashError: the file could not be made, written or grown.
        """
        self._in_dram[layer] = index.nbytes
        if self._flash is None:
            if sum(self._in_dram.values()) <= self._most:
                return
            self._flash = self._open()
        with self._failing() as flash:
            vectors, changed = index.hand_out()
            if layer in self._places and not changed:
                return
            turn = self._turn(layer)
            self._finish(turn, flash)
            place = self._place(layer, [(table.shape, table.dtype) for table in vectors], flash)
            into = self._vectors(turn, place)
            # What grew lies elsewhere now and moves the others, so all are copied out of each other's way first.
            moved = [one.data_ptr() != table.data_ptr() for one, table in zip(into, vectors, strict=True)]
            copies = [table.clone() if away else table for table, away in zip(vectors, moved, strict=True)]
            for one, table, away in zip(into, copies, moved, strict=True):
                if away:
                    one.copy_(table)
            turn.layer, turn.transfer = layer, flash.write(_request(turn, place))

    def forget(self, layer: int) -> None:
        """A layer has no index any more.

        Raises:
            FlashError: a transfer of it failed.
        """
        self._in_dram.pop(layer, None)
        for turn in self._turns:
            if turn.layer == layer:
                turn.layer = None
                if self._failed is None:
                    with self._failing() as flash:
                        self._finish(turn, flash)  # before others write to its place
        if (place := self._places.pop(layer, None)) is not None:
            self._free.give_back(place.page, place.pages)

    def close(self) -> None:
        """Give the file's space and threads back."""
        if self._flash is not None:
            self._flash.close()

    def _turn(self, layer: int, following: int | None = None) -> _Turn:
        """The turn that holds a layer, or else one that does not hold the `following`."""
        one, other = self._turns
        if layer in (one.layer, other.layer):
            return one if one.layer == layer else other
        return other if one.layer == following else one

    def _read(self, layer: int, turn: _Turn, flash: FlashFile) -> None:
        self._finish(turn, flash)
        place = self._places[layer]
        turn.layer, turn.buffer = layer, self._large_enough(turn.buffer, place)
        turn.transfer = flash.read(_request(turn, place))

    def _vectors(self, turn: _Turn, place: _Place) -> list[torch.Tensor]:
        """Views of the vectors in a turn's buffer."""
        turn.buffer = self._large_enough(turn.buffer, place)
        return [_view(turn.buffer, *spot) for spot in place.spots]

    @staticmethod
    def _large_enough(buffer: Buffer | None, place: _Place) -> Buffer:
        return buffer if buffer is not None and len(buffer.memory) >= place.nbytes else Buffer(place.pages * PAGE)

    @staticmethod
    def _finish(turn: _Turn, flash: FlashFile) -> None:
        transfer, turn.transfer = turn.transfer, None
        if transfer is not None:
            flash.wait(transfer)

    def _place(self, layer: int, forms: Sequence[Form], flash: FlashFile) -> _Place:
        """The place of a layer for tables of such forms: another one if these have outgrown it."""
        place = self._places.get(layer)
        spots, nbytes = _spots(forms)
        if place is None or nbytes > place.pages * PAGE:
            if place is not None:
                self._free.give_back(place.page, place.pages)
            pages = max(1, -(-int(nbytes * _ROOM) // PAGE))
            start = self._free.take(pages)
            if start is None:
                start, self._end = self._end, self._end + pages
                flash.reserve(self._end * PAGE)
            place = _Place(start, pages, [], 0)
        place.spots, place.nbytes = spots, nbytes
        self._places[layer] = place
        return place

    @contextmanager
    def _failing(self) -> Iterator[FlashFile]:
        """What fails in between loses vectors, so nothing may be taken from here afterwards."""
        assert self._flash is not None
        if self._failed is not None:
            raise FlashError(f"the index was lost when a transfer failed. Make a new DynaKVCache. ({self._failed})")
        try:
            yield self._flash
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
