"""Pools go towards given shares together."""

from dataclasses import dataclass
from typing import final

import numpy as np

from niwaki.budgets.rule import Atoms, Rule
from niwaki.errors import InputError


@final
@dataclass(frozen=True)
class TargetWidths(Rule):
    """All pools shrink towards given shares at one pace, the last of each going first; scores are not looked at.

    Pool of N atoms and share q: at pace s it keeps round(s q N). Atom i (from 0) goes where s q N falls below i + 1/2,
    so the budget that `choose` meets is met by the largest pace, and what still fits comes back.
    """

    shares: tuple[float, ...] = ()
    """Share of every pool, in the order of the graph's groups; none means the same for all."""

    def __call__(self, atoms: Atoms) -> np.ndarray:
        shares = np.array(self.shares or (1.0,) * len(atoms.pools), dtype=np.float64)
        if shares.size != len(atoms.pools) or not bool((shares > 0).all()):
            raise InputError(
                f"TargetWidths of {shares.size} shares",
                found=f"{len(atoms.pools)} pools, each with a share above 0",
                do="make the shares from the same graph and settings",
            )
        sizes = np.bincount(atoms.pool, minlength=shares.size)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        place = np.arange(atoms.pool.size) - starts[atoms.pool]
        return np.asarray(-(place + 0.5) / (shares * sizes)[atoms.pool])
