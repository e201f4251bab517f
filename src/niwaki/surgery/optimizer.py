"""Optimisers follow a cut: every live parameter stays in its group, with the kept slice of its state."""

from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, PlanMismatchError
from niwaki.plan import Plan, apply_cuts


def cut_optimizer_(optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Point `optimizer` (made for `model`) at the parameters of `small`, slicing its state by `plan`, in place.

    State tensors with the parameter's shape (momentum, second moments) are cut like it; others (step counts) stay.

    Raises:
        InputError: the optimiser holds a parameter that is not the model's.
        PlanMismatchError: `small` was not cut from `model` by this plan.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    new = dict(small.named_parameters(remove_duplicate=False))
    cuts = plan.by_tensor()
    pairs: list[tuple[Tensor, Tensor, str]] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise InputError(
                    "cut an optimiser",
                    found="it holds a parameter that is not the model's",
                    do="pass the model it was made for",
                )
            if name not in new:
                raise PlanMismatchError(
                    "cut an optimiser", found=f"the small model has no {name}", do="pass the model cut by this plan"
                )
            expected = (
                apply_cuts(parameter.detach().to("meta"), cuts[name], name).shape if name in cuts else parameter.shape
            )
            if new[name].shape != expected or (name in cuts and new[name] is parameter):
                raise PlanMismatchError(
                    f"cut the optimiser's {name}",
                    found=f"shape {tuple(new[name].shape)} where the plan leaves {tuple(expected)}",
                    do="pass the model cut by this plan",
                )
            pairs.append((parameter, new[name], name))
    state: dict[Tensor, Any] = {}
    for old, young, name in pairs:
        if old in optimizer.state:
            state[young] = {
                key: apply_cuts(value, cuts[name], name).clone()
                if isinstance(value, Tensor) and value.shape == old.shape and name in cuts
                else value
                for key, value in optimizer.state[old].items()
            }
    swap = {id(old): young for old, young, _ in pairs}
    for group in optimizer.param_groups:
        group["params"] = [swap[id(parameter)] for parameter in group["params"]]
    optimizer.state.clear()
    optimizer.state.update(state)
