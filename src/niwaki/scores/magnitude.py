"""Magnitude of the weights."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from niwaki.errors import InputError
from niwaki.evidence import GroupView
from niwaki.scores.score import MERGES, Merge, Over, Score, known, merged


@final
@dataclass(frozen=True)
class Magnitude(Score):
    """Norm of a unit's weights: what is small contributes little.

    Source: Li et al. 2017, arXiv:1608.08710, sec. 3.1 (L1 of a filter).
    Differs: by default joins every coupled slice (the filter, what reads it, the norm's scale), not the filter alone.
    """

    p: float = 2
    """Order of the norm, 1 or 2."""
    over: Over = "all"
    """Which slices count: all, only those that produce the unit, or only those that consume it."""
    merge: Merge = "joint"
    """How the norms of coupled slices become one number."""

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise InputError(f"Magnitude(p={self.p!r})", found="orders 1 and 2 are known", do="use p=1 or p=2")

        known(self, over=("all", "out", "in"), merge=MERGES)

    def __call__(self, view: GroupView) -> Float[Tensor, " units"]:
        pairs = list(zip(view.powers(self.p), view.roles, strict=True))
        chosen = [sums for sums, role in pairs if role != "shift" and (self.over == "all" or role == self.over)]
        chosen = chosen or [sums for sums, _ in pairs]
        return merged([sums.pow(1 / self.p) for sums in chosen], self.merge, self.p)
