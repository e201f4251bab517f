"""Scores of single weights, for pruning before training, and the masks that they make round by round."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from niwaki.errors import InputError, NotFiniteError
from niwaki.evidence.evidence import rows
from niwaki.graph import ChannelGraph
from niwaki.graph.skeleton import copy_with, like
from niwaki.scores.score import Scores, describe


@final
@dataclass(frozen=True, eq=False)
class Seen:
    """What a score of weights may look at beside the network."""

    example: Any
    """An input; of some scores only its shape counts."""
    batches: Sequence[Any] = ()
    """Batches of the task, for scores that need data."""
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    """The loss of the network on a batch."""

    def need_data(self, how: "WeightScore") -> tuple[Sequence[Any], Callable[[nn.Module, Any], Tensor]]:
        """Batches and loss.

        Raises:
            InputError: there are none.
        """
        if not self.batches or self.loss is None:
            raise InputError(
                f"score weights by {type(how).__name__}", found="no data", do="give batches and a loss (--data)"
            )
        return self.batches, self.loss


class WeightScore(ABC):
    """One number per single weight; higher = keep."""

    needs_data: ClassVar[bool] = False
    rounds: int
    """How often weights are scored anew while they go."""

    @abstractmethod
    def __call__(self, model: nn.Module, names: Sequence[str], seen: Seen) -> dict[str, Tensor]:
        """Scores of the parameters of these names, in their shapes; `model` is a copy that may be written to."""


def masks(model: nn.Module, names: Iterable[str], density: float, *, how: WeightScore, seen: Seen) -> dict[str, Tensor]:
    """Which single weights stay, as booleans: this share of all of them, ranked over the whole network.

    In round e of E (from 0) the share density^((e + 1) / E) stays, and what is gone is zero when the next is scored.
    `model` itself is left alone. Ties go by index, the lower index staying.

    Source: Tanaka et al. 2020, arXiv:2006.05467, alg. 1.

    Raises:
        InputError: a density outside (0, 1], no such parameter, or a score that needs data without any.
        NotFiniteError: a score is NaN or infinite.
    """
    if not 0 < density <= 1:
        raise InputError(f"masks of density {density!r}", found="no share", do="give a number in (0, 1]")
    named, listed = dict(model.named_parameters()), list(names)
    if odd := [name for name in listed if name not in named]:
        raise InputError(f"masks of {odd[0]}", found="no such parameter", do="pass names of the model's parameters")
    if not listed:
        return {}
    kept = {name: torch.ones(named[name].shape, dtype=torch.bool, device="cpu") for name in listed}
    total = sum(mask.numel() for mask in kept.values())
    for round_ in range(how.rounds):
        work = copy_with(model, lambda tensor: like(tensor, tensor.detach().clone()))
        parameters = dict(work.named_parameters())
        with torch.no_grad():
            for name, mask in kept.items():
                parameters[name].mul_(mask.to(parameters[name].device))
        found = how(work, listed, seen)
        numbers = torch.cat([found[name].detach().to("cpu", torch.float64).flatten() for name in listed])
        alive = torch.cat([kept[name].flatten() for name in listed])
        if not bool(torch.isfinite(numbers[alive]).all()):
            raise NotFiniteError(
                f"score weights by {type(how).__name__}", found="NaN or infinity", do="check the weights and the data"
            )
        stay = max(1, round(total * density ** ((round_ + 1) / how.rounds)))
        now = highest(numbers.masked_fill_(~alive, -torch.inf), stay)
        parts = now.split([kept[name].numel() for name in listed])
        kept = {name: part.reshape(kept[name].shape) for name, part in zip(listed, parts, strict=True)}
    return kept


def highest(numbers: Float[Tensor, " n"], count: int) -> Bool[Tensor, " n"]:
    """Which `count` of the numbers, at least one, are the highest; ties go by index, the lower index first.

    In time that grows as n: there is no need to sort millions of weights in every round.
    """
    limit = torch.kthvalue(numbers, len(numbers) - count + 1).values
    found = numbers > limit
    equal = (numbers == limit).nonzero().flatten()
    found[equal[: count - int(found.sum())]] = True
    return found


def shuffled(kept: dict[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """Masks with the same number of weights in every layer, in other places: each is permuted by itself."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].reshape(mask.shape)
        for name, mask in kept.items()
    }


def unit_scores(graph: ChannelGraph, numbers: dict[str, Tensor], how: WeightScore) -> Scores:
    """Scores of units: the sum of the scores of their weights, over all coupled slices.

    Groups none of whose weights has a score are missing.
    """
    values, missing = {}, []
    for group in graph.groups:
        if group.fixed is not None:
            continue
        parts = [
            rows(numbers[m.tensor].double().cpu(), m, group.units).sum(1) for m in group.members if m.tensor in numbers
        ]
        if parts:
            values[group.name] = torch.stack(parts).sum(0)
        else:
            missing.append(group.name)
    return Scores(values, describe(how), tuple(missing))
