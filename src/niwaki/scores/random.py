"""Random numbers: the baseline every score must beat."""

import zlib
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from niwaki.evidence import GroupView, Need
from niwaki.scores.score import Score


@final
@dataclass(frozen=True)
class Random(Score):
    """Uniform random numbers, the same for the same seed and group name. A baseline, not a method."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    deterministic: ClassVar[bool] = False
    seed: int = 0
    """Seed; the same one gives the same numbers."""

    def __call__(self, view: GroupView) -> Float[Tensor, " units"]:
        generator = torch.Generator().manual_seed(
            (self.seed * 1_000_003 + zlib.crc32(view.group.name.encode())) % (1 << 62)
        )
        return torch.rand(view.group.units, generator=generator, dtype=torch.float64)
