"""Magnitude pruning."""

from dataclasses import dataclass
from typing import final

from niwaki import scores
from niwaki.methods.job import Job, Outcome
from niwaki.methods.one_shot import OneShot, one_shot
from niwaki.scores.score import Merge, Over, Score


@final
@dataclass(frozen=True)
class Magnitude(OneShot):
    """Remove the units with the smallest weights, at once.

    Source: Li et al. 2017, arXiv:1608.08710. Differs: coupled slices are judged together.
    """

    p: float = 2
    """Order of the norm, 1 or 2."""
    over: Over = "all"
    """Which slices of a unit count: all, those that produce it (out), or those that read it (in)."""
    merge: Merge = "joint"
    """How the norms of coupled slices become one number; joint is the norm of all laid end to end."""

    def score(self, seed: int) -> Score:
        return scores.Magnitude(p=self.p, over=self.over, merge=self.merge)

    def __call__(self, job: Job) -> Outcome:
        return one_shot(job, self)
