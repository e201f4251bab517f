"""Network slimming's one-shot half."""

from dataclasses import dataclass
from typing import final

from niwaki import scores
from niwaki.methods.job import Job, Method, Outcome
from niwaki.methods.one_shot import Grids, RuleName, one_shot


@final
@dataclass(frozen=True)
class NormScale(Method):
    """Remove the channels with the smallest batch-norm scale, at once.

    Source: Liu et al. 2017, arXiv:1708.06519 (the pruning step; the sparsity training before it comes on its own).
    Differs: coupled channels are cut too, by the mean of their scales; groups without batch norm stay whole.
    """

    rule: RuleName = "global_rank"
    """"global_rank" or "uniform"."""
    normalise: bool = False
    """Divide scales by their group's mean before ranking; the paper compares them as they are."""
    grids: Grids = "rows"
    """Where an axis is a grid: whole rows, or equally many columns of every row."""
    exact_only: bool = False
    """Leave groups whole whose removal changes more than zeroing does."""

    def __call__(self, job: Job) -> Outcome:
        return one_shot(
            job,
            self,
            scores.NormScale(),
            rule=self.rule,
            grids=self.grids,
            exact_only=self.exact_only,
            normalise="mean" if self.normalise else "none",
        )
