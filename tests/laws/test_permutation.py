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
            for member in group.members:
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
    """A random order of the units of every group of plain channels."""
    random = np.random.default_rng(seed)
    return {
        group.name: random.permutation(group.units)
        for group in graph.groups
        if group.fixed is None and group.kind == "channels" and group.units > 1
    }


def law(case: Case) -> None:
    model, example, graph = trace(case, exact=True)
    orders = orders_of(graph, seed=1)
    other = permuted(model, graph, orders)
    found = difference(outputs(model, fresh(example, 1)), outputs(other, fresh(example, 1)))
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
