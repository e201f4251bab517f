"""First-order Taylor estimate of the loss a removal causes."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from jaxtyping import Float
from torch import Tensor

from niwaki.evidence import GroupView, Need
from niwaki.scores.score import MERGES, Merge, Score, known, merged


@final
@dataclass(frozen=True)
class Taylor(Score):
    """|sum of weight x gradient| over a unit's slice: the first-order change of the loss when the slice becomes zero.

    Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 8 (with the mean gradient over the batches seen).
    Differs: every coupled slice gives one estimate and they are merged; the paper uses one layer or a gate.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.WEIGHT, Need.GRADIENT})
    over: Literal["all", "out", "in"] = "out"
    """Which slices count; zeroing any one of producer and consumer removes the unit, so one of them tells it all."""
    merge: Merge = "mean"
    """How the estimates of coupled slices become one number."""

    def __post_init__(self) -> None:
        known(self, over=("all", "out", "in"), merge=MERGES)

    def __call__(self, view: GroupView) -> Float[Tensor, " units"]:
        triples = list(zip(view.weights, view.gradients or (), view.roles, strict=True))
        chosen = [(w, g) for w, g, role in triples if self.over == "all" or role == self.over]
        chosen = chosen or [(w, g) for w, g, _ in triples]
        return merged([(w.double() * g.double()).sum(1).abs() for w, g in chosen], self.merge, 2)
