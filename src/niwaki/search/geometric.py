"""Allowances that shrink or grow from one step to the next, such that all together they allow a given ratio."""

import math
from dataclasses import dataclass
from typing import final

from niwaki.errors import InputError, Setting

HALVINGS = 200
"""Of the bisection: a double has far fewer bits."""


@final
@dataclass(frozen=True, kw_only=True)
class Geometric:
    """The allowed relative rise of each of N steps: `initial_rate * factor**i`, where the product of all
    `1 + allowance` is `initial_thres`.

    Source: Ye et al. 2023, arXiv:2303.11923 (the option `exp`). Differs: the factor is found by bisection on the sum of
    logarithms.

    Raises:
        InputError: no rate above 0, or a total that even the first step alone would pass.

    Examples:
        >>> found = Geometric(initial_rate=0.1, initial_thres=1.155)(2)
        >>> [round(value, 6) for value in found]
        [0.1, 0.05]
    """

    initial_rate: float = 0.05
    """The first allowed relative rise: 0.05 is five percent; above 0."""
    initial_thres: float = 5.0
    """What all steps together may multiply a loss by, above 1 + initial_rate."""
    exp: bool = True
    """Solve for the factor; without it every step is allowed initial_rate, and initial_thres is not asked."""

    def __post_init__(self) -> None:
        rate, total = self.initial_rate, self.initial_thres
        if not 0 < rate < math.inf:
            said = Setting("initial_rate", rate)
            raise InputError((said,), found="no rise above 0", do=("give a share: ", Setting("initial_rate", 0.05)))
        if self.exp and not 1 + rate <= total < math.inf:
            raise InputError(
                (Setting("initial_thres", total), " with ", Setting("initial_rate", rate)),
                found="the first step alone would be allowed more; it is a ratio above 1, not a share",
                do=("give at least ", Setting("initial_thres", 1 + rate)),
            )

    def factor(self, steps: int) -> float:
        """What each allowance is multiplied by to give the next; 1 where they are all alike.

        The product grows with the factor, from `1 + initial_rate` at 0: there is one solution.
        """
        if not self.exp or steps < 2:
            return 1.0
        wanted = math.log(self.initial_thres)

        def total(factor: float) -> float:
            try:
                return math.fsum(math.log1p(self.initial_rate * factor**i) for i in range(steps))
            except OverflowError:
                return math.inf

        low, high = 0.0, 1.0
        while total(high) < wanted:
            low, high = high, 2 * high
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if total(middle) < wanted else (low, middle)
        return (low + high) / 2

    def __call__(self, steps: int) -> list[float]:
        """The allowances of so many steps."""
        factor = self.factor(steps)
        return [self.initial_rate * factor**i for i in range(steps)]
