"""Least squares from sums over positions: solved with a ridge, which two halves of the positions may raise."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(eq=False)
class NormalEquations:
    """Over positions, float64: inputs x of a layer and what it puts out too little, y, by group."""

    products: Float[Tensor, "groups inputs inputs"]
    cross: Float[Tensor, "groups inputs outputs"]
    inputs: Float[Tensor, "groups inputs"]
    missing: Float[Tensor, "groups outputs"]
    count: int = 0

    @classmethod
    def of(cls, weight: Float[Tensor, "groups outputs inputs"]) -> "NormalEquations":
        """None yet."""
        groups, outputs, inputs = weight.shape
        shapes = (groups, inputs, inputs), (groups, inputs, outputs), (groups, inputs), (groups, outputs)
        products, cross, total, missing = (weight.new_zeros(shape) for shape in shapes)
        return cls(products, cross, total, missing)

    def add(self, x: Float[Tensor, "groups positions inputs"], y: Float[Tensor, "groups positions outputs"]) -> None:
        self.products.baddbmm_(x.mT, x)
        self.cross.baddbmm_(x.mT, y)
        self.inputs += x.sum(1)
        self.missing += y.sum(1)
        self.count += x.shape[1]

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return NormalEquations(
            self.products + other.products,
            self.cross + other.cross,
            self.inputs + other.inputs,
            self.missing + other.missing,
            self.count + other.count,
        )

    def solved(self, ridge: float) -> tuple[Float[Tensor, "groups inputs outputs"], Float[Tensor, "groups outputs"]]:
        """The change D of the weight and the constant c that bring `x D + c` nearest to y."""
        x, y = self.inputs / self.count, self.missing / self.count
        covariance = self.products / self.count - x[:, :, None] * x[:, None]
        level = covariance.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        covariance.diagonal(dim1=1, dim2=2).add_(torch.where(level > 0, ridge * level, torch.ones_like(level)))
        cross = self.cross / self.count - x[:, :, None] * y[:, None]
        change = torch.cholesky_solve(cross, torch.linalg.cholesky(covariance))
        return change, y - (x[:, None] @ change)[:, 0]

    def missed(self, change: Tensor, shift: Tensor) -> float:
        """The sum of squares of `y - x D - c`, less that of y."""
        linear = (change * (self.products @ change - 2 * self.cross)).sum()
        crossed = ((self.inputs[:, None] @ change)[:, 0] * shift).sum()
        return float(linear + 2 * crossed + self.count * shift.square().sum() - 2 * (shift * self.missing).sum())


def raised(one: NormalEquations, other: NormalEquations, ridge: float, raises: int) -> float:
    """The ridge, or ten, a hundred, ... times it, as long as each half is met better by what is solved from the other.

    Args:
        raises: how often it may be tried.
    """
    if not raises or not one.count or not other.count:
        return ridge
    best, least = ridge, math.inf
    for times in range(raises + 1):
        tried = ridge * 10**times
        missed = other.missed(*one.solved(tried)) + one.missed(*other.solved(tried))
        if missed >= least:
            break
        best, least = tried, missed
    return best
