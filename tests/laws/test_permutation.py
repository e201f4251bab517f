"""Law: permuting the model's channels changes nothing it computes, and permutes the scores the same way."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import niwaki
from laws.common import AnyTask, difference, fresh, needs_gradients, outputs, score_blocks, tensors_of, trace
from zoo import ZOO, Case


def permuted(model: nn.Module, graph: Any, orders: dict[str, np.ndarray]) -> nn.Module:
    """A copy in which unit `orders[group][i]` of each group stands where unit i stood, in every member."""
    model = copy.deepcopy(model)
    tensors = tensors_of(model)
    with torch.no_grad():
        for group in graph.groups:
            if group.name not in orders:
                continue
            order = orders[group.name]
            rows = {member.tensor for member in group.members if member.axis == 0}
            for member in group.members:
                if member.blocks > 1 and member.tensor in rows:
                    continue  # rows that move carry their block's inputs along
                tensor = tensors[member.tensor]
                flat = blocks_first(tensor, member)
                places = [member.index[member.unit == unit] for unit in range(group.units)]
                source, target = np.concatenate([places[u] for u in order]), np.concatenate(places)
                flat[torch.from_numpy(target.astype(np.int64))] = flat[
                    torch.from_numpy(source.astype(np.int64))
                ].clone()
                tensor.copy_(blocks_last(flat, member, tensor))
    return model


def blocks_first(tensor: Tensor, member: Any) -> Tensor:
    """`[blocks * size, ...]`: the member's axis first, once per block of axis 0."""
    if member.blocks == 1:
        return tensor.movedim(member.axis, 0).clone()
    parts = torch.stack(tensor.split(tensor.shape[0] // member.blocks))  # [blocks, rows, ...]
    return parts.movedim(member.axis + 1, 1).flatten(0, 1).clone()


def blocks_last(flat: Tensor, member: Any, like: Tensor) -> Tensor:
    if member.blocks == 1:
        return flat.movedim(0, member.axis)
    return flat.unflatten(0, (member.blocks, -1)).movedim(1, member.axis + 1).flatten(0, 1)


def orders_of(graph: Any, seed: int) -> dict[str, np.ndarray]:
    """A random order of the units of every group of plain channels, of those that are always computed with together.

    Units that some tensor of the forward holds without the others (half of a split) may fare otherwise than they: one
    half may be added to itself. Not of units that lie partly on padding: two of them may look alike, and yet one has
    its channel where the other has its zeros. They are told by having fewer positions on an axis than other units have
    there.
    """
    random = np.random.default_rng(seed)
    alike = fates(graph)
    most: dict[tuple[str, int], int] = {}
    for group in graph.groups:
        for member in group.members:
            place = member.tensor, member.axis
            most[place] = max(most.get(place, 0), int(np.bincount(member.unit).max()))
    return {
        group.name: within(alike[group.ids], random)
        for group in graph.groups
        if group.fixed is None
        and group.kind == "channels"
        and group.units > 1
        and all(np.bincount(m.unit).max() == most[m.tensor, m.axis] for m in group.members)
    }


def fates(graph: Any) -> np.ndarray:
    """A number for each unit, the same for units that the same tensors of the forward hold."""
    random = np.random.default_rng(0)
    number = np.zeros(graph.units.count + 1, dtype=np.uint64)
    held = {labels.tobytes(): labels for r in graph.records for value in r.outputs for labels in value.fields}
    for labels in held.values():
        with np.errstate(over="ignore"):
            number[np.unique(graph.units.unit_of[labels])] += random.integers(1, 1 << 62, dtype=np.uint64)
    return number


def within(marks: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A random order in which each place is taken by one of its own mark."""
    order = np.arange(marks.size)
    for mark in np.unique(marks):
        places = np.flatnonzero(marks == mark)
        order[places] = random.permutation(places)
    return order


def law(case: Case) -> None:
    model, example, graph = trace(case, exact=True)
    orders = orders_of(graph, seed=1)
    other = permuted(model, graph, orders)
    found = difference(outputs(model, fresh(example, 1)), outputs(other, fresh(example, 1)))
    if "ordered" in case.facts:
        assert found > 1e-3, "its units may be permuted after all"
        return
    assert found < 1e-9, f"permuting units changed the outputs by {found}"
    for how in score_blocks():
        if not how.needs or (needs_gradients(how) and "inference" in case.facts):
            continue  # a score that looks at nothing can follow nothing
        values = []
        for each in (model, other):
            batches = [example, fresh(example, 2)]
            evidence = niwaki.collect(each, graph, how.needs, batches=batches, loss=AnyTask(example).loss)
            values.append(niwaki.score(graph, evidence, how=how).values)
        before, after = values
        assert before.keys() == after.keys()
        for name, numbers in before.items():
            expected = numbers[torch.from_numpy(orders[name])] if name in orders else numbers
            scale = float(numbers.abs().max()) + 1e-30
            assert float((expected - after[name]).abs().max()) / scale < 1e-6, f"{how}: scores of {name} did not follow"
            assert numbers.shape == (graph.group(name).units,) and bool(torch.isfinite(numbers).all())


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_permutation(case: Case) -> None:
    law(case)


def test_rows_carry_their_blocks() -> None:
    """Groups with one output each: a row of the kernel and the inputs of its block are one unit."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, groups=4), nn.Conv2d(4, 2, 1)).double()
    example = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    other = permuted(model, niwaki.trace(model, example), {"0#2": np.array([2, 0, 1, 3])})
    assert torch.equal(other[1].weight, model[1].weight[[2, 0, 1, 3]])
    assert torch.equal(other[0].bias, model[0].bias[[4, 5, 0, 1, 2, 3, 6, 7]])
    assert difference(outputs(model, example), outputs(other, example)) < 1e-12
