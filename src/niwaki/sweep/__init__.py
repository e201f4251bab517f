"""Sweeps: many runs of `niwaki compress` on Ray, on one machine or many, and the best trade-offs among them."""

from niwaki.sweep.engine import sweep
from niwaki.sweep.front import Candidate, candidates, front, pareto
from niwaki.sweep.pool import Workers
from niwaki.sweep.results import is_sweep, read_rows
from niwaki.sweep.timing import Timing
from niwaki.sweep.trials import Trial, grid
from niwaki.verbs import callable_module

__all__ = [
    "Candidate",
    "Timing",
    "Trial",
    "Workers",
    "candidates",
    "front",
    "grid",
    "is_sweep",
    "pareto",
    "read_rows",
    "sweep",
]
callable_module(__name__)
