"""Training: after the cut, or from scratch."""

from niwaki.train.history import History
from niwaki.train.loop import Progress, Trainable
from niwaki.train.recovery import Recovery
from niwaki.train.settings import Checkpoints, Drops, Ema, Mix, Speed, Validation

__all__ = [
    "Checkpoints",
    "Drops",
    "Ema",
    "History",
    "Mix",
    "Progress",
    "Recovery",
    "Speed",
    "Trainable",
    "Validation",
]
