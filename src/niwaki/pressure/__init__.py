"""Pressure: what pushes parameters towards sparsity while a network trains, one idea per file."""

from niwaki.pressure.pressure import Moment, Pressure

# isort: split
from niwaki.pressure.local_decay import LocalDecay
from niwaki.pressure.slimming import Slimming

__all__ = ["LocalDecay", "Moment", "Pressure", "Slimming"]
