"""Synaptic flow: what a weight passes on of ones, without data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.scores.weight_score import Seen, WeightScore
from niwaki.units import map_tensors, run, tensors_in


@final
@dataclass(frozen=True)
class SynFlow(WeightScore):
    """|w dR/dw|, where R sums the outputs for an input of ones when every parameter is its absolute value.

    Source: Tanaka et al. 2020, arXiv:2006.05467, sec. 6. Differs: computed in double precision; deep networks leave the
    range of floats.
    """

    rounds: int = 100
    """How often weights are scored anew while they go; with 1 whole layers vanish."""

    def __post_init__(self) -> None:
        if type(self.rounds) is not int or self.rounds < 1:
            raise InputError(f"SynFlow(rounds={self.rounds!r})", found="no count", do="give 1 or more, e.g. 100")

    def __call__(self, model: nn.Module, names: Sequence[str], seen: Seen) -> dict[str, Tensor]:
        named = dict(model.named_parameters())
        total = flow(model, seen.example)
        gradients = torch.autograd.grad(total, [named[name] for name in names], allow_unused=True)
        return {
            name: torch.zeros_like(named[name]) if gradient is None else (gradient * named[name]).detach().abs()
            for name, gradient in zip(names, gradients, strict=True)
        }


def flow(model: nn.Module, example: Any) -> Tensor:
    """R: the sum of all outputs for ones, with every parameter and buffer at its absolute value (`model` is changed).

    Raises:
        InputError: the input is of whole numbers, which can't be ones in place of pictures.
    """
    model.double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.abs_()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if any(not tensor.is_floating_point() for tensor in tensors_in(example)):
        raise InputError(
            "synaptic flow", found="inputs of whole numbers", do="use snip or grasp, which look at batches"
        )
    ones = map_tensors(example, lambda tensor: torch.ones(tensor.shape, dtype=torch.float64, device=tensor.device))
    with torch.enable_grad():
        return torch.stack([tensor.sum() for tensor in tensors_in(run(model, ones))]).sum()
