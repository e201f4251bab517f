"""Scale of the batch normalisation."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from niwaki.evidence import GroupView
from niwaki.scores.score import MERGES, Merge, Score, known, merged


@final
@dataclass(frozen=True)
class NormScale(Score):
    """|gamma| of the normalisation that scales a unit: a channel scaled by almost nothing is almost not there.

    Groups without a normalisation that has a scale give an empty result and are left whole.

    Source: Liu et al. 2017, arXiv:1708.06519, sec. 3 (network slimming).
    Differs: several coupled scales are merged; the paper leaves out coupled channels.
    """

    merge: Merge = "mean"
    """How the scales of coupled channels become one number."""

    def __post_init__(self) -> None:
        known(self, merge=MERGES)

    def __call__(self, view: GroupView) -> Float[Tensor, " units"]:
        places = [i for i, role in enumerate(view.roles) if role == "scale"]
        scales = [view.weights[i].double().abs().amax(1) for i in places]
        return merged(scales, self.merge, 2) if scales else torch.zeros(0, dtype=torch.float64)
