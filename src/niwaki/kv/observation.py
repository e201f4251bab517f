"""What the last queries of a prompt see: the evidence that channels and tokens are chosen by."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from niwaki.kv.attention import Call, attend, seen
from niwaki.kv.segments import Segment

PIECE = 1024
"""Tokens whose squares are in memory in float32 at once."""


@dataclass(frozen=True)
class Observation:
    """A prompt at one layer: all its queries, and the keys and values that stay of it."""

    call: Call
    """The whole prompt; heads as they are cached."""
    kept: Segment
    """The tokens that stay, whole; all of them where nothing was evicted."""
    real: Tensor | None
    """bool `[batch, tokens of the prompt]`, False for padding; None where there is none."""

    @property
    def prompt(self) -> int:
        return self.call.new

    def key_norms(self) -> Tensor:
        """Squares of the kept keys, summed over tokens that are no padding: float32 `[batch, heads, head_dim]`."""
        keys, real = self.kept.keys.read(), self.kept_real()
        total = keys.new_zeros(*keys.shape[:2], keys.shape[-1], dtype=torch.float32)
        for at in range(0, keys.shape[2], PIECE):
            squares = keys[:, :, at : at + PIECE].float().square()
            if real is not None:
                squares = squares.mul_(real[:, :, at : at + PIECE, None])
            total += squares.sum(dim=2)
        return total

    def query_norms(self, window: int) -> Tensor:
        """Squares of the last `window` queries, summed over them and over the group: `[batch, heads, head_dim]`."""
        query, real = self.window(window)
        squares = query.float().square()
        if real is not None:
            squares = squares * real[:, None, :, None]
        heads = self.call.keys.shape[1]
        return squares.sum(dim=2).view(squares.shape[0], heads, -1, squares.shape[-1]).sum(dim=2)

    def window(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The last `count` queries, `[batch, query heads, <= count, head_dim]`, and which of them are no padding."""
        count = min(count, self.prompt)
        return self.call.query[:, :, -count:], None if self.real is None else self.real[:, -count:]

    def kept_real(self) -> Tensor | None:
        """Which kept tokens are no padding: `[batch, heads or 1, tokens]`."""
        if self.real is None:
            return None
        if self.kept.positions is None:
            return self.real[:, None]
        return self.real[:, None].expand(-1, self.kept.positions.shape[1], -1).gather(-1, self.kept.positions.long())

    def attention(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Attention of the last `window` queries (None: of all) to the kept tokens, causal and without padding.

        Returns the outputs, `[batch, query heads, window, head_dim]`, zero for padding, and the weights summed over
        queries and group, float32 `[batch, heads, tokens]`.
        """
        count = self.prompt if window is None else min(window, self.prompt)
        query, real = self.window(count)
        call = replace(self.call, query=query, mask=self._mask(count))
        output, sums = attend(call, (self.kept,), sums=True, counted=real)
        output = output.transpose(1, 2)
        return (output if real is None else output * real[:, None, :, None]), sums[0]

    def _mask(self, count: int) -> Tensor:
        if self.call.mask is not None:
            return seen(self.call.mask[:, :, -count:])
        rows = torch.arange(self.prompt - count, self.prompt, device=self.call.query.device)
        columns = torch.arange(self.prompt, device=self.call.query.device)
        return (columns[None, :] <= rows[:, None])[None, None]
