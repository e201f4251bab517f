"""Tokens that were looked at most so far stay, and the newest."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.kv.eviction import Eviction, Tokens


@final
@dataclass(frozen=True)
class H2O(Eviction):
    """Per head, heavy hitters by attention weights accumulated over all queries, prompt and generation, and the newest.

    Source: Zhang et al. 2023, arXiv:2306.14048, algorithm 1. Differs: one choice per key/value head, by its group's
    sum; the ThinK paper's code sums the last 32 queries only, which is SnapKV without smoothing.

    Raises:
        InputError: a share outside (0, 1].
    """

    keep: float | int = 0.2
    """Tokens per head that stay, at every time: a share of those seen, in (0, 1], or a count."""
    recent: float = 0.5
    """Share of them that are the newest, in [0, 1]; the paper's half."""
    asks: ClassVar[str] = "all"
    ongoing: ClassVar[bool] = True
    window: ClassVar[int] = 0  # type: ignore[misc]

    def __post_init__(self) -> None:
        if not 0 <= self.recent <= 1:
            raise InputError(f"H2O(recent={self.recent})", found="not in [0, 1]", do="give a share of what stays")
        self.check()

    def scores(self, tokens: Tokens) -> Tensor:
        assert tokens.attention is not None
        newest = tokens.positions >= tokens.seen - round(self.recent * tokens.budget)
        return tokens.attention.masked_fill(newest, torch.inf)
