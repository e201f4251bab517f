"""Sensitivity of the loss to a weight's presence, before training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.scores.weight_score import Seen, WeightScore


@final
@dataclass(frozen=True)
class SNIP(WeightScore):
    """|w dL/dw|: how the loss changes at first order when a weight is scaled down; signs are lost.

    Source: Lee et al. 2019, arXiv:1810.02340, sec. 4. Batch norm takes the batch's statistics: a fresh network has no
    others.
    """

    needs_data: ClassVar[bool] = True
    rounds: int = 1
    """How often weights are scored anew while they go; the paper's is 1."""

    def __post_init__(self) -> None:
        if type(self.rounds) is not int or self.rounds < 1:
            raise InputError(f"SNIP(rounds={self.rounds!r})", found="no count", do="give 1 or more")

    def __call__(self, model: nn.Module, names: Sequence[str], seen: Seen) -> dict[str, Tensor]:
        batches, loss = seen.need_data(self)
        model.train()
        named = dict(model.named_parameters())
        wanted = [named[name].requires_grad_() for name in names]
        sums = [torch.zeros_like(parameter) for parameter in wanted]
        for batch in batches:
            with torch.enable_grad():
                found = torch.autograd.grad(loss(model, batch), wanted, allow_unused=True)
            sums = [total if part is None else total + part for total, part in zip(sums, found, strict=True)]
        numbers = [(total * parameter).detach().abs() for total, parameter in zip(sums, wanted, strict=True)]
        return dict(zip(names, numbers, strict=True))
