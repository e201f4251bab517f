"""Law: a grown network computes what it did, costs what the plan promises, travels as a file, and can be cut back.

New units are copies that nothing listens to yet, so growth changes no output, in float64. Groups that only grow where
a forward would have to be written anew are refused by name; `REFUSED` lists all of them, so that they stay few.
"""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import niwaki
from laws.common import counted_macs, counted_params, difference, fresh, outputs, same_bits, tensors_of, trace
from niwaki.errors import CannotCutError, InputError
from niwaki.graph.copies import growable
from niwaki.graph.plans import plan_of, times_of
from zoo import ZOO, Case, named

TOLERANCE = 1e-9
REFUSED = {
    "fused_qkv": {"embed"},  # heads: a view that divides the width by a number of its own
    "gpt": {"wte#2"},
    "option_a": {"blocks.1.conv2", "blocks.2.conv2"},  # one number pads both sides
    "relative_positions": {"near"},  # a slice as long as the width
    "cell_loop": {"cell.weight_ih"},  # a first state of a written-out size
    "experts": {"w1"},
    "slot_attention": {"encode", "gru.weight_ih"},  # views with written-out sizes
    "spatial_transformer": {"localization.3", "conv2"},
    "point_net": {"stn.conv2"},
    "every_second": {"conv#2"},  # a strided slice
    "interleaved": {"conv"},
    "pieces_by_size": {"first"},  # one piece more
}
"""Case -> groups that may be copied by the graph, and by no door."""
STAY = {
    *("explicit_softmax", "cross_attention", "shifted_windows", "einsum_heads", "baddbmm", "linear_attention"),
    *("deformable_attention", "deformable_heads", "bias_by_method", "maxout"),
    *("channel_shuffle", "grouped_transposed", "strided_groups", "only_one_layer", "every_second", "interleaved"),
    *("group_norm_by_hand", "pieces_by_size"),
}
"""Cases without any other group that may be copied: heads, groups of channels, widths that a forward holds."""


def candidates(graph: Any) -> list[Any]:
    free = growable(graph)
    return [group for group in graph.groups if group.ids.size and free[group.ids].all()]


def wider(graph: Any, groups: list[Any]) -> np.ndarray:
    """How often each unit is there when these groups grow, each by another number; the first may be there thrice."""
    times = np.ones(graph.units.count, np.int64)
    for number, group in enumerate(groups):
        more = (1 + number % 3) * group.multiple
        np.add.at(times, group.ids[np.arange(more) % group.ids.size], 1)
    return times


def law(case: Case) -> None:
    model, example, graph = trace(case, exact=True)
    groups = [group for group in candidates(graph) if group.name not in REFUSED.get(case.name, ())]
    assert bool(groups) == (case.name not in STAY), f"{len(groups)} groups grow"
    if not groups:
        return
    times = wider(graph, groups)
    plan = plan_of(graph, times)
    assert plan.grows == {g.name: int((times[g.ids] - 1).sum()) for g in groups}
    assert (times_of(graph, plan) == times).all()
    big = niwaki.cut(model, plan)
    check(model, big, plan, example)
    travels(model, big, plan)
    back(model, big, plan, example)


def check(model: nn.Module, big: nn.Module, plan: Any, example: Any) -> None:
    """Outputs, shapes and costs."""
    for draw in range(2):
        inputs = fresh(example, seed=draw)
        found = difference(outputs(model, inputs), outputs(big, inputs))
        assert plan.inexact or found < TOLERANCE, f"growth changed the outputs by {found}"
    assert niwaki.verify(model, big, plan, example).passed
    promised = {name: plan.promised[name] for name in ("macs", "params")}
    found_ = {"macs": counted_macs(big, example), "params": counted_params(big)}
    assert promised == found_, f"promised {promised}, counted {found_}"
    before = tensors_of(model)
    cuts = {(entry["tensor"], entry["axis"]): entry for entry in plan.cuts}
    for name, tensor in tensors_of(big).items():
        for axis, size in enumerate(tensor.shape):
            entry = cuts.get((name, axis))
            width = before[name].shape[axis] if entry is None else len(entry["keep"])
            assert entry is None or "blocks" in entry or size == width > before[name].shape[axis]
            assert entry is not None or size == width, f"{name} grew without an entry"


def travels(model: nn.Module, big: nn.Module, plan: Any) -> None:
    """The file says the same, and its entries give the grown tensors with nothing but index_select and zeros."""
    text = plan.to_json()
    assert json.loads(text)["format"] == "niwaki plan 2"
    again = niwaki.Plan.from_json(text)
    assert again.to_json() == text
    twin = tensors_of(niwaki.cut(model, again))
    grown = tensors_of(big)
    assert all(same_bits(twin[name], tensor) for name, tensor in grown.items())
    scaled = {entry["tensor"] for entry in niwaki.surgery.surgery_of(big).scaled}
    for name, tensor in tensors_of(model).items():
        made = tensor.detach()
        for entry in (entry for entry in json.loads(text)["cuts"] if entry["tensor"] == name):
            made = made.index_select(entry["axis"], torch.tensor(entry["keep"], dtype=torch.long))
            if entry.get("zero"):
                made = made.index_fill(entry["axis"], torch.tensor(entry["new"]), 0)
        assert name in scaled or same_bits(made, grown[name]), f"{name} by hand differs"


def back(model: nn.Module, big: nn.Module, plan: Any, example: Any) -> None:
    """Cut without its new units, the grown network is the original bit for bit."""
    graph = niwaki.trace(big, example)
    alive = np.ones(graph.units.count, bool)
    new = {(entry["tensor"], entry["axis"]): entry["new"] for entry in plan.cuts if "new" in entry}
    for axis in graph.axes:
        alive[axis.units[new.get((axis.tensor, axis.axis), [])]] = False
    small = niwaki.cut(big, plan_of(graph, alive))
    before, surgery = tensors_of(model), niwaki.surgery.surgery_of(big)
    for name, tensor in tensors_of(small).items():
        if not any(entry["tensor"] == name for entry in surgery.scaled):
            assert same_bits(tensor, before[name]), f"{name} is not what it was"


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_growth(case: Case) -> None:
    law(case)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_some_grow_where_others_are_cut(case: Case) -> None:
    """Every other group grows by one, the rest keeps its upper half: costs as promised, outputs as the mask's."""
    model, example, graph = trace(case, exact=True)
    groups = [group for group in candidates(graph) if group.name not in REFUSED.get(case.name, ())]
    times = np.ones(graph.units.count, np.int64)
    for group in groups[::2]:
        times[group.ids[: group.multiple]] += 1
    for group in groups[1::2]:
        if group.multiple == 1:
            times[group.ids[: group.units // 2]] = 0
    plan = plan_of(graph, times)
    assert bool(plan.grows) == (case.name not in STAY)
    if not plan.grows:
        return
    big = niwaki.cut(model, plan)
    inputs = fresh(example, seed=0)
    found = difference(outputs(niwaki.mask(model, plan), inputs), outputs(big, inputs))
    assert plan.inexact or found < TOLERANCE, f"differs from the mask by {found}"
    assert niwaki.verify(model, big, plan, example).passed
    assert plan.promised["params"] == counted_params(big) and plan.promised["macs"] == counted_macs(big, example)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_grow_is_refused_by_name(name: str) -> None:
    case = named(name)
    model, _, graph = trace(case)
    every = {group.name: group for group in candidates(graph)}
    assert REFUSED[name] <= set(every)
    for group in REFUSED[name]:
        with pytest.raises(CannotCutError, match="does not grow"):
            niwaki.cut(model, plan_of(graph, wider(graph, [every[group]])))


def test_grids_and_fixed_groups_are_refused() -> None:
    _, _, graph = trace(named("grouped_convolution"))
    grid = next(group for group in graph.groups if group.kind == "grid" and group.fixed is None)
    with pytest.raises(InputError, match="do not grow"):
        plan_of(graph, wider(graph, [grid]))
    held = next(group for group in graph.groups if group.fixed is not None)
    with pytest.raises(InputError, match="it is fixed"):
        plan_of(graph, wider(graph, [held]))


def test_growth_called_inexact_changes_something_somewhere() -> None:
    """Units that are multiplied with one another are heard even where weights that read them are zero."""
    model, example, graph = trace(named("two_tower"), exact=True)
    group = graph.group("text_projection")
    plan = plan_of(graph, wider(graph, [group]))
    assert "read by more than weights" in plan.inexact[group.name]
    big = niwaki.cut(model, plan)
    assert difference(outputs(model, fresh(example, 0)), outputs(big, fresh(example, 0))) > 1e-3


@pytest.mark.parametrize("square", ["as it is", "computed"])
def test_a_weight_that_is_computed_is_heard(square: str) -> None:
    """y + y @ W^T: a copy that W reads weighs nothing where W starts at zero there; where W is doubled first, nothing
    says that its columns are what reads, and the plan says that growth changes the outputs.
    """

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)
            self.mix = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.last(y + nn.functional.linear(y, self.mix * 2 if square == "computed" else self.mix).relu())

    model, example = Residual().double(), torch.randn(2, 6, dtype=torch.float64)
    graph = niwaki.trace(model, example)
    plan = plan_of(graph, wider(graph, candidates(graph)))
    found = difference(outputs(model, example), outputs(niwaki.cut(model, plan), example))
    assert plan.grows and bool(plan.inexact) == (found > TOLERANCE) == (square == "computed")
