"""What a rule sees and says: atoms in pools, and the order in which they go."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy.sparse import csr_matrix


@final
@dataclass(frozen=True, eq=False)
class Atoms:
    """The smallest things that can be removed: a channel, a whole head, one channel of every head.

    Atoms of one pool are alternatives to each other (the channels of a group, the heads of an attention).
    """

    units: tuple[np.ndarray, ...]
    """Units of each atom, in the graph's count."""
    score: np.ndarray
    """Higher = keep; float64 `[atoms]`."""
    pool: np.ndarray
    """Pool of each atom; int64 `[atoms]`, from 0 without gaps."""
    width: np.ndarray
    """Positions of the group's axis one atom stands for (head size for a head); int64 `[atoms]`."""
    saves: dict[str, np.ndarray]
    """What removing each atom alone saves: "macs", "params", "units"; float64 `[atoms]`."""
    least: np.ndarray
    """Atoms that every pool keeps at least; int64 `[pools]`. Two columns of a grid: one would no longer be an axis."""
    pools: tuple[str, ...]
    """Names of the pools (their first group)."""
    takes: csr_matrix | None = None
    """How many units of each group an atom takes; `[atoms, groups]`."""
    sizes: np.ndarray | None = None
    """Units of each group; int64 `[groups]`."""


class Rule(ABC):
    """Orders atoms: the lowest priority goes first."""

    @abstractmethod
    def __call__(self, atoms: Atoms) -> np.ndarray:
        """Priority of each atom; float64 `[atoms]`. Ties go by index, the lower index staying."""
