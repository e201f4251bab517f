"""Tokens whose keys and values are kept as low-rank projections: keys are restored tile by tile, values never."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.kv.dense import Dense, Rows
from niwaki.kv.factors import Factors
from niwaki.kv.packed import Packed
from niwaki.kv.segments import grouped
from niwaki.kv.sources import Rotation

TILE = 1024
"""Tokens whose keys are restored at a time: what is in memory beside the cache."""


@dataclass(frozen=True, eq=False)
class Restoring:
    """How projections of one layer become keys and values again; shared by all its parts."""

    keys: Factors
    values: Factors
    key_bias: Tensor | None
    value_bias: Tensor | None
    key_norm: nn.Module | None
    rotation: Rotation
    kv_heads: int

    def __deepcopy__(self, memo: dict[int, Any]) -> "Restoring":
        return self

    @property
    def head_dim(self) -> int:
        return self.keys.groups * self.keys.up.shape[2] // self.kv_heads

    def key(self, compressed: Tensor, positions: Tensor) -> Tensor:
        """`[batch, groups, tokens, rank of group]` to rotated keys `[batch, heads, tokens, head_dim]`."""
        keys = compressed @ self.keys.up  # [batch, groups, tokens, heads of group * head_dim]
        return self.finished(keys.transpose(1, 2).flatten(2), positions)

    def finished(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys as their projection gives them, `[batch, tokens, heads * head_dim]`: with bias, norm and rotation."""
        if self.key_bias is not None:
            keys = keys + self.key_bias
        keys = keys.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        if self.key_norm is not None:
            keys = self.key_norm(keys)
        return self.rotation(keys, positions)

    def value(self, mixed: Tensor, weights: Tensor) -> Tensor:
        """Compressed values under attention weights, `[batch, heads, group, new, rank of group]`, to values."""
        groups, rank, _ = self.values.up.shape
        up = self.values.up.view(groups, rank, self.kv_heads // groups, self.head_dim)
        up = up.transpose(1, 2).flatten(0, 1)  # [heads, rank of group, head_dim]
        restored = mixed.flatten(2, 3) @ up
        restored = restored.view(*mixed.shape[:-1], self.head_dim)
        if self.value_bias is not None:
            bias = self.value_bias.view(self.kv_heads, 1, 1, self.head_dim)
            restored = restored + weights.sum(-1, keepdim=True) * bias
        return restored


@dataclass(frozen=True, eq=False)
class LowRank:
    """The oldest tokens of a layer. Rows are `[batch, groups, tokens, rank of group]`, or finer slices where packed."""

    keys: Rows
    values: Rows
    how: Restoring
    offset: Tensor
    """int32 `[batch]`: how far a token's place in the sequence is ahead of its position (padding on the left)."""

    @property
    def tokens(self) -> int:
        return self.keys.tokens

    def logits(self, query: Tensor) -> Tensor:
        found = []
        for begin, end in self._tiles():
            places = torch.arange(begin, end, device=query.device)[None] - self.offset[:, None]
            rows = joined(stretch(self.keys, begin, end).read(), self.how.keys.groups)
            keys = self.how.key(rows.to(query.dtype), places.clamp(min=0))
            found.append(grouped(query, keys.transpose(-1, -2)))
        return torch.cat(found, dim=-1)

    def mix(self, weights: Tensor) -> Tensor:
        batch, heads, group, new, _ = weights.shape
        groups = self.how.values.groups
        mixed: Tensor | None = None
        for begin, end in self._tiles():
            rows = joined(stretch(self.values, begin, end).read(), groups).to(weights.dtype)
            tile = weights[..., begin:end].reshape(batch, groups, heads // groups * group * new, end - begin) @ rows
            mixed = tile if mixed is None else mixed + tile
        assert mixed is not None
        return self.how.value(mixed.view(batch, heads, group, new, -1), weights)

    def columns(self) -> int:
        return 0

    def append(self, keys: Tensor, values: Tensor) -> "LowRank":
        """With further tokens, `[batch, groups, tokens, rank of group]`, behind it."""
        return replace(
            self,
            keys=self.keys.append(like(self.keys, keys)),
            values=self.values.append(like(self.values, values)),
        )

    def first(self, count: int) -> "LowRank":
        return replace(self, keys=self.keys.first(count), values=self.values.first(count))

    def batch(self, index: Tensor) -> "LowRank":
        offset = self.offset.index_select(0, index.to(self.offset.device))
        return replace(self, keys=self.keys.batch(index), values=self.values.batch(index), offset=offset)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.keys.tensors()
        yield from self.values.tensors()

    def _tiles(self) -> Iterator[tuple[int, int]]:
        step = TILE
        for rows in (self.keys, self.values):
            if isinstance(rows, Packed) and rows.grid.axis == "tokens":
                step = max(1, TILE // rows.grid.group) * rows.grid.group
        for begin in range(0, self.tokens, step):
            yield begin, min(begin + step, self.tokens)


def stretch(rows: Rows, begin: int, end: int) -> Rows:
    """Tokens `begin` to `end` as views: to be read, never to be kept."""
    if isinstance(rows, Packed):
        each = rows.grid.group if rows.grid.axis == "tokens" else 1
        part = slice(begin // each, end // each)
        return replace(rows, codes=rows.codes[:, :, part], scale=rows.scale[:, :, part], least=rows.least[:, :, part])
    return Dense(rows.read()[:, :, begin:end])


def joined(rows: Tensor, groups: int) -> Tensor:
    """`[batch, slices, tokens, width]` as `[batch, groups, tokens, slices of group * width]`."""
    if rows.shape[1] == groups:
        return rows
    return rows.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)


def sliced(rows: Tensor, slices: int) -> Tensor:
    """What `joined` joined."""
    groups = rows.shape[1]
    if slices == groups:
        return rows
    return rows.unflatten(3, (slices // groups, -1)).transpose(2, 3).flatten(1, 2)


def like(rows: Rows, more: Tensor) -> Tensor:
    """In as many slices as the rows that they are put behind."""
    return sliced(more, next(rows.tensors()).shape[1])
