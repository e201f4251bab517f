"""The same share of every group."""

from dataclasses import dataclass
from typing import final

import numpy as np

from niwaki.budgets.rule import Atoms, Rule


@final
@dataclass(frozen=True)
class Uniform(Rule):
    """Every pool loses the same share, its lowest scores first: priority = rank within the pool / size of the pool.

    The plain baseline of the field; scores of different layers are never compared.
    """

    def __call__(self, atoms: Atoms) -> np.ndarray:
        priority = np.zeros(atoms.score.size)
        ranked = np.lexsort((-np.arange(atoms.score.size), atoms.score, atoms.pool))  # of equal ones the lower stays
        bounds = np.searchsorted(atoms.pool[ranked], np.arange(len(atoms.pools) + 1))
        for pool in range(len(atoms.pools)):
            order = ranked[bounds[pool] : bounds[pool + 1]]
            priority[order] = (np.arange(order.size) + 1) / order.size
        return priority
