"""`mask`: the same outputs as the cut model must give, in the original shapes."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.graph.skeleton import copy_with, identity, like, without_caches
from niwaki.graph.trace import fingerprint
from niwaki.plan import Plan


def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` in which every parameter slice of a removed unit is zero.

    Shapes stay, so whatever depends on a width (attention's scale, means) keeps its value. Buffers stay. This saves
    nothing; it is what `cut` is judged by.

    Raises:
        PlanMismatchError: the plan is for another model.
    """
    plan.bound(model, fingerprint(model))
    cuts = plan.by_tensor()
    names: dict[Any, str] = {}
    for known, parameter in model.named_parameters():
        names.setdefault(identity(parameter), known)

    def zeroed(tensor: Tensor) -> Tensor:
        name = names.get(identity(tensor))
        data = tensor.detach().clone()
        if name is not None:
            zero_(data, cuts.get(name, ()))
        return like(tensor, data)

    return without_caches(copy_with(model, zeroed))


def zero_(data: Tensor, cuts: Iterable[Mapping[str, Any]]) -> Tensor:
    """A parameter's values with zeros, in place, in the slices that its entries in a plan remove."""
    for cut in cuts:
        if cut.get("mask") is False:
            continue
        axis, blocks = int(cut["axis"]), int(cut.get("blocks", 1))
        if blocks == 1:
            gone = torch.ones(data.shape[axis], dtype=torch.bool, device=data.device)
            gone[torch.tensor(cut["keep"], dtype=torch.long, device=data.device)] = False
            data.movedim(axis, 0)[gone] = 0
            continue
        split = data.view(blocks, data.shape[0] // blocks, *data.shape[1:]).movedim(
            axis + 1, 1
        )  # [blocks, size, rows, ...]
        gone = torch.ones(split.shape[:2], dtype=torch.bool, device=data.device)
        for block, keep in enumerate(cut["keep"]):
            gone[block, torch.tensor(keep, dtype=torch.long, device=data.device)] = False
        split[gone] = 0
    return data
