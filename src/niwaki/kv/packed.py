"""Rows of numbers as codes of 2, 4 or 8 bits, really packed: 4, 2 or 1 codes a byte, with a scale and a least value."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from niwaki.errors import InputError, NotFiniteError

Axis = Literal["tokens", "channels"]
"""What a group runs along: tokens (a scale per channel and stretch of tokens) or channels (scales per token)."""


@dataclass(frozen=True)
class Grid:
    """How rows become codes: x = code * scale + least, codes from 0 to 2^bits - 1, per group.

    Raises:
        InputError: bits that are not 2, 4 or 8, or a group that is no multiple of 8.
    """

    bits: int
    axis: Axis
    group: int = 32
    """Numbers with a scale of their own; along channels at most so many, so that groups are alike."""

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise InputError(
                f"pack {self.bits} bits", found="not 2, 4 or 8", do="use 4 bits, or 2 where memory is short"
            )
        if self.group < 8 or self.group % 8:
            raise InputError(f"groups of {self.group}", found="not a multiple of 8", do="use 32")

    def groups(self, length: int) -> tuple[int, int]:
        """How `length` numbers along the axis are split: groups, and numbers in each (the last may be filled up)."""
        if self.axis == "tokens":
            return length // self.group, self.group
        count = -(-length // self.group)
        each = -(-length // count) if count else 0
        byte = 8 // self.bits
        return count, -(-each // byte) * byte

    def nbytes(self, tokens: int, width: int) -> int:
        """Bytes of `tokens` rows of `width` channels: codes, and two float16 per group."""
        count, each = self.groups(tokens if self.axis == "tokens" else width)
        others = width if self.axis == "tokens" else tokens
        return count * others * (each * self.bits // 8 + 4)


@dataclass(frozen=True)
class Packed:
    """Codes of some tokens. Scales and least values are float16; rounding them comes before the codes are chosen."""

    codes: Tensor
    """uint8 `[batch, heads, groups, bytes, width]`; along channels `[batch, heads, tokens, groups, bytes]`."""
    scale: Tensor
    """float16, as the codes without the axis of bytes."""
    least: Tensor
    """The same: the smallest number of each group."""
    grid: Grid
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, rows: Tensor, grid: Grid) -> "Packed":
        """Codes of `[batch, heads, tokens, width]`.

        Raises:
            InputError: groups along tokens that are not full.
            NotFiniteError: numbers that float16 cannot hold.
        """
        rows = rows.detach()
        batch, heads, tokens, width = rows.shape
        if grid.axis == "tokens":
            if tokens % grid.group:
                found, do = f"{tokens} tokens", f"pack multiples of {grid.group}"
                raise InputError("pack keys per channel", found=found, do=do)
            split = rows.reshape(batch, heads, tokens // grid.group, grid.group, width)
            axis = 3
        else:
            count, each = grid.groups(width)
            if count * each > width:  # fill the last group with its last number: range and scale stay
                rows = torch.cat((rows, rows[..., -1:].expand(*rows.shape[:-1], count * each - width)), dim=-1)
            split = rows.reshape(batch, heads, tokens, count, each)
            axis = 4
        split = split.float()
        least, most = split.amin(dim=axis), split.amax(dim=axis)
        low = least.half()
        scale = ((most - low.float()) / (2**grid.bits - 1)).half()
        if not (torch.isfinite(low).all() and torch.isfinite(scale).all()):
            found = f"numbers from {float(least.min()):g} to {float(most.max()):g}"
            raise NotFiniteError("pack a cache", found=found, do="use bits=None: float16 holds up to 65504")
        step = scale.float().unsqueeze(axis)
        codes = torch.where(step > 0, (split - low.float().unsqueeze(axis)) / step, 0.0)
        codes = codes.round_().clamp_(0, 2**grid.bits - 1).to(torch.uint8)
        return cls(join(codes, grid.bits, axis), scale, low, grid, width, rows.dtype)

    @property
    def tokens(self) -> int:
        return self.codes.shape[2] * (self.grid.group if self.grid.axis == "tokens" else 1)

    def read(self) -> Tensor:
        axis = 3 if self.grid.axis == "tokens" else 4
        codes = part(self.codes, self.grid.bits, axis).float()
        rows = (codes * self.scale.float().unsqueeze(axis) + self.least.float().unsqueeze(axis)).to(self.dtype)
        batch, heads = rows.shape[:2]
        if self.grid.axis == "tokens":
            return rows.reshape(batch, heads, -1, self.width)
        return rows.reshape(batch, heads, rows.shape[2], -1)[..., : self.width]

    def append(self, rows: Tensor) -> "Packed":
        new = Packed.of(rows, self.grid)
        return self._with(*(torch.cat(both, dim=2) for both in zip(self.tensors(), new.tensors(), strict=True)))

    def first(self, count: int) -> "Packed":
        each = self.grid.group if self.grid.axis == "tokens" else 1
        if count % each:
            do = f"crop within the tokens that are whole (keep more recent), or to a multiple of {each}"
            raise InputError(f"crop packed keys to {count} tokens", found=f"groups of {each}", do=do)
        return self._with(*(tensor[:, :, : count // each].clone() for tensor in self.tensors()))

    def batch(self, index: Tensor) -> "Packed":
        return self._with(*(tensor.index_select(0, index.to(tensor.device)) for tensor in self.tensors()))

    def take(self, index: Tensor) -> "Packed":
        do = "use a policy that evicts after the prompt only (SnapKV), or no bits"
        raise InputError("evict packed tokens", found="tokens of a group share their scales", do=do)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.codes, self.scale, self.least)

    def _with(self, codes: Tensor, scale: Tensor, least: Tensor) -> "Packed":
        return Packed(codes, scale, least, self.grid, self.width, self.dtype)


class Bits(ABC):
    """A rule for how keys and values are packed."""

    group: int
    """Tokens of keys that are packed together."""

    @abstractmethod
    def grids(self) -> tuple[Grid, Grid]:
        """Of keys and of values."""

    @abstractmethod
    def pack(self, keys: Tensor, values: Tensor) -> tuple[Packed, Packed]:
        """`[batch, heads, tokens, width]` each; tokens a multiple of `group`."""


def join(codes: Tensor, bits: int, axis: int) -> Tensor:
    """uint8 codes, 8 / bits to a byte along an axis: the first in the lowest bits, as `niwaki.quantize.pack` does."""
    each = 8 // bits
    split = codes.unflatten(axis, (codes.shape[axis] // each, each))
    joined = split.select(axis + 1, 0).clone()
    for place in range(1, each):
        joined |= split.select(axis + 1, place) << (place * bits)
    return joined


def part(joined: Tensor, bits: int, axis: int) -> Tensor:
    """What `join` joined."""
    places = [(joined >> (place * bits)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(places, dim=axis + 1).flatten(axis, axis + 1)
