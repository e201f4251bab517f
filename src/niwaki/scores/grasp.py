"""What a weight does for the size of the gradient, before training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.scores.weight_score import Seen, WeightScore
from niwaki.units import map_tensors


@final
class Cooled(nn.Module):
    """A network whose outputs are divided by a temperature."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return map_tensors(self.model(*args, **kwargs), lambda tensor: tensor / self.temperature)


@final
@dataclass(frozen=True)
class GraSP(WeightScore):
    """w (H g): what the gradient's size loses at first order when a weight goes; what would enlarge it goes first.

    Source: Wang et al. 2020, arXiv:2002.07376, eq. 8 and alg. 1 (their score is its negative, and the highest go).
    Batch norm takes the batch's statistics.
    """

    needs_data: ClassVar[bool] = True
    rounds: int = 1
    """How often weights are scored anew while they go; the paper's is 1."""
    temperature: float = 200.0
    """What outputs are divided by, so that a fresh network's answers are even."""

    def __post_init__(self) -> None:
        if type(self.rounds) is not int or self.rounds < 1 or not self.temperature > 0:
            raise InputError(f"{self!r}", found="no count or no temperature", do="give rounds from 1, temperature > 0")

    def __call__(self, model: nn.Module, names: Sequence[str], seen: Seen) -> dict[str, Tensor]:
        batches, loss = seen.need_data(self)
        model.train()
        cooled = Cooled(model, self.temperature)
        named = dict(model.named_parameters())
        wanted = [named[name].requires_grad_() for name in names]
        mean = [torch.zeros_like(parameter) for parameter in wanted]
        for batch in batches:
            with torch.enable_grad():
                found = torch.autograd.grad(loss(cooled, batch), wanted, allow_unused=True)
            mean = [total if part is None else total + part for total, part in zip(mean, found, strict=True)]
        product = [torch.zeros_like(parameter) for parameter in wanted]  # H g
        for batch in batches:
            with torch.enable_grad():
                found = torch.autograd.grad(loss(cooled, batch), wanted, create_graph=True, allow_unused=True)
                size = sum((part * g).sum() for part, g in zip(found, mean, strict=True) if part is not None)
                if not isinstance(size, Tensor) or not size.requires_grad:
                    continue  # a loss that is a line: no curvature
                second = torch.autograd.grad(size, wanted, allow_unused=True)
            product = [total if part is None else total + part for total, part in zip(product, second, strict=True)]
        return {
            name: (parameter * total).detach() for name, parameter, total in zip(names, wanted, product, strict=True)
        }
