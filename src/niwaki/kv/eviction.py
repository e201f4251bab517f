"""Which tokens stay: the abstract type of policies on the token axis."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from niwaki.errors import InputError


@dataclass(frozen=True)
class Tokens:
    """What a policy judges: some tokens of every head, in ascending order of place."""

    positions: Tensor
    """int64 `[batch, heads, tokens]`: where they stand in the sequence."""
    attention: Tensor | None
    """Weights that queries gave them, summed over the queries that the policy asked for: float32, the same shape."""
    real: Tensor | None
    """bool, the same shape: False for padding; None where there is none."""
    first: Tensor
    """int64 `[batch]`: where each sequence begins, behind its padding."""
    seen: int
    """Tokens that came so far, with padding."""
    budget: int
    """How many of all the tokens seen may stay."""


class Eviction(ABC):
    """A rule for the tokens of each head. Places keep their numbers: nothing is rotated again."""

    keep: float | int
    """What stays: a share of the tokens seen, in (0, 1], or a count, as an int."""
    asks: ClassVar[str]
    """Whose attention it judges by: `window` (the last queries of the prompt), `all` queries, or `nothing`."""
    ongoing: ClassVar[bool]
    """Whether it goes on while tokens are generated; otherwise those all stay."""
    window: int
    """Queries of a `window`, in tokens; they stay themselves."""

    @abstractmethod
    def scores(self, tokens: Tokens) -> Tensor:
        """One number per token, higher stays: float32 `[batch, heads, tokens]`; infinite for those that must."""

    def least(self) -> int:
        """Tokens that stay whatever their scores."""
        return 1

    def budget(self, seen: int) -> int:
        """Tokens per head that stay of `seen`."""
        return min(seen, self.keep if isinstance(self.keep, int) else max(self.least(), round(self.keep * seen)))

    def check(self) -> None:
        """
        Raises:
            InputError: a share outside (0, 1], or a count that the tokens that must stay fill.
        """
        name = type(self).__name__
        if isinstance(self.keep, int) and self.keep <= self.least():
            found = f"{self.least()} tokens stay whatever happens"
            raise InputError(
                f"{name}(keep={self.keep})", found=found, do=f"keep more than {self.least()} tokens, or a share"
            )
        if isinstance(self.keep, float) and not 0 < self.keep <= 1:
            raise InputError(
                f"{name}(keep={self.keep})", found="not in (0, 1]", do="give a share, or a count as an int"
            )

    def choose(self, tokens: Tokens, count: int) -> Tensor:
        """Which `count` tokens stay, as places in `tokens`, ascending: int64 `[batch, heads, count]`."""
        scores = self.scores(tokens)
        if tokens.real is not None:
            scores = scores.masked_fill(~tokens.real, -torch.inf)
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        return order[..., :count].sort(dim=-1).values
