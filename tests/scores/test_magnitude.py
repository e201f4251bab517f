"""Norms of the weights, by hand on three units."""

from typing import Any

import pytest
import torch
from torch import nn

import niwaki
from niwaki.evidence.evidence import rows
from niwaki.scores import Magnitude


def net() -> nn.Sequential:
    """2 -> 3 -> 1: unit 0 has weights (3, 4), bias 1, read by 2; unit 1 all zero; unit 2 (1, -1), bias -5,
    read by -1.
    """
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, -1.0]]))
        model[0].bias.copy_(torch.tensor([1.0, 0.0, -5.0]))
        model[2].weight.copy_(torch.tensor([[2.0, 0.0, -1.0]]))
    return model


def scores(model: nn.Module, how: Any, example: torch.Tensor | None = None) -> dict[str, list[float]]:
    graph = niwaki.trace(model, torch.zeros(1, 2) if example is None else example)
    found = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    return {name: values.tolist() for name, values in found.values.items()}


# members of the group: 0.weight rows, 0.bias, 2.weight columns (biases count: their role is "out")
BY_HAND = {
    "joint 2": (Magnitude(p=2), [(9 + 16 + 1 + 4) ** 0.5, 0.0, (1 + 1 + 25 + 1) ** 0.5]),
    "joint 1": (Magnitude(p=1), [3 + 4 + 1 + 2, 0.0, 1 + 1 + 5 + 1]),
    "in": (Magnitude(p=2, over="in"), [2.0, 0.0, 1.0]),
    "out": (Magnitude(p=2, over="out"), [(9 + 16 + 1) ** 0.5, 0.0, (1 + 1 + 25) ** 0.5]),
    "sum": (Magnitude(p=2, merge="sum"), [5 + 1 + 2, 0.0, 2**0.5 + 5 + 1]),
    "mean": (Magnitude(p=1, merge="mean"), [(7 + 1 + 2) / 3, 0.0, (2 + 5 + 1) / 3]),
    "max": (Magnitude(p=2, merge="max"), [5.0, 0.0, 5.0]),
}


@pytest.mark.parametrize(("how", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_by_hand(how: Magnitude, expected: list[float]) -> None:
    (found,) = scores(net(), how).values()
    assert found == pytest.approx(expected)


def test_beside_a_plain_loop_on_a_convolution_with_norm() -> None:
    """Every number of every slice of the unit: filter, scale, what reads it. Shifts say nothing about size."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    (found,) = scores(model, Magnitude(), torch.zeros(1, 3, 8, 8)).values()
    for unit in range(5):
        total = 0.0
        for value in [
            *model[0].weight[unit].flatten().tolist(),
            model[1].weight[unit].item(),
            *model[2].weight[:, unit].flatten().tolist(),
        ]:
            total += value * value
        assert found[unit] == pytest.approx(total**0.5)


def test_grouped_convolutions_read_by_block() -> None:
    """4 -> 2 in 2 groups: input channel 2 belongs to the second block, position 0 there."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 4, 1, groups=2, bias=False), nn.Conv2d(4, 1, 1, bias=False)
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]).reshape(4, 2, 1, 1))
    graph = niwaki.trace(model, torch.zeros(1, 1, 2, 2))
    (member,) = [m for g in graph.groups for m in g.members if (m.tensor, m.axis) == ("1.weight", 1)]
    assert rows(model[1].weight.detach(), member, 4).tolist() == [[1, 3], [2, 4], [5, 7], [6, 8]]


def test_units_that_span_several_rows_are_joined() -> None:
    """Flatten after a convolution: channel c owns inputs 4 c to 4 c + 3 of the linear layer."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, 0.0]).reshape(2, 1, 1, 1))
        model[2].weight.copy_(torch.tensor([[1.0, 1, 1, 1, 0, 3, 0, 4]]))
    (found,) = scores(model, Magnitude(p=1), torch.zeros(1, 1, 2, 2)).values()
    assert found == [6.0, 7.0]


def test_other_orders_are_refused() -> None:
    with pytest.raises(niwaki.errors.InputError, match=r"Magnitude\(p=3\); found: orders 1 and 2 are known"):
        Magnitude(p=3)


def test_higher_is_keep_and_scaling_a_unit_up_raises_only_its_score() -> None:
    before = scores(net(), Magnitude())
    model = net()
    with torch.no_grad():
        model[0].weight[1] += 1
    (old,), (new,) = before.values(), scores(model, Magnitude()).values()
    assert new[1] > old[1] and (new[0], new[2]) == (old[0], old[2])
