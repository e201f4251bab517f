"""What gives every layer its density: the share of its weights that stays."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from niwaki.errors import BudgetError, InputError


@final
@dataclass(frozen=True, eq=False)
class Layers:
    """Layers as a density sees them: what each costs whole. A layer of density p costs p times as much."""

    costs: Mapping[str, np.ndarray]
    """"params", "macs" or any other -> cost of every layer; float64 `[layers]`."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of the weights, outputs first."""
    free: np.ndarray | None = None
    """Layers that can lose anything, the others count whole; bool `[layers]`, all unless given."""

    @property
    def count(self) -> int:
        return next(iter(self.costs.values())).size

    def may(self) -> np.ndarray:
        """`free`, written out."""
        return np.ones(self.count, bool) if self.free is None else self.free


class Density(ABC):
    """Layers and limits to densities."""

    @abstractmethod
    def __call__(self, layers: Layers, limits: Mapping[str, float]) -> np.ndarray:
        """Density of every layer, 1 for those that are not free; float64 `[layers]`.

        Args:
            limits: cost -> the most that all layers together may cost.

        Raises:
            BudgetError: layers that are not free cost more than that alone.
            InputError: a cost that is not known, or no limit at all.
        """


def rests(layers: Layers, limits: Mapping[str, float]) -> dict[str, tuple[np.ndarray, float]]:
    """For each limit the costs of the free layers, and what the others leave of it.

    Raises:
        InputError, BudgetError: see `Density`.
    """
    if not limits:
        raise InputError("densities without a limit", found="no budget", do="give one, e.g. of params")
    free, found = layers.may(), {}
    for name, limit in limits.items():
        if name not in layers.costs:
            raise InputError(f"densities by {name}", found=f"known: {', '.join(layers.costs)}", do="use one of them")
        rest = limit - float(layers.costs[name][~free].sum())
        if not rest > 0:
            raise BudgetError(
                f"{name} <= {limit:.6g}",
                found=f"layers that can't lose anything cost {limit - rest:.6g} alone",
                do="raise keep, or protect fewer layers",
            )
        found[name] = (layers.costs[name][free], rest)
    return found


def filled(costs: np.ndarray, levels: np.ndarray, caps: np.ndarray, limit: float) -> np.ndarray:
    """`min(caps, t levels)` for the largest t at which this costs no more than `limit`; exact, by sorting.

    Layers in order of `caps / levels` reach their cap one after the other; between two of them the cost is a line.
    """
    if float(costs @ caps) <= limit:
        return caps.copy()
    turns = caps / levels
    order = np.argsort(turns, kind="stable")
    whole = np.concatenate([[0.0], np.cumsum((costs * caps)[order])])  # of the layers that are at their cap
    slope = float((costs * levels).sum()) - np.concatenate([[0.0], np.cumsum((costs * levels)[order])])
    reached = whole[:-1] + slope[:-1] * turns[order]  # the cost at each turn, rising
    at = min(int(np.searchsorted(reached, limit)), int(order.size) - 1)
    return np.asarray(np.minimum(caps, (limit - whole[at]) / slope[at] * levels))


def spread(densities: np.ndarray, layers: Layers) -> np.ndarray:
    """Densities of the free layers among ones."""
    every = np.ones(layers.count)
    every[layers.may()] = densities
    return every
