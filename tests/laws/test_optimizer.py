"""Law: the optimiser follows a cut: it holds every live parameter, and its state is the kept slice of what it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import niwaki
from laws.common import apply_cuts, cuts_by_tensor, plans, same_bits, trace
from niwaki.units import run, tensors_in
from zoo import ZOO, Case

Optimizer = torch.optim.Optimizer
MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=0.001),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.001, amsgrad=True),
}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Vectors and the rest with settings of their own, as many train."""
    parameters = list(model.parameters())
    vectors, others = [p for p in parameters if p.dim() < 2], [p for p in parameters if p.dim() >= 2]
    return [{"params": vectors, "weight_decay": 0.0}, {"params": others}]


def step(model: nn.Module, optimizer: Optimizer, example: Any) -> None:
    optimizer.zero_grad()
    loss = sum((t**2).mean() for t in tensors_in(run(model, example)))
    assert isinstance(loss, Tensor)
    loss.backward()
    optimizer.step()


def law(case: Case, *, kind: str = "sgd") -> None:
    if "inference" in case.facts:
        return
    model, example, graph = trace(case)
    for number, (label, plan) in enumerate(plans(model, graph, kinds=1)):
        if number and not plan.dropped:
            continue  # one plan of widths, and those that leave blocks out
        old = copy.deepcopy(model)
        optimizer = MAKERS[kind](groups_of(old))
        for _ in range(2):
            step(old, optimizer, example)
        names = {id(p): name for name, p in old.named_parameters()}
        states = {names[id(p)]: {k: _clone(v) for k, v in s.items()} for p, s in optimizer.state.items()}
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        membership = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        small = niwaki.cut(old, plan)
        niwaki.cut_optimizer_(optimizer, old, small, plan)

        live = {id(p): name for name, p in small.named_parameters()}
        held = [
            [live.get(id(p), "a parameter that is not the model's") for p in group["params"]]
            for group in optimizer.param_groups
        ]
        membership = [[name for name in names if not plan.drops(name)] for names in membership]
        assert held == membership, f"{label}: the optimiser holds {held}"
        assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == settings
        cuts = cuts_by_tensor(plan)
        assert {live[id(p)] for p in optimizer.state} == {n for n in states if not plan.drops(n)}, (
            f"{label}: states lost or stray"
        )
        for parameter, state in optimizer.state.items():
            name = live[id(parameter)]
            for key, value in states[name].items():
                if isinstance(value, Tensor) and value.dim():
                    value = apply_cuts(value, cuts.get(name, []))
                    assert same_bits(state[key], value), f"{label}: {key} of {name} is not the kept slice"
                else:
                    assert state[key] == value, f"{label}: {key} of {name} changed"
        before = {name: p.detach().clone() for name, p in small.named_parameters()}
        step(small, optimizer, example)
        live_now = [(n, p) for n, p in small.named_parameters() if n in states and p.grad is not None]
        moved = {n for n, p in live_now if float(p.grad.abs().max()) > 1e-3}  # smaller steps may vanish in rounding
        still = {n for n, p in live_now if same_bits(p, before[n])}
        assert not still & moved, f"{label}: {still & moved} no longer train"


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("case", ZOO, ids=str)
def test_optimizer(case: Case, kind: str) -> None:
    law(case, kind=kind)
