"""Rows of numbers as they are: one tensor, `[batch, heads, tokens, width]`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class Rows(Protocol):
    """How keys or values of some tokens lie in memory.

    Every method returns new rows; none keeps a longer tensor alive.
    """

    @property
    def tokens(self) -> int: ...

    def read(self) -> Tensor:
        """All of them as numbers, `[batch, heads, tokens, width]`."""
        ...

    def append(self, rows: Tensor) -> Self:
        """With `rows`, `[batch, heads, tokens, width]`, behind them."""
        ...

    def first(self, count: int) -> Self:
        """Only the first `count` tokens."""
        ...

    def batch(self, index: Tensor) -> Self:
        """The sequences `index` of the batch: reordered, repeated or left out."""
        ...

    def take(self, index: Tensor) -> Self:
        """The tokens `index`, `[batch, heads, tokens]`, of each head."""
        ...

    def tensors(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Dense:
    """Rows in one compact tensor of the model's own type."""

    rows: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Dense":
        """A compact copy: the tensor that `rows` may be a view of is not kept alive."""
        return cls(rows.detach().clone(memory_format=torch.contiguous_format))

    @property
    def tokens(self) -> int:
        return self.rows.shape[-2]

    def read(self) -> Tensor:
        return self.rows

    def append(self, rows: Tensor) -> "Dense":
        return Dense(torch.cat((self.rows, rows.detach()), dim=-2)) if rows.shape[-2] else self

    def first(self, count: int) -> "Dense":
        return self if count == self.tokens else Dense.of(self.rows[..., :count, :])

    def batch(self, index: Tensor) -> "Dense":
        return Dense(self.rows.index_select(0, index.to(self.rows.device)))

    def take(self, index: Tensor) -> "Dense":
        return Dense(self.rows.gather(2, index.unsqueeze(-1).expand(*index.shape, self.rows.shape[-1])))

    def tensors(self) -> Iterator[Tensor]:
        yield self.rows
