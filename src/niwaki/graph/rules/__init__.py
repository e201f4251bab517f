"""The kinds of calls: one file per kind, none of which names a layer class or an architecture."""

from niwaki.graph.rules import (
    attention,
    contraction,
    convolution,
    factory,
    indexing,
    movement,
    normalisation,
    pointwise,
    reduction,
    spatial,
)
from niwaki.graph.rules.registry import RULES, Call, Rule

__all__ = ["RULES", "Call", "Rule"]

_ = (attention, contraction, convolution, factory, indexing, movement, normalisation, pointwise, reduction, spatial)
