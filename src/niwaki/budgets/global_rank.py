"""One ranking over the whole network."""

from dataclasses import dataclass
from typing import Literal, final, get_args

import numpy as np

from niwaki.budgets.rule import Atoms, Rule
from niwaki.errors import InputError

Normalise = Literal["none", "mean", "max", "sum", "lamp", "rest"]
Per = Literal["unit", "macs", "params"]
TIE = 1e-12
"""By how much units differ that go one right behind the other."""


@final
@dataclass(frozen=True)
class GlobalRank(Rule):
    """Lowest scores go first, wherever they are.

    Scores of different groups have different scales; `normalise` brings them together, `per` weighs them by cost.
    """

    normalise: Normalise = "max"
    """Divide a pool's scores by their mean, largest or sum before comparing pools. The largest, by measurement: dead
    units pull the mean of their pool down and so lift its other units; see the card. Or take the square of a score as
    a share of the squares not below it (lamp): a pool's best unit counts 1 and goes last, however wide it is. Or by
    the mean of those squares (rest): what removing the least unit of all comes to, again and again, where each pool's
    squares are divided by the mean of what is left of it."""
    per: Per = "unit"
    """Compare scores as they are, or per multiply-add or parameter that removing the unit saves."""

    def __post_init__(self) -> None:
        if self.normalise not in get_args(Normalise) or self.per not in get_args(Per):
            known = f"normalise: {', '.join(get_args(Normalise))}; per: {', '.join(get_args(Per))}"
            raise InputError(f"{self!r}", found=known, do="use one of these")

    def __call__(self, atoms: Atoms) -> np.ndarray:
        score = atoms.score.copy()
        if self.normalise in ("lamp", "rest"):
            score = _of_those_above(score, atoms.pool, mean=self.normalise == "rest")
        elif self.normalise != "none":
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


def _of_those_above(score: np.ndarray, pool: np.ndarray, *, mean: bool) -> np.ndarray:
    """Squares as shares of the sum (or mean) of their pool's squares that are not below; of equal ones the first is the
    highest. A share of the mean may fall from one unit to the next higher one, which then goes right behind the lower.

    Source: Lee et al. 2021, arXiv:2010.07611 (LAMP), eq. 4, of units where the paper has weights. The mean: Fang et
    al. 2023, arXiv:2301.12900 (DepGraph), sec. 3.3, normalised anew after each unit.
    """
    largest = np.zeros(pool.max(initial=-1) + 1)
    np.maximum.at(largest, pool, np.abs(score))
    square = (score / np.where(largest > 0, largest, 1.0)[pool]) ** 2  # shares don't change, and sums are of one size
    order = np.lexsort((-square, pool))  # pool after pool, each from its highest
    sums = np.cumsum(square[order])
    first = np.searchsorted(pool[order], pool[order])
    sums -= np.where(first > 0, sums[first - 1], 0.0)
    shares = square[order] / np.where(sums > 0, sums, 1.0)
    if mean:
        place = np.arange(order.size) - first  # within the pool, from its highest
        shares *= place + 1
        apart = 2.0 * pool[order][::-1].max(initial=0) - 2.0 * pool[order][::-1]  # no share is above 1
        shares = (np.maximum.accumulate(shares[::-1] + apart) - apart)[::-1]
        shares -= TIE * place
    found = np.empty_like(square)
    found[order] = shares
    return found
