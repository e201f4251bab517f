"""The same density for all layers: the baseline of densities."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from niwaki.budgets.density import Density, Layers, rests, spread


@final
@dataclass(frozen=True)
class EqualDensity(Density):
    """Every layer keeps the same share of its weights, the largest that all limits allow."""

    def __call__(self, layers: Layers, limits: Mapping[str, float]) -> np.ndarray:
        parts = rests(layers, limits).values()
        share = min(1.0, *(rest / max(float(costs.sum()), 1e-300) for costs, rest in parts))
        return spread(np.full(int(layers.may().sum()), share), layers)
