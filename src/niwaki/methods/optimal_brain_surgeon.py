"""Second-order pruning of whole units."""

from dataclasses import dataclass
from typing import final

from niwaki import scores
from niwaki.budgets.atoms import Bundle
from niwaki.budgets.global_rank import Normalise, Per
from niwaki.errors import InputError, Setting
from niwaki.methods.job import Job, Outcome
from niwaki.methods.one_shot import OneShot, one_shot
from niwaki.scores.score import Score


@final
@dataclass(frozen=True)
class OptimalBrainSurgeon(OneShot):
    """Remove the units whose removal raises the loss least for what it saves, once those that stay have made up for it.

    Source: Hassibi and Stork 1993; of whole structures Kurtic et al. 2023, arXiv:2302.04089 (ZipLM). Differs: one shot
    from one pass; curvature in two factors a layer; widths by one ranking, where ZipLM searches them by their times.
    """

    normalise: Normalise = "none"
    """For global_rank: divide scores by their group's mean, largest or sum; costs are rises of one loss as they are."""
    per: Per = "macs"
    """For global_rank: compare costs as they are, or per multiply-add or parameter that removing the unit saves."""
    bundle: Bundle = "sum"
    """How the scores of the units of a row (or column of every row) become one; rises of the loss add up."""
    refit: bool = True
    """Refit what the next layers read, by least squares over the calibration batches: what the costs reckon with."""
    batches: int = 16
    """Batches of training data to take curvature over."""
    ridge: float = 1e-2
    """How much the weights that stay are held where they are, as a share of their inputs' mean variance."""
    rounds: int = 64
    """How often the costs of a group are taken anew at most; wider groups lose several units at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks != "keep":
            raise InputError(
                ("OptimalBrainSurgeon with ", Setting("blocks", self.blocks)),
                found="its score can't judge whole blocks",
                do=("leave ", Setting("blocks"), " out, or use Taylor"),
            )

    def score(self, seed: int) -> Score:
        return scores.OptimalBrainSurgeon(ridge=self.ridge, rounds=self.rounds)

    def __call__(self, job: Job) -> Outcome:
        return one_shot(job, self, batches=self.batches)
