"""What removed channels still put out as a constant, moved into the bias of what reads them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from niwaki.graph.skeleton import copy_with, like
from niwaki.plan import Plan
from niwaki.repair.readers import Readers, listen


@final
@dataclass(frozen=True)
class FoldedConstants:
    """Removed channels put out something; its constant part goes into the next layer's bias (or running mean).

    "shift": a channel whose norm scale is zero still emits `act(beta)`. Exact for these where nothing is padded.
    "mean": the channel's mean over given batches, whatever its scale; the best constant for any channel.

    Consumers are linear layers and plain convolutions; others (recurrent layers, attention's own projections, grouped
    or transposed convolutions, parameters of your own) are left alone and returned by name.

    Source: Chu et al. 2022, arXiv:2306.01526, code, stage 2c (constants of channels with gamma = 0).
    Differs: the constant is measured at the consumer's input, so any path (add, concat, any activation) counts; a
    consumer with neither bias nor batch norm gets a bias, and one whose batch norm keeps no running mean needs none.
    """

    source: Literal["shift", "mean"] = "shift"
    """Where the constant comes from."""

    def __call__(
        self,
        model: nn.Module,
        small: nn.Module,
        plan: Plan,
        *,
        batches: Iterable[Any],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> tuple[str, ...]:
        """Fold into `small`, in place; returns the consumers that could not take their constant.

        A consumer that gets a bias remembers it with its surgery, so that a saved run loads again.

        Args:
            batches: inputs; for "shift" one batch of any values will do, as the constants do not depend on it.
            optimizer: one in use for `small`; biases that are added join the group of their layer's weight. One that
                is made later from `small.parameters()` has them anyhow.

        Raises:
            InputError: no batches, a model that was not cut through the eager door, or another model's optimiser.
        """
        readers = Readers(model, small, plan, optimizer, what="fold constants")
        source = _without_scales(model, plan) if self.source == "shift" else model
        means = _means(source, readers.gone, batches)
        for name, gone in readers.gone.items():
            if name not in means:  # its weight is read without a call of the layer, as attention does with its output
                readers.skipped.append(name)
                continue
            taken = readers.weight(name).index_select(1, gone)
            share = taken.flatten(2).sum(2) if taken.dim() > 2 else taken  # [c_out, removed]
            readers.shift(name, share.double() @ means[name][gone.cpu()].to(share.device))
        return tuple(dict.fromkeys(readers.skipped))


def _without_scales(model: nn.Module, plan: Plan) -> nn.Module:
    """The model with the norm scales of removed channels at zero, their shifts as they are."""
    cuts = plan.by_tensor()
    scales = {
        f"{path}.weight"
        for path, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine
    }
    names = {id(p): name for name, p in model.named_parameters()}

    def change(tensor: Tensor) -> Tensor:
        name = names.get(id(tensor))
        data = tensor.detach()
        if name not in scales or name not in cuts:
            return like(tensor, data)
        zeroed = torch.zeros_like(data)
        keep = torch.tensor(cuts[name][0]["keep"], device=data.device)
        zeroed[keep] = data[keep]
        return like(tensor, zeroed)

    return copy_with(model, change)


def _means(model: nn.Module, consumers: Iterable[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Mean of every input channel of the consumers that are called, float64."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hear(name: str, module: nn.Module, x: Tensor) -> None:
        x = x.double()
        axis = x.dim() - 1 if isinstance(module, nn.Linear) else 1 if x.dim() == module.weight.dim() else 0  # type: ignore[operator, union-attr]
        flat = x.movedim(axis, 0).flatten(1)
        sums[name] = sums.get(name, 0) + flat.sum(1).cpu()
        counts[name] = counts.get(name, 0) + flat.shape[1]

    listen(model, consumers, batches, hear, what="fold constants")
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}
