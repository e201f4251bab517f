"""How much a loss rises when ever more of one group of layers is masked."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from niwaki.budgets.layer_groups import Layer, LayerGroup
from niwaki.errors import InputError

SHARES = 10
"""Shares of a group that are tried: tenths."""


@torch.no_grad()
def loss_rises(
    model: nn.Module,
    layers: Sequence[Layer],
    groups: Sequence[LayerGroup],
    *,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    shares: int = SHARES,
) -> tuple[tuple[float, ...], ...]:
    """What `loss` rises by, on the mean over `batches` in evaluation mode, when 1/k, ..., k/k of a group's smallest
    scales are 0 (k is `shares`) and all other groups are whole; `[groups, shares]`, what is not finite being as bad as
    the worst that is. The model is as before afterwards.

    Raises:
        InputError: no batches.
    """
    if not batches:
        raise InputError("measure groups of layers", found="no batches", do="give at least one")
    named, known = dict(model.named_parameters()), {layer.name: layer for layer in layers}
    modes = {module: module.training for module in model.modules()}
    before = {name: named[name].detach().clone() for name in known}

    def mean() -> float:
        return float(np.mean([float(loss(model, batch)) for batch in batches]))

    found = []
    try:
        model.eval()
        base = mean()
        for group in groups:
            mine = [known[name] for name in group.scales if name in known]
            order = np.argsort(np.concatenate([layer.sizes for layer in mine]), kind="stable")
            owner = np.repeat(np.arange(len(mine)), [layer.sizes.size for layer in mine])[order]
            channel = np.concatenate([layer.channels for layer in mine])[order]
            rises, done = [], 0
            for part in range(1, shares + 1):
                end = round(part * order.size / shares)
                for at in range(done, end):
                    named[mine[owner[at]].name][int(channel[at])] = 0
                done = end
                rises.append(mean() - base)
            for layer in mine:
                named[layer.name].copy_(before[layer.name])
            found.append(rises)
    finally:
        for name, tensor in before.items():
            named[name].copy_(tensor)
        for module, mode in modes.items():
            module.training = mode
    worst = max((rise for rises in found for rise in rises if np.isfinite(rise)), default=0.0)
    return tuple(tuple(rise if np.isfinite(rise) else worst for rise in rises) for rises in found)
