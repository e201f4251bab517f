"""Network slimming's one-shot half."""

from dataclasses import dataclass
from typing import final

from niwaki import scores
from niwaki.budgets.global_rank import Normalise
from niwaki.methods.job import Job, Outcome
from niwaki.methods.one_shot import OneShot, one_shot
from niwaki.scores.score import Merge, Score


@final
@dataclass(frozen=True)
class NormScale(OneShot):
    """Remove the channels with the smallest batch-norm scale, at once.

    Source: Liu et al. 2017, arXiv:1708.06519 (the pruning step; the sparsity training before it comes on its own).
    Differs: coupled channels are cut too, by the mean of their scales; groups without batch norm stay whole.
    """

    normalise: Normalise = "none"
    """For global_rank: divide scales by their group's mean, largest or sum; the paper compares them as they are."""
    merge: Merge = "mean"
    """How the scales of coupled channels become one number."""

    def score(self, seed: int) -> Score:
        return scores.NormScale(merge=self.merge)

    def __call__(self, job: Job) -> Outcome:
        return one_shot(job, self)
