"""Densities of the largest product: every layer that is cut keeps the same cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from niwaki.budgets.density import Density, Layers, filled, rests, spread
from niwaki.errors import InputError

HALVINGS = 200
"""Of the price of one limit beside the other; more than doubles resolve."""


@final
@dataclass(frozen=True)
class WaterFilling(Density):
    """Maximise the sum of log densities under one limit or two: the expected flow through random masks (SynExp).

    Source: Cai et al., arXiv:2203.02549 (v2), the program as its reviews state it; the closed forms are derived.

    Raises:
        InputError: a cap below 1.
    """

    cap: float = 1.0
    """The largest density: 1 (PreCrop), or above, where layers may grow (PreConfig; 4 is double width)."""

    def __post_init__(self) -> None:
        if not 1 <= self.cap <= math.inf:
            raise InputError(
                f"WaterFilling(cap={self.cap!r})", found="below 1", do="give 1, or more to let layers grow"
            )

    def __call__(self, layers: Layers, limits: Mapping[str, float]) -> np.ndarray:
        parts = rests(layers, limits)
        shares = [costs / rest for costs, rest in parts.values()]  # what a whole layer takes of each limit
        if len(shares) > 2:
            raise InputError(f"densities by {', '.join(parts)}", found="three limits", do="give one or two")
        found = self._one(shares[0])
        return spread(found if len(shares) == 1 else self._two(shares[0], shares[1], found), layers)

    def _one(self, costs: np.ndarray) -> np.ndarray:
        """`min(cap, t / c)` with `sum c min(cap, t / c) = 1`."""
        caps = np.full(costs.size, min(self.cap, 1e12))
        levels = 1.0 / np.maximum(costs, 1e-300)
        return filled(costs, levels, caps, 1.0)

    def _two(self, first: np.ndarray, second: np.ndarray, alone: np.ndarray) -> np.ndarray:
        """Both limits: where neither alone keeps the other, the mixture of costs at which both are used up.

        At any mixture `a first + (1 - a) second` the optimum uses all of the mixed limit, so what it takes of the first
        falls as `a` rises.
        """
        if float(second @ alone) <= 1 + 1e-12:
            return alone
        other = self._one(second)
        if float(first @ other) <= 1 + 1e-12:
            return other
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if float(first @ self._one(middle * first + (1 - middle) * second)) > 1:
                low = middle
            else:
                high = middle
        return self._one(high * first + (1 - high) * second)
