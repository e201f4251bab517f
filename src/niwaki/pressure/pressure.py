"""What a pressure is, when it is asked, and which parameters it finds by itself."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, UnknownNameError


@final
@dataclass(frozen=True)
class Moment:
    """When in a training a step is; all from 0."""

    epoch: int
    epochs: int
    """How many there will be."""
    step: int
    """Of the optimiser."""
    steps: int
    """How many there will be."""


class Pressure(ABC):
    """Adds the gradient of a penalty to the gradients of a loss; the training asks it once in every step.

    It is asked after gradients were unscaled, averaged over accumulated batches and processes, and clipped, right
    before the optimiser's step: its strength is what its settings say, whatever these do.
    """

    @abstractmethod
    def memory(self, model: nn.Module) -> dict[str, Tensor]:
        """What it remembers from step to step, as it is before the first; none for most. The training keeps it, and
        writes it into its checkpoints.

        Raises:
            InputError: the model has nothing to press.
        """

    @abstractmethod
    def __call__(self, model: nn.Module, memory: dict[str, Tensor], at: Moment) -> None:
        """Add to `.grad` of what it presses, in place; change `memory` in place, by the same names."""


def scales_of(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The norm scales of these names, all of them trained; without names those of every batch norm that are.

    Raises:
        UnknownNameError: no parameter of that name.
        InputError: there is none, or one that is not trained or no vector.
    """
    named = dict(model.named_parameters())
    if names is None:
        norms = [path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        paths = [f"{path}.weight" if path else "weight" for path in norms]
        found = {path: named[path] for path in paths if path in named and named[path].requires_grad}
        if found:
            return found
        raise InputError(
            f"press the norm scales of {type(model).__name__}",
            found="batch norms without a trained scale" if norms else "no batch norm",
            do="give a network with batch norm that is not folded into its convolutions, or train without pressure",
        )
    if not names:
        raise InputError("press no norm scales", found="an empty list", do="name some, or None for every batch norm's")
    for name in names:
        if name not in named:
            raise UnknownNameError.of("parameter to press", name, list(named))
        if named[name].dim() != 1 or not named[name].requires_grad:
            why = "it is not trained" if named[name].dim() == 1 else f"shape {tuple(named[name].shape)}"
            raise InputError(f"press {name}", found=why, do="name scales of batch norms that want gradients")
    return {name: named[name] for name in names}


def need_rate(block: Any) -> None:
    """Refuse a rate that is not above 0.

    Raises:
        InputError: it is not.
    """
    if type(block.rate) not in (int, float) or not 0 < block.rate < math.inf:
        raise InputError(f"{type(block).__name__}(rate={block.rate!r})", do="give a rate above 0, such as 1e-4")


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie in shards over processes; each of them must ask."""
    full: Any = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).detach()
