"""How an entry, the key and value of a token side by side, lies in the storage: as it is, or in 8 bits a number.

Every packed entry can be read alone, so that it is appended, split off, moved and loaded without touching another: key
and value each bring a factor of their own. For values that suffices. Keys do not fit 8 bits as they come: where the key
projection has a bias (Qwen2) some channels lie at 100 to 200 among others below 10, and the rotary embedding spreads
these over all angles. Before the rotation they are constants. So a key is turned back by its position, which lies
beside it anyway, and the mean of its stream's first keys is taken off; what is left is small and alike in all channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .policies import masked_mean
from .rotary import turn

CODES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""Numbers of 8 bits by the name of the option, and the largest of each kind."""

_FACTOR = torch.bfloat16


@dataclass(frozen=True)
class EntryForm:
    """An entry: key (after RoPE) and value of a token side by side.

    Args:
        key_width, value_width: numbers of each.
        dtype, device: the model's, in which entries are handed out.
    """

    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def width(self) -> int:
        """Numbers in an entry."""
        return self.key_width + self.value_width

    def apart(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of entries `[..., width]`."""
        return entries[..., : self.key_width], entries[..., self.key_width :]


class Packing:
    """Entries as they are, in any floating dtype; in the model's own nothing is lost.

    Attributes:
        width, dtype: numbers of an entry in the storage, and what they are.
    """

    def __init__(self, form: EntryForm, dtype: torch.dtype) -> None:
        self.form, self.width, self.dtype = form, form.width, dtype

    def begin(self, entries: torch.Tensor, position: torch.Tensor, mask: torch.Tensor) -> None:
        """Look at the first entries of streams, `[S, n, form.width]`, before any of them is packed.

        Args:
            position: int64 `[S, n]`; mask: bool `[S, n]`, which of them are entries.
        """

    def pack(self, entries: torch.Tensor, position: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """What the storage holds of entries `[..., form.width]`: `[..., width]`.

        Args:
            position: int64 `[...]`; stream: int64, of a shape that expands to it.
        """
        return entries.to(self.dtype)

    def unpack(self, packed: torch.Tensor, position: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`, in the model's dtype on its device; anything finite where there is no entry."""
        return packed.to(self.form.device, self.form.dtype)

    def select(self, streams: torch.Tensor) -> None:
        """Keep `streams` (int64, repeats allowed) in this order."""

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that entries cannot be read without, by name."""
        return {}

    def restore(self, take: Callable[..., torch.Tensor]) -> None:
        """Become what `state` gave; `take(name, dtype, *shape)` hands the tensors out."""


class CodedPacking(Packing):
    """8 bits a number, and a factor of 16 bits for the key and one for the value of each entry.

    With `int8` a number is off by at most 1/254 of the largest in its part (key or value), with `fp8` (e4m3) by at most
    1/16 of itself; both and the factor's own rounding, 2^-8, on the turned and centred key.

    Args:
        option: a name of `CODES`.
        streams: S, each of which has a centre of its keys.
        rates: of the rotary embedding, as `rotary.rates_of` gives them.
    """

    def __init__(self, form: EntryForm, option: str, streams: int, rates: Sequence[float]) -> None:
        super().__init__(form, torch.uint8)
        self.width = form.width + 2 * _FACTOR.itemsize
        self._code, self._largest = CODES[option]
        self._rates = torch.tensor(rates, dtype=torch.float32, device=form.device)
        self._centre = torch.zeros(streams, form.key_width, device=form.device)
        self._centred = torch.zeros(streams, dtype=torch.bool, device=form.device)

    def begin(self, entries: torch.Tensor, position: torch.Tensor, mask: torch.Tensor) -> None:
        """Centre each stream on the mean of its first keys, once: what is packed is read by it ever after."""
        fresh = mask.any(1) & ~self._centred
        if fresh.any():
            keys = turn(self.form.apart(entries[fresh])[0], position[fresh], self._rates, -1.0)
            self._centre[fresh] = masked_mean(keys, mask[fresh])
            self._centred |= fresh

    def pack(self, entries: torch.Tensor, position: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """See `Packing`: uint8, codes and factor of the key, then of the value."""
        key, value = self.form.apart(entries)
        key = turn(key, position, self._rates, -1.0) - self._centre[stream]
        return torch.cat([*self._encode(key), *self._encode(value.float())], dim=-1)

    def unpack(self, packed: torch.Tensor, position: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """See `Packing`."""
        factor = _FACTOR.itemsize
        key, key_factor, value, value_factor = packed.to(self.form.device).split(
            (self.form.key_width, factor, self.form.value_width, factor), dim=-1
        )
        keys = turn(self._decode(key, key_factor) + self._centre[stream], position, self._rates, 1.0)
        return torch.cat([keys, self._decode(value, value_factor)], dim=-1).to(self.form.dtype)

    def select(self, streams: torch.Tensor) -> None:
        """See `Packing`."""
        self._centre, self._centred = self._centre[streams], self._centred[streams]

    def state(self) -> dict[str, torch.Tensor]:
        """See `Packing`."""
        return {"centre": self._centre, "centred": self._centred}

    def restore(self, take: Callable[..., torch.Tensor]) -> None:
        """See `Packing`."""
        self._centre = take("centre", torch.float32, *self._centre.shape)
        self._centred = take("centred", torch.bool, *self._centred.shape)

    def _encode(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `[..., n]` and factor `[..., 2]` of float32 numbers `[..., n]`, as bytes."""
        factor = (
            (numbers.abs().amax(-1) / self._largest).to(_FACTOR).unsqueeze(-1)
        )  # amax of nothing has no stride to keep
        codes = numbers / factor.float().clamp_min(torch.finfo(torch.float32).tiny)
        if not self._code.is_floating_point:
            codes.round_()
        return codes.to(self._code).view(torch.uint8), factor.view(torch.uint8)

    def _decode(self, codes: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        factor = factor.clone(memory_format=torch.contiguous_format)  # an odd row cannot be viewed in two bytes
        return codes.view(self._code).float() * factor.view(_FACTOR).float()


def packing_of(storage: str, form: EntryForm, streams: int, rates: Sequence[float]) -> Packing:
    """The packing that the option `storage` names, for S streams of entries; `rates` as in `rotary.rates_of`."""
    if storage in CODES:
        return CodedPacking(form, storage, streams, rates)
    return Packing(form, form.dtype if storage == "auto" else getattr(torch, storage))
