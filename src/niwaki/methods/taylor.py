"""First-order Taylor pruning."""

from dataclasses import dataclass
from typing import final

from niwaki import scores
from niwaki.budgets.atoms import Bundle
from niwaki.budgets.global_rank import Normalise
from niwaki.methods.job import Job, Outcome
from niwaki.methods.one_shot import OneShot, one_shot
from niwaki.scores.score import Over, Score
from niwaki.scores.taylor import SignedMerge


@final
@dataclass(frozen=True)
class Taylor(OneShot):
    """Remove the units whose removal changes the loss least, to first order, at once.

    Source: Molchanov et al. 2019, arXiv:1906.10771. Differs: one shot; the paper alternates pruning and training.
    """

    normalise: Normalise = "none"
    """For global_rank: divide scores by their group's mean, largest or sum; the paper compares them as they are, the
    loss being one scale for all."""
    bundle: Bundle = "sum"
    """How the scores of the units of a row (or column of every row) become one; changes of the loss add up."""
    batches: int = 16
    """Batches of training data to average gradients over."""
    over: Over = "in"
    """Which slices count: those that read the unit (in), those that produce it (out), or all."""
    merge: SignedMerge = "signed"
    """How the estimates of coupled slices become one number: size of their sum, or a merge of their sizes."""

    def score(self, seed: int) -> Score:
        return scores.Taylor(over=self.over, merge=self.merge)

    def __call__(self, job: Job) -> Outcome:
        return one_shot(job, self, batches=self.batches)
