"""Law: the graph lets go what can go and holds what must stay. (A graph that fixes everything obeys all other laws.)"""

from typing import Any

import pytest

import niwaki
from zoo import ZOO, Case, named


def groups_on(graph: Any, place: str) -> list[Any]:
    """Groups with a member on this "tensor:axis"; a tied tensor is looked up under its first name."""
    tensor, axis = place.split(":")
    return [g for g in graph.groups if any((m.tensor, m.axis) == (tensor, int(axis)) for m in g.members)]


def law(case: Case) -> None:
    model = case.make()
    graph = niwaki.trace(model, case.example())
    assert ("unknown" in case.facts) == bool(graph.unknown), f"operations without a rule: {graph.unknown}"
    for place, units in case.free.items():
        found = groups_on(graph, place)
        assert found, f"{place} lies in no group"
        held = {g.name: g.fixed for g in found if g.fixed is not None}
        assert not held, f"{place} is held by {held}"
        if units:
            assert sum(g.units for g in found) == units, f"{place}: {[(g.name, g.units) for g in found]}, not {units}"
            tensor, axis = place.split(":")
            axes = [
                (m.blocks, m.index.tolist())
                for g in found
                for m in g.members
                if (m.tensor, str(m.axis)) == (tensor, axis)
            ]
            width = dict(model.state_dict(keep_vars=True))[tensor].shape[int(axis)]
            assert sorted(i for _, index in axes for i in index) == list(range(width)), "positions missing or double"
    for place in case.fixed:
        for group in groups_on(graph, place):
            assert group.fixed, f"{place} can be removed with {group.name}, and must not"
    loose = [g.name for g in graph.groups if g.fixed is None]
    assert ("rigid" in case.facts) == (not loose), f"free groups: {loose}"
    inexact = {g.name for g in graph.groups if g.fixed is None and not g.exact}
    ways = {
        g.name
        for g in graph.groups
        if g.fixed is None
        for marks in graph.units.inexact.values()
        if (marks[g.ids] >= 0).any()
    }
    assert inexact <= ways
    assert ways if "inexact" in case.facts else not inexact, f"groups declared inexact: {inexact or ways}"
    for group in graph.groups:
        assert group.fixed is None or len(group.fixed) > 10, f"{group.name} is fixed without a reason: {group.fixed!r}"
        assert group.exact == (group.inexact is None)


def test_unknown_operations_are_listed_and_hold_what_they_touch() -> None:
    case = named("custom_operation")
    graph = niwaki.trace(case.make(), case.example())
    (unknown,) = graph.unknown
    assert "wobble" in unknown.operation and "variations.py:" in unknown.where
    (group,) = groups_on(graph, "conv2.weight:0")
    assert "unknown operation" in group.fixed and "wobble" in group.fixed and "variations.py:" in group.fixed


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_reach(case: Case) -> None:
    law(case)


def test_facts_are_complete() -> None:
    """Every kind of network that the zoo promises is there, and at least twenty-four in all."""
    assert len(ZOO) >= 24
    for fact in (
        "tokens",
        "attention",
        "grid",
        "recurrent",
        "shared",
        "inexact",
        "rigid",
        "inference",
        "data_dependent",
    ):
        assert any(fact in case.facts for case in ZOO), fact


def test_protected_layers_stay() -> None:
    case = named("residual_add")
    graph = niwaki.trace(case.make(), case.example(), protect=("conv1",))
    (group,) = groups_on(graph, "conv1.weight:0")
    assert group.fixed is not None and "protected" in group.fixed
    assert all(g.fixed is None for g in groups_on(graph, "conv2.weight:0"))


def test_a_layer_that_does_not_exist_cannot_be_protected() -> None:
    case = named("chain")
    with pytest.raises(niwaki.errors.InputError, match="conv9"):
        niwaki.trace(case.make(), case.example(), protect=("conv9",))
