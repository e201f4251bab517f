"""Magnitude pruning."""

from dataclasses import dataclass
from typing import Literal, final

from niwaki import scores
from niwaki.methods.job import Job, Method, Outcome
from niwaki.methods.one_shot import Grids, RuleName, one_shot


@final
@dataclass(frozen=True)
class Magnitude(Method):
    """Remove the units with the smallest weights, at once.

    Source: Li et al. 2017, arXiv:1608.08710. Differs: coupled slices are judged together.
    """

    p: float = 2
    """Order of the norm, 1 or 2."""
    over: Literal["all", "out", "in"] = "all"
    """Which slices of a unit count."""
    rule: RuleName = "global_rank"
    """"global_rank" (one ranking, scores divided by their group's largest) or "uniform" (one share for all groups)."""
    grids: Grids = "rows"
    """Where an axis is a grid: whole rows (heads, groups) or equally many columns of every row."""
    exact_only: bool = False
    """Leave groups whole whose removal changes more than zeroing does."""

    def __call__(self, job: Job) -> Outcome:
        return one_shot(
            job,
            self,
            scores.Magnitude(p=self.p, over=self.over),
            rule=self.rule,
            grids=self.grids,
            exact_only=self.exact_only,
        )
