"""One ranking over the whole network."""

from dataclasses import dataclass
from typing import Literal, final, get_args

import numpy as np

from niwaki.budgets.rule import Atoms, Rule
from niwaki.errors import InputError

Normalise = Literal["none", "mean", "max", "sum"]
Per = Literal["unit", "macs", "params"]


@final
@dataclass(frozen=True)
class GlobalRank(Rule):
    """Lowest scores go first, wherever they are.

    Scores of different groups have different scales; `normalise` brings them together, `per` weighs them by cost.
    """

    normalise: Normalise = "max"
    """Divide a pool's scores by their mean, largest or sum before comparing pools. The largest, by measurement: dead
    units pull the mean of their pool down and so lift its other units; see the card."""
    per: Per = "unit"
    """Compare scores as they are, or per multiply-add or parameter that removing the unit saves."""

    def __post_init__(self) -> None:
        if self.normalise not in get_args(Normalise) or self.per not in get_args(Per):
            raise InputError(
                f"{self!r}", found="normalise: none, mean, max, sum; per: unit, macs, params", do="use one of these"
            )

    def __call__(self, atoms: Atoms) -> np.ndarray:
        score = atoms.score.copy()
        if self.normalise != "none":
            scale = np.zeros(len(atoms.pools))
            if self.normalise == "max":
                np.maximum.at(scale, atoms.pool, np.abs(score))
            else:
                np.add.at(scale, atoms.pool, np.abs(score))
                if self.normalise == "mean":
                    scale /= np.bincount(atoms.pool, minlength=scale.size)
            score = score / np.where(scale > 0, scale, 1.0)[atoms.pool]
        if self.per != "unit":
            saved = atoms.saves[self.per]
            score = score / np.maximum(saved / max(saved.mean(), 1e-300), 1e-12)
        return score
