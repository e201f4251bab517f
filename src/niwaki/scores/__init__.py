"""Scores: rows of units in, one number per unit out; and scores of single weights. Higher = keep."""

from niwaki.scores.grasp import GraSP
from niwaki.scores.magnitude import Magnitude
from niwaki.scores.norm_scale import NormScale
from niwaki.scores.optimal_brain_surgeon import OptimalBrainSurgeon
from niwaki.scores.random import Random
from niwaki.scores.random_weights import RandomWeights
from niwaki.scores.score import Score, Scores, score
from niwaki.scores.snip import SNIP
from niwaki.scores.synflow import SynFlow
from niwaki.scores.taylor import Taylor
from niwaki.scores.weight_score import Seen, WeightScore, masks, shuffled, unit_scores

__all__ = [
    "SNIP",
    "GraSP",
    "Magnitude",
    "NormScale",
    "OptimalBrainSurgeon",
    "Random",
    "RandomWeights",
    "Score",
    "Scores",
    "Seen",
    "SynFlow",
    "Taylor",
    "WeightScore",
    "masks",
    "score",
    "shuffled",
    "unit_scores",
]
