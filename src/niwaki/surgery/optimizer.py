"""Optimisers follow a cut: every live parameter stays in its group, with the kept slice of its state."""

from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, PlanMismatchError
from niwaki.graph.skeleton import identity
from niwaki.plan import Plan, apply_cuts
from niwaki.surgery.record import find_surgery
from niwaki.units import tensors_in


def cut_optimizer_(optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Point `optimizer` (made for `model`) at the parameters of `small`, slicing its state by `plan`, in place.

    State tensors with the parameter's shape (momentum, second moments) are cut like it, and are zero for new units;
    single numbers (step counts) stay. Where `model` has several parameters on one storage, `small` has one: it stays in
    the group of the first, with the state of the first. A bias that folded constants gave a layer joins the group of
    its weight. With an error nothing has changed.

    Raises:
        InputError: the optimiser holds a parameter that is not the model's, or state whose cut the plan does not tell:
            of another shape than its parameter (factored moments), or of all parameters at once (LBFGS).
        PlanMismatchError: `small` was not cut from `model` by this plan.
    """
    first: dict[Any, str] = {}
    names = {id(p): first.setdefault(identity(p), name) for name, p in model.named_parameters()}
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
                    do="pass the model it was made for, or cut_(model, plan, optimizer=...) where that is cut in place",
                )
            if name not in new and plan.drops(name):
                continue
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
        if old in optimizer.state and young not in state:
            _refuse_other_state(optimizer, old, name, cut=name in cuts)
            state[young] = {
                key: apply_cuts(value, cuts[name], name, zero="all").clone()
                if isinstance(value, Tensor) and value.shape == old.shape and name in cuts
                else value
                for key, value in optimizer.state[old].items()
            }
    swap = {id(old): young for old, young, _ in pairs}
    placed: set[Tensor] = set()
    for group in optimizer.param_groups:
        held = [swap[id(parameter)] for parameter in group["params"] if id(parameter) in swap]
        listed = dict.fromkeys(held)  # each once, in order
        group["params"][:] = [p for p in listed if p not in placed]  # in place: optimisers may hold on to the list
        placed.update(listed)
    known = find_surgery(small)
    for path in known.biases if known is not None else ():  # folded constants may have given a layer a bias
        layer = small.get_submodule(path)
        for group in optimizer.param_groups:
            if any(p is layer.weight for p in group["params"]) and not any(p is layer.bias for p in group["params"]):
                group["params"].append(layer.bias)
    optimizer.state.clear()
    optimizer.state.update(state)


def _refuse_other_state(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str, *, cut: bool) -> None:
    """Refuse state of which nobody knows what a cut leaves: beside a cut parameter, all but tensors of its shape and
    single numbers; beside any other, what has more numbers than it and so is about others too.
    """
    for key, value in optimizer.state[parameter].items():
        alike = isinstance(value, Tensor) and value.shape == parameter.shape
        for tensor in () if alike else tensors_in(value):
            whole = isinstance(value, Tensor) and tensor.numel() == 1
            if (cut and not whole) or tensor.numel() > parameter.numel():
                raise InputError(
                    f"cut the state of {type(optimizer).__name__}",
                    found=f"{key} of shape {tuple(tensor.shape)} beside a parameter of {tuple(parameter.shape)}",
                    where=name,
                    do="make a new optimiser for the cut model",
                )
