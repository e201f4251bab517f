"""Fresh weights for a network that was cut before it was trained."""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from niwaki.errors import CannotCutError, UnknownNameError
from niwaki.graph.skeleton import identity, walk
from niwaki.plan import Plan

Start = Literal["reset", "rescale", "slice"]


def renew_(
    small: nn.Module,
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    how: Start,
    seed: int,
    plan: Plan | None = None,
) -> dict[str, tuple[str, ...]]:
    """Give `small`, cut from the untrained `model`, weights to start from; in place.

    A cut layer reads less than its weights were drawn for. "reset" draws them anew by each module's own
    `reset_parameters`; tensors that were one number throughout in `model` (scales, zeroed shifts) stay that number.
    "rescale" keeps the kept weights, times the root of old over new fan-in. What a module of its own class without
    `reset_parameters` holds is rescaled under "reset", too. "slice" changes nothing.

    Where `plan` grew groups, kept weights are as `how` says and those of new units are drawn anew, with the fan-in
    that the module has now; of a module without `reset_parameters` they are the kept ones, in another order.

    Args:
        shapes: of the uncut tensors, by name.

    Returns:
        Names of the parameters under "reset", "rescaled" and "sliced": what happened to each; where the plan grew,
        those with new slices under "grown".

    Raises:
        UnknownNameError: another `how`.
        CannotCutError: a module's own `reset_parameters` fails on its new shapes.
    """
    if how not in get_args(Start):
        raise UnknownNameError.of("start", how, get_args(Start))
    own = dict(small.named_parameters())
    reset: set[str] = set()
    drawn: dict[str, Tensor] = {}
    if how == "reset" or (plan is not None and plan.grows):
        kept = {name: tensor.detach().clone() for name, tensor in (*own.items(), *small.named_buffers())}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            reset = _reset(small)
        old = dict(model.named_parameters())
        with torch.no_grad():
            for name in sorted(reset & set(old)):
                first = old[name].detach().flatten()[:1]
                if first.numel() and own[name].numel() and bool((old[name] == first).all()):
                    own[name].fill_(first.item())
            if how != "reset":  # what was drawn is for the new slices alone
                drawn = {name: own[name].detach().clone() for name in reset}
                for name, tensor in (*own.items(), *small.named_buffers()):
                    tensor.copy_(kept[name])
                reset = set()
    done: dict[str, list[str]] = {"reset": [], "rescaled": [], "sliced": []}
    for name, parameter in own.items():
        before = shapes.get(name)
        if name in reset:
            done["reset"].append(name)
        elif how != "slice" and before is not None and len(before) > 1 and tuple(parameter.shape[1:]) != before[1:]:
            with torch.no_grad():
                parameter.mul_(math.sqrt(math.prod(before[1:]) / math.prod(parameter.shape[1:])))
            done["rescaled"].append(name)
        else:
            done["sliced"].append(name)
    if plan is not None and plan.grows:
        done["grown"] = _fill(own, drawn, plan, reset, seed)
    return {what: tuple(names) for what, names in done.items()}


def _fill(own: Mapping[str, Tensor], drawn: Mapping[str, Tensor], plan: Plan, reset: set[str], seed: int) -> list[str]:
    """Fill the new slices of parameters, from what was drawn for them or else from their kept ones in another order;
    names of those that have any. Parameters of `reset` were drawn as a whole.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name, cuts in plan.by_tensor().items():
        axes = [(int(cut["axis"]), list(cut["new"])) for cut in cuts if "new" in cut]
        if not axes or name not in own:
            continue
        found.append(name)
        for axis, new in axes if name not in reset else ():
            parameter = own[name].detach()
            places = torch.tensor(new, device=parameter.device)
            if name in drawn:
                slices = drawn[name].index_select(axis, places)
            else:
                old = torch.tensor(sorted(set(range(parameter.shape[axis])) - set(new)))
                pick = torch.randint(len(old), (len(new),), generator=generator)
                slices = parameter.index_select(axis, old[pick].to(parameter.device))
                for other in range(parameter.dim()):
                    if other != axis:
                        order = torch.randperm(parameter.shape[other], generator=generator)
                        slices = slices.index_select(other, order.to(parameter.device))
            with torch.no_grad():
                parameter.index_copy_(axis, places, slices)
    return found


def _reset(small: nn.Module) -> set[str]:
    """Call every module's `reset_parameters`; names of the parameters that they hold themselves."""
    names = {identity(parameter): name for name, parameter in small.named_parameters()}
    found: set[str] = set()
    for path, module in walk(small):
        renewed = getattr(module, "reset_parameters", None)
        mine = [parameter for parameter in module._parameters.values() if parameter is not None]
        if not callable(renewed) or not mine:
            continue
        before = [tuple(parameter.shape) for parameter in mine]
        try:
            renewed()
        except Exception as error:
            raise _refused(path, f"{type(error).__name__}: {error}") from error
        if before != [tuple(p.shape) for p in module._parameters.values() if p is not None]:
            raise _refused(path, "it changed the shapes")
        found.update(names[identity(parameter)] for parameter in mine)
    return found


def _refused(path: str, found: str) -> CannotCutError:
    return CannotCutError(
        f"draw new weights for {path or 'the model'}", found=f"its reset_parameters: {found}", do="take start='rescale'"
    )
