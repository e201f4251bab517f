"""Random pruning: the baseline."""

from dataclasses import dataclass
from typing import final

from niwaki import scores
from niwaki.methods.job import Job, Outcome
from niwaki.methods.one_shot import OneShot, RuleName, one_shot
from niwaki.scores.score import Score


@final
@dataclass(frozen=True)
class Random(OneShot):
    """Remove units at random: the baseline that every method must beat."""

    rule: RuleName = "uniform"
    """"uniform" (the same share of every group) or "global_rank" (one ranking over the network)."""

    def score(self, seed: int) -> Score:
        return scores.Random(seed=seed)

    def __call__(self, job: Job) -> Outcome:
        return one_shot(job, self)
