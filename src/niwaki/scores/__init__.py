"""Scores: rows of units in, one number per unit out. Higher = keep."""

from niwaki.scores.magnitude import Magnitude
from niwaki.scores.norm_scale import NormScale
from niwaki.scores.random import Random
from niwaki.scores.score import Score, Scores, score
from niwaki.scores.taylor import Taylor

__all__ = ["Magnitude", "NormScale", "Random", "Score", "Scores", "Taylor", "score"]
