"""Costs and layers as functions of the shares that pools of units keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy.sparse import csr_matrix

from niwaki.budgets.density import Layers
from niwaki.budgets.engine import Ledger
from niwaki.budgets.rule import Atoms
from niwaki.errors import BudgetError
from niwaki.graph import ChannelGraph
from niwaki.graph.cost import Products
from niwaki.graph.weights import Weight


@final
@dataclass(frozen=True, eq=False)
class Sums:
    """One cost: a sum of products of widths, each width a line in every pool's share."""

    constants: np.ndarray
    """float64 `[items]`"""
    factors: np.ndarray
    """Widths of each item; the number after the last is always 1. int `[items, slots]`"""
    base: np.ndarray
    """Positions of each width that no pool holds; float64 `[widths]`."""
    slope: csr_matrix
    """Positions of each width that a pool holds, whole; `[widths, pools]`."""

    def __call__(self, shares: np.ndarray) -> float:
        """The cost at these shares of the pools; float64 `[pools]`."""
        padded = np.append(self.base + self.slope @ shares, 1.0)
        return float((self.constants * padded[self.factors].prod(1)).sum())

    def gradient(self, shares: np.ndarray) -> np.ndarray:
        """Change of the cost with each share; float64 `[pools]`."""
        padded = np.append(self.base + self.slope @ shares, 1.0)
        values = padded[self.factors]  # [items, slots]
        change = np.zeros(padded.size)
        for slot in range(values.shape[1]):
            others = np.delete(values, slot, axis=1).prod(1)
            np.add.at(change, self.factors[:, slot], self.constants * others)
        return np.asarray(self.slope.T @ change[:-1])


@final
@dataclass(frozen=True, eq=False)
class Pools:
    """Pools of units that keep one share each, the costs of all shares, and the layers in between."""

    sizes: np.ndarray
    """Atoms of each pool; int64 `[pools]`."""
    costs: dict[str, Sums]
    layers: Layers
    out: np.ndarray
    """How far a layer's outputs are a pool's: 1 where all of them are; float64 `[layers, pools]`."""
    into: np.ndarray
    """The same of what it reads."""
    axes: np.ndarray
    """How many widths a layer has, those that are fixed as well; int64 `[layers]`."""
    names: tuple[str, ...] = ()
    """Of the layers."""

    @property
    def slopes(self) -> np.ndarray:
        """Change of a layer's log density with the log share of each pool; float64 `[layers, pools]`.

        Exact where an axis is of one pool; where several lie side by side (concatenation) their shares of the axis
        count, which is a lower bound by the concavity of the logarithm.
        """
        return self.out + self.into


def pools_of(graph: ChannelGraph, atoms: Atoms, weights: Sequence[Weight], names: Sequence[str]) -> Pools:
    """Pools of these atoms, with the costs of these names.

    Raises:
        BudgetError: a cost that is no sum of products of widths.
    """
    count = len(atoms.pools)
    ledger = Ledger.of(graph.widths, graph.costs, atoms.units, graph.units.count)
    full = graph.widths.counts(np.append(np.ones(graph.units.count, bool), True))
    member = csr_matrix((np.ones(atoms.pool.size), (atoms.pool, np.arange(atoms.pool.size))), (count, atoms.pool.size))
    slope = csr_matrix((member @ ledger.takes).T[:-1])
    base = full - np.asarray(slope.sum(1)).ravel()
    costs: dict[str, Sums] = {}
    for name in dict.fromkeys((*names, "params", "macs")):
        cost = graph.costs[name]
        if not isinstance(cost, Products):
            raise BudgetError(
                f"widths by {name}", found="no sum of products of widths", do="use a budget of params, macs or bytes"
            )
        costs[name] = Sums(cost.constants.astype(np.float64), cost.factors, base, slope)
    pool_of = np.full(graph.units.count + 1, count, dtype=np.int64)
    for at in range(len(atoms.units)):
        pool_of[atoms.units[at]] = atoms.pool[at]
    sides = {side: np.zeros((len(weights), count)) for side in ("out", "in")}
    for number, weight in enumerate(weights):
        for units, role in zip(weight.units, weight.roles, strict=True):
            lying = np.bincount(pool_of[units].ravel(), minlength=count + 1)[:count]  # rows are equally long
            sides["in" if role == "in" else "out"][number] += lying / units.size
    free = (sides["out"] + sides["in"]).sum(1) > 0
    layers = Layers(
        {
            "params": np.array([weight.params for weight in weights], dtype=np.float64),
            "macs": np.array([weight.macs for weight in weights], dtype=np.float64),
        },
        tuple(weight.shape for weight in weights),
        free,
    )
    axes = np.array([max(len(weight.units), 1) for weight in weights], dtype=np.int64)
    sizes = np.bincount(atoms.pool, minlength=count)
    return Pools(sizes, costs, layers, sides["out"], sides["in"], axes, tuple(weight.name for weight in weights))


def to_limits(pools: Pools, shares: np.ndarray, limits: dict[str, float], caps: np.ndarray) -> np.ndarray:
    """`shares` times one factor, each at most its cap, such that every limit is met and one is used up."""

    def fits(factor: float) -> bool:
        now = np.minimum(caps, factor * shares)
        return all(pools.costs[name](now) <= limit for name, limit in limits.items())

    low, high = 0.0, float((caps / np.maximum(shares, 1e-12)).max(initial=1.0))
    if fits(high):
        return np.minimum(caps, high * shares)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return np.asarray(np.minimum(caps, low * shares))
