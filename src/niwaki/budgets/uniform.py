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
        for pool in range(len(atoms.pools)):
            mine = np.flatnonzero(atoms.pool == pool)
            order = mine[np.lexsort((-mine, atoms.score[mine]))]  # of equal scores the lower index stays
            priority[order] = (np.arange(mine.size) + 1) / mine.size
        return priority
