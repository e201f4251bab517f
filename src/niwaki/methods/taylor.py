"""First-order Taylor pruning."""

from dataclasses import dataclass
from typing import final

from niwaki import scores
from niwaki.methods.job import Job, Method, Outcome
from niwaki.methods.one_shot import Grids, RuleName, one_shot


@final
@dataclass(frozen=True)
class Taylor(Method):
    """Remove the units whose removal changes the loss least, to first order, at once.

    Source: Molchanov et al. 2019, arXiv:1906.10771. Differs: one shot; the paper alternates pruning and training.
    """

    batches: int = 16
    """Batches of training data to average gradients over."""
    rule: RuleName = "global_rank"
    """"global_rank" or "uniform"."""
    normalise: bool = False
    """Divide scores by their group's mean; the paper compares them as they are, the loss being one scale for all."""
    grids: Grids = "rows"
    """Where an axis is a grid: whole rows, or equally many columns of every row."""
    exact_only: bool = False
    """Leave groups whole whose removal changes more than zeroing does."""

    def __call__(self, job: Job) -> Outcome:
        return one_shot(
            job,
            self,
            scores.Taylor(),
            rule=self.rule,
            grids=self.grids,
            exact_only=self.exact_only,
            normalise="mean" if self.normalise else "none",
            batches=self.batches,
            bundle="sum",
        )
