"""From densities of layers to shares of channels, by closed rules."""

from dataclasses import dataclass
from typing import Literal, final, get_args

import numpy as np

from niwaki.budgets.pools import Pools
from niwaki.errors import InputError

Closed = Literal["square_root", "neighbours", "log_fit"]


@final
@dataclass(frozen=True)
class DensityWidths:
    """Shares of channels whose products come near given densities, before they are scaled to a budget.

    Source: Cai et al., arXiv:2203.02549, whose own rule is not known: square_root is what is remembered of it, the
    others are ours.

    Raises:
        InputError: an unknown rule.
    """

    rule: Closed = "neighbours"
    """square_root: that of the producing layer's density; neighbours: of producing and reading layers alike; log_fit:
    least squares over all layers."""
    one_sided: bool = False
    """Layers count the widths that are free, and not all they have: where streams stay whole, a block's layers have
    one each."""

    def __post_init__(self) -> None:
        if self.rule not in get_args(Closed):
            raise InputError(
                f"DensityWidths(rule={self.rule!r})", found=f"known: {', '.join(get_args(Closed))}", do="use one"
            )

    def __call__(self, pools: Pools, densities: np.ndarray) -> np.ndarray:
        """Share of every pool, in (0, ...); float64 `[pools]`. A pool that no layer tells of keeps all.

        Args:
            densities: of the pools' layers, above 0; float64 `[layers]`.
        """
        told = np.log(np.maximum(densities, 1e-12))
        if self.rule == "log_fit":
            free = pools.layers.may()
            return np.asarray(np.exp(np.linalg.lstsq(pools.slopes[free], told[free], rcond=None)[0]))
        axes = pools.slopes.sum(1) if self.one_sided else pools.axes
        each = told / np.maximum(axes, 1)
        made = _mean(pools.out, each, pools.layers.costs["params"])
        if self.rule == "square_root":
            read = made
        else:
            read = _mean(pools.into, each, pools.layers.costs["params"])
        made, read = np.where(np.isnan(made), read, made), np.where(np.isnan(read), made, read)
        return np.asarray(np.exp(np.nan_to_num((made + read) / 2)))


def _mean(side: np.ndarray, values: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """For each pool the mean over its layers of one side, by their costs; NaN where it has none."""
    weights = side * np.maximum(costs, 1.0)[:, None]  # [layers, pools]
    with np.errstate(invalid="ignore"):
        return np.asarray((values @ weights) / weights.sum(0))
