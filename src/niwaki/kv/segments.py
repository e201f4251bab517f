"""Stretches of cached tokens that are stored alike, and how a query meets them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from niwaki.kv.dense import Dense, Rows


class Part(Protocol):
    """Some cached tokens: what attention and the cache ask of them. Heads are those of keys, `group` queries each."""

    @property
    def tokens(self) -> int: ...

    def logits(self, query: Tensor) -> Tensor:
        """Products of queries and keys, not scaled: `[batch, heads, group, new, head_dim]` to `[..., new, tokens]`."""
        ...

    def mix(self, weights: Tensor) -> Tensor:
        """Values under attention weights: `[batch, heads, group, new, tokens]` to `[..., new, head_dim]`."""
        ...

    def columns(self) -> int | Tensor:
        """Where its tokens stand: the first one's place if they follow each other, else `[batch, heads, tokens]`."""
        ...

    def first(self, count: int) -> "Part": ...

    def batch(self, index: Tensor) -> "Part": ...

    def tensors(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Segment:
    """Tokens whose keys have some channels and whose values have some channels, each in rows of some kind."""

    keys: Rows
    values: Rows
    width: int
    """Channels of the whole head: what values are spread out to again."""
    start: int
    """Place of the first token, counted with everything seen so far; with `positions` it says nothing."""
    key_channels: Tensor | None = None
    """int16 `[batch, heads, kept]`, ascending: which channels the keys have; None for all."""
    value_channels: Tensor | None = None
    """The same of the values."""
    positions: Tensor | None = None
    """int32 `[batch, heads, tokens]`, ascending, where tokens were evicted; None if they follow each other."""

    @classmethod
    def whole(cls, keys: Tensor, values: Tensor, *, start: int, positions: Tensor | None = None) -> "Segment":
        """All channels of `[batch, heads, tokens, head_dim]`, copied."""
        return cls(Dense.of(keys), Dense.of(values), width=values.shape[-1], start=start, positions=positions)

    @property
    def tokens(self) -> int:
        return self.keys.tokens

    @property
    def plain(self) -> bool:
        """Nothing is left out: the model's own attention can read it."""
        return (
            isinstance(self.keys, Dense)
            and isinstance(self.values, Dense)
            and self.key_channels is None
            and self.value_channels is None
            and self.positions is None
        )

    def logits(self, query: Tensor) -> Tensor:
        if self.key_channels is not None:
            index = self.key_channels.long()[:, :, None, None, :]  # [batch, heads, 1, 1, kept]
            query = query.gather(-1, index.expand(*query.shape[:-1], index.shape[-1]))
        return grouped(query, self.keys.read().transpose(-1, -2))

    def mix(self, weights: Tensor) -> Tensor:
        mixed = grouped(weights, self.values.read())
        if self.value_channels is None:
            return mixed
        index = self.value_channels.long()[:, :, None, None, :].expand_as(mixed)
        return mixed.new_zeros(*mixed.shape[:-1], self.width).scatter(-1, index, mixed)

    def columns(self) -> int | Tensor:
        return self.start if self.positions is None else self.positions

    def append(self, keys: Tensor, values: Tensor, *, positions: Tensor | None = None) -> "Segment":
        """With further tokens behind it; `keys` and `values` have the channels that this segment has.

        Where the segment lists its tokens' places, `positions` are those of the new ones.
        """
        joined = self.positions
        if joined is not None and positions is not None:
            joined = torch.cat((joined, positions), dim=-1)
        return replace(self, keys=self.keys.append(keys), values=self.values.append(values), positions=joined)

    def stretch(self, begin: int, end: int) -> "Segment":
        """Tokens `begin` to `end`, as views of whole, dense rows: to be copied, never to be kept."""
        keys, values = (Dense(rows.read()[..., begin:end, :]) for rows in (self.keys, self.values))
        positions = None if self.positions is None else self.positions[..., begin:end]
        return replace(self, keys=keys, values=values, positions=positions, start=self.start + begin)

    def compact(self) -> "Segment":
        """A copy that keeps no longer tensor alive."""
        keys, values = Dense.of(self.keys.read()), Dense.of(self.values.read())
        return replace(
            self, keys=keys, values=values, positions=None if self.positions is None else self.positions.clone()
        )

    def first(self, count: int) -> "Segment":
        positions = None if self.positions is None else self.positions[..., :count].clone()
        return replace(self, keys=self.keys.first(count), values=self.values.first(count), positions=positions)

    def batch(self, index: Tensor) -> "Segment":
        def chosen(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, index.to(tensor.device))

        return replace(
            self,
            keys=self.keys.batch(index),
            values=self.values.batch(index),
            key_channels=chosen(self.key_channels),
            value_channels=chosen(self.value_channels),
            positions=chosen(self.positions),
        )

    def tensors(self) -> Iterator[Tensor]:
        yield from self.keys.tensors()
        yield from self.values.tensors()
        yield from (t for t in (self.key_channels, self.value_channels, self.positions) if t is not None)


def grouped(left: Tensor, right: Tensor) -> Tensor:
    """`[batch, heads, group, new, inner]` times `[batch, heads, inner, outer]`: a group shares its head's tensor."""
    batch, heads, group, new, inner = left.shape
    product = left.reshape(batch, heads, group * new, inner) @ right
    return product.view(batch, heads, group, new, right.shape[-1])
