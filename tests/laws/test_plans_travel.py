"""Law: a plan is a file: it survives JSON, cuts a fresh copy, is usable without niwaki, and refuses other models."""

import json
from typing import Any

import pytest
import torch
from torch import nn

import niwaki
from laws.common import apply_cuts, closest, cuts_by_tensor, outputs, plans, random_scores, same_bits, tensors_of, trace
from zoo import ZOO, Case, named, randomize_


def law(case: Case) -> None:
    model, example, graph = trace(case)
    for label, plan in plans(model, graph):
        text = plan.to_json()
        back = niwaki.Plan.from_json(text)
        assert back.to_json() == text, f"{label}: reading and writing changed the plan"
        assert json.loads(text)["cuts"] == json.loads(json.dumps(list(plan.cuts)))
        whole(graph, plan)
        small = niwaki.cut(model, plan)
        by_hand(model, small, json.loads(text)["cuts"])
        for each in (niwaki.cut(model, back), niwaki.cut(fresh_copy(case, model), back)):
            live = tensors_of(small)
            assert all(same_bits(t, live[name]) for name, t in tensors_of(each).items()), f"{label}: tensors differ"
            pairs = zip(outputs(small, example), outputs(each, example), strict=True)
            assert all(same_bits(a, b) for a, b in pairs), f"{label}: outputs differ"
        break  # one plan of each network tells it all


def fresh_copy(case: Case, model: nn.Module) -> nn.Module:
    """The model built anew, with the same values."""
    copy = randomize_(case.make(), seed=999)
    values = tensors_of(model)
    with torch.no_grad():
        for name, tensor in tensors_of(copy).items():
            tensor.copy_(values[name])
    return copy


def by_hand(model: nn.Module, small: nn.Module, cuts: list[dict[str, Any]]) -> None:
    """The plain data in `cuts`, applied with `index_select`, gives the small model's tensors, bit for bit.

    Only where a call derives a factor from a width (attention's default scale) some slices of a weight are scaled to
    make up for it; the surgery lists them.
    """
    tensors = tensors_of(model)
    by_tensor: dict[str, list[dict[str, Any]]] = {}
    for entry in cuts:
        by_tensor.setdefault(entry["tensor"], []).append(entry)
    scaled: dict[str, list[Any]] = {}
    for entry in niwaki.surgery.surgery_of(small).scaled:
        scaled.setdefault(entry["tensor"], []).append(entry)
    for name, tensor in tensors_of(small).items():
        expected = apply_cuts(tensors[name].detach(), by_tensor.get(name, []))
        assert expected.shape == tensor.shape, f"{name}: {tuple(tensor.shape)}, by hand {tuple(expected.shape)}"
        for entry in scaled.get(name, ()):
            expected = expected.clone()
            places = torch.tensor(entry["positions"])
            expected.movedim(entry["axis"], 0)[places] *= entry["factor"]
        close = torch.allclose(expected, tensor, rtol=1e-6, atol=0) if name in scaled else same_bits(expected, tensor)
        assert close, f"{name} differs from what index_select gives"


def whole(graph: Any, plan: Any) -> None:
    """`cuts` is what `kept` says, member by member, and nothing else."""
    expected: dict[tuple[str, int], set[int]] = {}
    for group in graph.groups:
        keep = set(plan.kept.get(group.name, range(group.units)))
        for member in group.members:
            gone = {int(i) for i, unit in zip(member.index, member.unit, strict=True) if int(unit) not in keep}
            expected.setdefault((member.tensor, member.axis), set()).update(gone)
    sizes = {(m.tensor, m.axis): m.blocks for g in graph.groups for m in g.members}
    found = {}
    aliases = {alias: first for first, every in graph.names.items() for alias in every}
    for name, entries in cuts_by_tensor(plan).items():
        for entry in entries:
            if "values" in entry:  # a table of positions; that it still picks the right ones is for the judge to see
                continue
            key = (aliases[name], entry["axis"])
            width = graph.shapes[aliases[name]][entry["axis"]]
            lists = entry["keep"] if sizes[key] > 1 else [entry["keep"]]
            kept = {block * width + i for block, keep in enumerate(lists) for i in keep}
            found[key] = set(range(width * sizes[key])) - kept
    assert found == {key: gone for key, gone in expected.items() if gone}


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_plans_travel(case: Case) -> None:
    law(case)


def some_plan(name: str = "chain") -> tuple[nn.Module, Any]:
    model, _, graph = trace(named(name))
    return model, closest(graph, random_scores(model, graph, 0), 0.5, of="macs")[0]


@pytest.mark.parametrize("other", ["residual_add", "bare_batch_norm", "gpt"])
def test_another_model_is_refused(other: str) -> None:
    _, plan = some_plan()
    stranger = named(other).make()
    before = {name: t.clone() for name, t in tensors_of(stranger).items()}
    for verb in (niwaki.cut, niwaki.cut_, niwaki.mask):
        with pytest.raises(niwaki.errors.PlanMismatchError):
            verb(stranger, plan)
    assert all(same_bits(t, before[name]) for name, t in tensors_of(stranger).items()), "a refused model was changed"


def test_a_model_that_was_cut_already_is_refused() -> None:
    model, plan = some_plan()
    small = niwaki.cut(model, plan)
    with pytest.raises(niwaki.errors.PlanMismatchError):
        niwaki.cut(small, plan)


@pytest.mark.parametrize(
    "damage", ["truncated", "not json", "no cuts", "unit out of range", "position out of range", "a list"]
)
def test_damaged_plans_are_refused(damage: str) -> None:
    model, plan = some_plan()
    text = plan.to_json()
    data = json.loads(text)
    if damage == "truncated":
        text = text[: len(text) // 2]
    elif damage == "not json":
        text = "plan"
    elif damage == "no cuts":
        del data["cuts"]
        text = json.dumps(data)
    elif damage == "unit out of range":
        next(iter(data["groups"].values()))["keep"][-1] = 10**6
        text = json.dumps(data)
    elif damage == "position out of range":
        data["cuts"][0]["keep"][-1] = 10**6
        text = json.dumps(data)
    else:
        text = json.dumps([data])
    with pytest.raises((niwaki.errors.FileDamagedError, niwaki.errors.PlanMismatchError)):
        niwaki.cut(model, niwaki.Plan.from_json(text))
