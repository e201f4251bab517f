"""`cut`: a smaller model by a plan, through the eager door where it opens, else through the exported one."""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from niwaki.errors import CannotCutError, PlanMismatchError, Setting
from niwaki.graph import ChannelGraph, trace
from niwaki.graph.kernels import Kernels
from niwaki.graph.plans import plan_of, times_of
from niwaki.graph.skeleton import Ties, copy_with, like, named_tensors, walk, without_caches
from niwaki.graph.trace import fingerprint, uncollected
from niwaki.plan import Plan, apply_cuts, decode_example, read_once
from niwaki.surgery.attention import adapt_attention, apply_classes
from niwaki.surgery.blocks import leave_out_
from niwaki.surgery.check import Retrace, example_of, retrace
from niwaki.surgery.evidence import Sizes, changes, group_count, groups_after, stays_of
from niwaki.surgery.exported import cut_exported
from niwaki.surgery.fitting import fits, may_fit, shapes_of
from niwaki.surgery.fold import fold
from niwaki.surgery.mending import search
from niwaki.surgery.modules import Mend, apply_mends, declare, options, reading
from niwaki.surgery.optimizer import cut_optimizer_
from niwaki.surgery.record import Surgery, add_bias, remember, surgery_of
from niwaki.surgery.replay import Told, replays
from niwaki.units import device_of

log = logging.getLogger(__name__)

SHOWN = 4
"""Places named in a warning."""


@uncollected()
def cut(model: nn.Module, plan: Plan) -> nn.Module:
    """A new, smaller model (or a wider one, where the plan grows groups); the given one is left alone.

    The eager door slices tensors and mends the integers that modules keep, so that the result is the user's own class.
    Where a forward hard-codes what can't be mended, the exported door rewrites the sizes in its `torch.export` graph.
    Both are checked at once against the trace. What depended on the old width keeps its value (attention's scale).
    New units are copies that nothing listens to yet, by weights of zero: the wider network computes what the old one
    did. Only the eager door grows.

    Source: growth as in Chen, Goodfellow and Shlens 2016, arXiv:1511.05641 (Net2Net), sec. 2.2. Differs: a copy's
    outgoing weights are zero, theirs are shared out between it and its original.

    Raises:
        PlanMismatchError: the plan is for another model.
        CannotCutError: neither door opens; names the module and what to protect.
    """
    plan.bound(model, fingerprint(model))
    graph = plan.graph if plan.graph is not None else trace(model, decode_example(plan.example, str(device_of(model))))
    if graph.data_reads:
        listed = "; ".join(map(str, graph.data_reads[:SHOWN])) + ("; ..." if len(graph.data_reads) > SHOWN else "")
        unseen = f" (never used: {', '.join(graph.unused[:SHOWN])})" if graph.unused else ""
        log.warning("forward reads numbers out of data, only the path of the example is judged%s: %s", unseen, listed)
    times = times_of(graph, plan)
    grows = bool((times > 1).any())
    alive = times if grows else times > 0
    if plan.graph is None:
        _consistent(plan, graph, alive)
    small, problem = _eager(model, plan, graph, alive)
    if problem is None:
        return small
    if grows:
        raise CannotCutError(
            f"grow {type(model).__name__}",
            found=f"eager: {problem}; the exported door does not grow",
            where=", ".join(list(plan.grows)[:SHOWN]),
            do=(
                "leave the groups of the module named as wide as they are: ",
                Setting("protect", written="protect=[...]"),
            ),
        )
    log.info("the eager door does not open (%s); trying torch.export", problem)
    exported, reason = cut_exported(model, plan, graph, alive)
    if exported is None:
        raise CannotCutError(
            f"cut {type(model).__name__}",
            found=f"eager: {problem}; exported: {reason}",
            where="see the module named",
            do=(
                "protect the groups of that module (",
                Setting("protect", written="protect=[...]"),
                ") or cut its grids the other way (",
                Setting("grids"),
                ")",
            ),
        )
    return exported


def eager_door(model: nn.Module, plan: Plan) -> str | None:
    """Why the eager door does not open for a plan made in this process, or None where it does."""
    return _eager(model, plan, plan.graph, times_of(plan.graph, plan))[1]


def _consistent(plan: Plan, graph: ChannelGraph, alive: np.ndarray) -> None:
    """Refuse a plan whose cuts are not those of its kept units."""
    meant = {(c["tensor"], c["axis"]): dict(c) for c in plan_of(graph, alive).cuts}
    given = {(c["tensor"], c["axis"]): dict(c) for c in plan.cuts}
    odd = sorted(key for key in meant.keys() | given.keys() if meant.get(key) != given.get(key))
    if odd:
        raise PlanMismatchError(
            "cut by a plan",
            found=f"its cuts contradict its kept units at {odd[0][0]}, axis {odd[0][1]}",
            do="make the plan again",
        )


def cut_(model: nn.Module, plan: Plan, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Cut `model` in place (eager door only) and return it.

    The model's parameters become new, smaller ones. An optimiser made for it would go on with the old ones, so give it
    as `optimizer`: it follows, with the kept slices of its state (see `cut_optimizer_`). With an error neither changes.

    Raises:
        CannotCutError: the model only cuts through the exported door, which makes a new module.
        InputError: the optimiser holds other parameters than the model's, or state that can't be cut.
    """
    small = cut(model, plan)
    if type(small) is not type(model):
        raise CannotCutError(
            f"cut {type(model).__name__} in place",
            found="it only cuts by torch.export",
            do="use cut(), which returns a new model",
        )
    if optimizer is not None:
        cut_optimizer_(optimizer, model, small, plan)
    model.__dict__.update(small.__dict__)
    remember(model, surgery_of(small))
    return model


def sliced(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` with cut tensors and without dropped blocks; its integers are as they were.

    No tensor is copied whole first.
    """
    cuts = plan.by_tensor()
    own = [entry for listing in named_tensors(model) for entry in listing]
    strange = sorted(set(cuts) - {name for name, _ in own})
    if strange:
        raise PlanMismatchError(
            f"cut {strange[0]}", found="the model has no such tensor", do="use the model of the plan"
        )
    names: dict[Any, str] = {}
    ties = Ties()
    first = {id(tensor): names.setdefault(ties.key(tensor), name) for name, tensor in own}

    def change(tensor: Tensor) -> Tensor:
        name = first[id(tensor)] if id(tensor) in first else names.get(ties.key(tensor))
        data = tensor.detach()
        if name in cuts:
            return like(tensor, apply_cuts(data, cuts[name], name).contiguous())
        return like(tensor, data.clone())

    with read_once():
        small = without_caches(copy_with(model, change))
    leave_out_(small, plan.dropped)
    return small


def _eager(model: nn.Module, plan: Plan, graph: ChannelGraph, alive: np.ndarray) -> tuple[nn.Module, str | None]:
    small = sliced(model, plan)
    example = example_of(graph, model)
    sizes = Sizes(stays_of(graph, alive))
    groups = {r.module: groups_after(r, sizes) for r in graph.records if group_count(r) is not None}
    mends = declare(walk(small), {cut["tensor"] for cut in plan.cuts}, groups)
    mends += adapt_attention(small, graph, alive)
    meta = graph.device == "meta"
    modules = dict(walk(small))
    found = options(modules.items(), changes(graph, sizes))
    before = {(path, name): getattr(modules[path], name) for option in found for path, name in option.places}
    extra: list[Mend] = []
    grows, kernels = bool((alive > 1).any()), Kernels()

    def judge(given: list[Mend]) -> Retrace:
        extra[:] = [mend for mend in given if mend["value"] != before[mend["module"], mend["attribute"]]]
        apply_mends(small, given)
        with reading({(type(modules[path]), name) for path, name in before}) as read:
            seen = looked()
        return replace(seen, read=frozenset([place for place in before if (type(modules[place[0]]), place[1]) in read]))

    def looked() -> Retrace:
        told = (
            Told() if grows else replays(small, graph, alive, example, sizes, kernels)
        )  # it follows no order of copies
        if told.same:
            return Retrace([], {}, None)
        if told.problem:
            return Retrace(
                [], {}, told.problem, (), told.where, told.ran, agreed=told.done, wrong=told.wrong, off=told.off
            )
        return retrace(small, graph, alive, example, meta=meta, sizes=sizes)

    seen = search(found, judge, graph, sizes)
    while seen.problem is not None and may_fit(seen.problem) and seen.where in modules:
        more = fits(small, seen.where, shapes_of(graph, sizes))
        if not more:
            break
        mends += more
        apply_classes(small, more)
        seen = search(found, judge, graph, sizes)
    if seen.problem is not None:
        return small, seen.problem
    scaled, problem = fold(small, seen)
    if problem is None:
        remember(small, Surgery("eager", tuple(dict(mend) for mend in (*mends, *extra)), tuple(scaled)))
    return small, problem


def redo(model: nn.Module, plan: Plan, surgery: Surgery) -> nn.Module:
    """Cut a fresh copy the way `surgery` says, without tracing; tensors may be overwritten by saved ones afterwards."""
    plan.bound(model, fingerprint(model))
    small = sliced(model, plan)
    apply_classes(small, surgery.mends)
    apply_mends(small, [dict(mend) for mend in surgery.mends if "attribute" in mend])
    parameters = dict(small.named_parameters())
    for entry in surgery.scaled:
        data = parameters[entry["tensor"]].detach()
        shape = [1] * data.dim()
        shape[entry["axis"]] = data.shape[entry["axis"]]
        factor = torch.ones(data.shape[entry["axis"]], dtype=torch.float64)
        factor[torch.tensor(entry["positions"])] = entry["factor"]
        data.copy_(data.double() * factor.reshape(shape).to(data.device))
    remember(small, surgery)
    for path in surgery.biases:
        add_bias(small, path)
    return small
