"""What the loss rises by when a unit goes and those that stay take its place, to second order."""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from niwaki.errors import InputError
from niwaki.evidence import Curvature, GroupView, Need
from niwaki.scores.score import Score, fitting
from niwaki.units import Member

STRICT = 1e-12
"""Of two units with one cost, the one that went later scores higher by so much of it."""


@final
@dataclass(frozen=True)
class OptimalBrainSurgeon(Score):
    """Rise of the loss when a unit goes, after the readers' other weights have made up for it; units go one by one.

    The cost of a unit is that of taking all its inputs out of its readers at the best change of the inputs that stay:
    `tr(W_j [C^-1]_jj^-1 W_j^T G) / 2`, summed over the readers, with a reader's inputs of covariance C and the
    products G of the gradients at its outputs. The cheapest goes, W and C^-1 become those of the layer without it, and
    the costs of the others are taken anew. A unit that goes after a dearer one costs as much as that.

    Groups that anything reads but linear layers and plain convolutions (grouped and transposed ones, attention between
    its queries and keys, layers of more than 8192 inputs), and blocks, give an empty result and are left whole.

    Source: Hassibi and Stork 1993 (Second order derivatives for network pruning: Optimal Brain Surgeon), eq. 5, of a
    unit's weights at once as in Kurtic et al. 2022, arXiv:2203.07259, sec. 3; the factors as in Wang et al. 2019,
    arXiv:1905.05934, sec. 2.3; whole structures one by one as in Kurtic et al. 2023, arXiv:2302.04089, sec. 3.1.
    Differs: readers are judged, not producers; inputs without their means; a unit's cost is never below that of one
    that went before; wide groups lose several units in a round.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.WEIGHT, Need.GRADIENT, Need.CURVATURE})
    ridge: float = 1e-2
    """Added to the inputs' variances, as a share of their mean: so much the weights that stay are held where they are.
    The same as of `repair.LeastSquares`, which does what is reckoned with here."""
    rounds: int = 64
    """How often costs are taken anew at most: groups of up to so many units lose one at a time, wider ones several,
    which are told apart by their own costs alone. Each is worth about `inputs^2` multiply-adds times what goes."""

    def __post_init__(self) -> None:
        fitting(self)
        if not 0 < self.ridge < float("inf"):
            raise InputError(f"OptimalBrainSurgeon(ridge={self.ridge!r})", found="not above 0", do="give 0.01, or more")
        if self.rounds < 1:
            raise InputError(f"OptimalBrainSurgeon(rounds={self.rounds})", found="fewer than 1", do="give 1 or more")

    def __call__(self, view: GroupView) -> Float[Tensor, " units"]:
        known, units = view.evidence.curvature or {}, view.group.units
        readers = [m for m in view.members if m.role == "in"]
        judged = all(m.tensor in known and (m.axis, m.blocks) == (1, 1) for m in readers)
        if not readers or not judged or view.group.kind == "block":
            return torch.zeros(0, dtype=torch.float64)
        parts = [_part(view.evidence.weights[m.tensor], m, known[m.tensor], units, self.ridge) for m in readers]
        alive = torch.arange(units)
        scores = torch.zeros(units, dtype=torch.float64)
        level, at_once = 0.0, -(-units // self.rounds)
        while len(alive):
            costs = torch.stack([_costs(*part, len(alive)).cpu() for part in parts]).sum(0)
            cheapest = costs.argsort(stable=True)[:at_once]
            rising = costs[cheapest].clamp(min=level)
            level = float(rising[-1])
            rank = units - len(alive) + torch.arange(len(cheapest), dtype=torch.float64)
            scores[alive[cheapest]] = rising * (1 + STRICT * rank)
            stay = torch.ones(len(alive), dtype=torch.bool)
            stay[cheapest] = False
            parts = [_without(*part, stay) for part in parts]
            alive = alive[stay]
        return scores


def _part(
    weight: Tensor, member: Member, curvature: Curvature, units: int, ridge: float
) -> tuple[Float[Tensor, "inputs inputs"], Float[Tensor, "inputs inputs"]]:
    """Of a reader C^-1 and W^T G W, at the group's inputs, unit after unit."""
    covariance = curvature.inputs
    level = float(covariance.diagonal().mean())
    covariance = covariance + torch.eye(len(covariance)).to(covariance) * (ridge * level if level > 0 else 1.0)
    inputs = _inputs(member, weight[0, 0].numel()).to(weight.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))[inputs][:, inputs]
    own = weight.detach().flatten(1).double()[:, inputs]
    return inverse, own.T @ curvature.outputs @ own


def _inputs(member: Member, places: int) -> Int[Tensor, " inputs"]:
    """Positions in the flattened rows of the weight, unit after unit."""
    order = np.argsort(member.unit, kind="stable")
    channels = torch.from_numpy(member.index[order].astype(np.int64))
    return (channels[:, None] * places + torch.arange(places)).flatten()


def _costs(inverse: Tensor, bent: Tensor, units: int) -> Float[Tensor, " units"]:
    """Of each unit `tr([C^-1]_jj^-1 [W^T G W]_jj) / 2`."""
    blocks = (_diagonal(matrix, units) for matrix in (inverse, bent))  # [units, each, each]
    return torch.linalg.solve(*blocks).diagonal(dim1=1, dim2=2).sum(1).clamp(min=0) / 2


def _diagonal(matrix: Tensor, units: int) -> Float[Tensor, "units each each"]:
    return matrix.unflatten(1, (units, -1)).unflatten(0, (units, -1)).diagonal(dim1=0, dim2=2).movedim(2, 0)


def _without(inverse: Tensor, bent: Tensor, stay: Tensor) -> tuple[Tensor, Tensor]:
    """Both matrices after the units that do not stay are gone: `W' = W_s - W_g K` with `K = [C^-1]_gg^-1 [C^-1]_gs`."""
    inputs = stay.repeat_interleave(len(inverse) // len(stay)).to(inverse.device)
    s, g = torch.nonzero(inputs).ravel(), torch.nonzero(~inputs).ravel()
    cross = inverse[g][:, s]
    by = torch.linalg.solve(inverse[g][:, g], cross)  # [gone, stay]
    mixed = bent[s][:, g] @ by
    return inverse[s][:, s] - cross.T @ by, bent[s][:, s] - mixed - mixed.T + by.T @ (bent[g][:, g] @ by)
