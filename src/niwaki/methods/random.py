"""Random pruning: the baseline."""

from dataclasses import dataclass
from typing import final

from niwaki import scores
from niwaki.methods.job import Job, Method, Outcome
from niwaki.methods.one_shot import Grids, RuleName, one_shot


@final
@dataclass(frozen=True)
class Random(Method):
    """Remove units at random: the baseline that every method must beat."""

    rule: RuleName = "uniform"
    """"uniform" (the same share of every group) or "global_rank"."""
    grids: Grids = "rows"
    """Where an axis is a grid: whole rows, or equally many columns of every row."""
    exact_only: bool = False
    """Leave groups whole whose removal changes more than zeroing does."""

    def __call__(self, job: Job) -> Outcome:
        return one_shot(
            job, self, scores.Random(seed=job.seed), rule=self.rule, grids=self.grids, exact_only=self.exact_only
        )
