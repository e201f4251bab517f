"""First-order Taylor estimate of the loss a removal causes."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from niwaki.evidence import GroupView, Need
from niwaki.scores.score import MERGES, Over, Score, known, merged

SignedMerge = Literal["signed", "joint", "sum", "mean", "max"]
SIDES = ("in", "out", "norm")


@final
@dataclass(frozen=True)
class Taylor(Score):
    """|sum of weight x gradient| over the slices that read a unit: the first-order change of the loss when it goes.

    With all its readers at zero a unit has no effect left, so their estimates, added with their signs, are that of the
    removal, past batch norm, bends and shortcuts. A producer tells less: in front of a batch norm its zero leaves the
    norm's shift, and of the several producers of a stream each tells only its own part.

    Source: Molchanov et al. 2019, arXiv:1906.10771, sec. 3 (group contribution; the sum over readers is the paper's
    gate behind the norm, and its shared gate where shortcuts join, computed without one).
    Differs: size of the mean over the batches seen; the paper squares per batch and averages the squares, and its code
    divides a shared gate's score by the number of blocks that share it.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.WEIGHT, Need.GRADIENT})
    over: Over = "in"
    """Which slices count: those that read the unit, those that produce it, or all. A unit without such slices (queries
    and keys meet each other, no weight reads them) is judged by the mean size of the estimates of the slices it has."""
    merge: SignedMerge = "signed"
    """How the estimates of coupled slices become one number: size of their sum (side by side where `over` is "all",
    and then the mean of the sides), or one of the merges of their sizes."""

    def __post_init__(self) -> None:
        known(self, over=("all", "out", "in"), merge=("signed", *MERGES))

    def __call__(self, view: GroupView) -> Float[Tensor, " units"]:
        parts = [(w.double() * g.double()).sum(1) for w, g in zip(view.weights, view.gradients or (), strict=True)]
        if view.group.kind == "block":  # all that its branch is made from: together they tell the branch's whole effect
            return torch.stack([part.sum(0, keepdim=True) for part in parts]).sum(0).abs()
        chosen = [(part, role) for part, role in zip(parts, view.roles, strict=True) if self.over in ("all", role)]
        if self.merge != "signed":
            return merged([part.abs() for part, _ in chosen] or [part.abs() for part in parts], self.merge, 2)
        # readers, producers and norms each tell the whole when all of them are taken together
        sides = [[part for part, role in chosen if (role if role in SIDES else "norm") == side] for side in SIDES]
        sums = [torch.stack(side).sum(0).abs() for side in sides if side]
        return merged(sums or [part.abs() for part in parts], "mean", 2)
