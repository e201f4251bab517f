"""Densities by the number of channels, and not of weights: Erdos-Renyi kernels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from niwaki.budgets.density import Density, Layers, filled, rests, spread
from niwaki.errors import InputError


@final
@dataclass(frozen=True)
class ERK(Density):
    """Density in proportion to (c_in + c_out + kh + kw) / (c_in c_out kh kw), at most 1: small layers stay denser.

    Source: Evci et al. 2020, arXiv:1911.11134, sec. 3 (after Mocanu et al. 2018, arXiv:1707.04780).
    """

    def __call__(self, layers: Layers, limits: Mapping[str, float]) -> np.ndarray:
        if len(layers.shapes) != layers.count:
            raise InputError("ERK densities", found="layers without shapes", do="give Layers(shapes=...)")
        free = layers.may()
        shapes = [shape for shape, may in zip(layers.shapes, free, strict=True) if may]
        levels = np.array([sum(shape) / np.prod(shape, dtype=np.float64) for shape in shapes])
        caps = np.ones(levels.size)
        found = [filled(costs, levels, caps, rest) for costs, rest in rests(layers, limits).values()]
        return spread(np.minimum.reduce(found), layers)
