"""The kinds of calls: one file per kind, none of which names a layer class or an architecture."""

import torch

from niwaki.graph.rules import (
    attention,
    contraction,
    convolution,
    factory,
    indexing,
    movement,
    normalisation,
    parts,
    pointwise,
    reduction,
    spatial,
    triangles,
    windows,
)
from niwaki.graph.rules.registry import RULES, Call, Rule

__all__ = ["MOVEMENT", "RULES", "Call", "Rule"]

MOVEMENT = tuple(module.__name__ for module in (movement, parts, windows))
"""Where the rules of data movement lie."""

_ = (attention, contraction, convolution, factory, indexing, normalisation, pointwise, reduction, spatial, triangles)

for _name in list(RULES):  # an in-place variant takes the rule of the operator it is a variant of
    if hasattr(torch.ops.aten, f"{_name}_"):
        RULES.setdefault(f"{_name}_", RULES[_name])
