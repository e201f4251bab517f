"""Shares of channels of the largest product of densities, found at once for all layers."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy.optimize import minimize

from niwaki.budgets.pools import Pools, to_limits

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class WidthProgram:
    """Maximise the sum of the layers' log densities over the shares of pools, under the true costs of the cut network.

    A geometric program: with `x = log share` the objective is a line and the log of every cost is convex, so there is
    one best value. What lies in one stream has one variable; batch norms and biases count as they cost.

    Source: derived; the program of Cai et al., arXiv:2203.02549 (v2), asks for densities that crops can't have.
    """

    steps: int = 500
    """Most steps of the solver (sequential quadratic programs)."""

    def __call__(
        self, pools: Pools, limits: Mapping[str, float], *, least: np.ndarray, most: np.ndarray | None = None
    ) -> np.ndarray:
        """Share of every pool; float64 `[pools]`.

        Args:
            limits: cost -> the most that the network may cost.
            least: share of every pool that has to stay, above 0; where even that costs too much, it is the result.
            most: the largest share of every pool, above 1 where it may grow; none means 1 for all.
        """
        free = pools.layers.may()
        worth = pools.slopes[free].sum(0)
        worth = np.maximum(worth, 1e-3)  # what no layer tells of (a scale alone) is worth keeping, but little
        most = np.ones(least.size) if most is None else most
        wanted = dict(limits)
        if all(pools.costs[name](most) <= limit for name, limit in wanted.items()):
            return most.copy()
        if any(pools.costs[name](least) > limit for name, limit in wanted.items()):
            return least.copy()
        start = np.maximum(to_limits(pools, np.ones(least.size), wanted, most), least)

        def room(x: np.ndarray) -> np.ndarray:
            shares = np.exp(x)
            return np.array([np.log(limit) - np.log(pools.costs[name](shares)) for name, limit in wanted.items()])

        def slopes(x: np.ndarray) -> np.ndarray:
            shares = np.exp(x)
            return np.stack([-pools.costs[n].gradient(shares) * shares / pools.costs[n](shares) for n in wanted])

        scale = 1.0 / float(worth.sum())
        found = minimize(
            lambda x: -scale * float(worth @ x),
            np.log(start),
            jac=lambda x: -scale * worth,
            bounds=list(zip(np.log(least), np.log(most), strict=True)),
            constraints=[{"type": "ineq", "fun": room, "jac": slopes}],
            method="SLSQP",
            options={"maxiter": self.steps, "ftol": 1e-12},
        )
        shares = np.clip(np.exp(found.x), least, most)
        if not found.success or not np.isfinite(shares).all():
            log.warning("the width program stopped early (%s): its shares may not be the best", found.message)
        return shares if np.isfinite(shares).all() else start
