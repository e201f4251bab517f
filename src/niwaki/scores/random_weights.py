"""Random numbers for single weights: the baseline of scores before training."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from niwaki.scores.weight_score import Seen, WeightScore


@final
@dataclass(frozen=True)
class RandomWeights(WeightScore):
    """Uniform random numbers, the same for the same seed and parameter name: about equal densities everywhere."""

    rounds: ClassVar[int] = 1  # type: ignore[misc]
    seed: int = 0
    """Seed; the same one gives the same numbers."""

    def __call__(self, model: nn.Module, names: Sequence[str], seen: Seen) -> dict[str, Tensor]:
        named, found = dict(model.named_parameters()), {}
        for name in names:
            code = (self.seed * 1_000_003 + zlib.crc32(name.encode())) % (1 << 62)
            generator = torch.Generator().manual_seed(code)
            found[name] = torch.rand(named[name].shape, generator=generator, dtype=torch.float64)
        return found
