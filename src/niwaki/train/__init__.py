"""Training after the cut."""

from niwaki.train.recovery import History, Progress, Recovery

__all__ = ["History", "Progress", "Recovery"]
