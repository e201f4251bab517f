"""Bytes and peak memory of a plan, by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import niwaki
from niwaki.graph.memory import with_bytes, with_memory
from niwaki.measure import Bytes, Memory


class Residual(nn.Module):
    """Three layers; every tensor keeps its name until the end."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(4, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.third = nn.Linear(width, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(a)
        c = a + b
        return self.third(c)


class Frugal(Residual):
    """The same, each name taken again."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.second(x)
        return self.third(x)


X = torch.zeros(1, 4)


def cost(graph: niwaki.ChannelGraph, keep: int) -> dict[str, float]:
    """With the first `keep` of the hidden units."""
    alive = np.ones(graph.units.count, bool)
    (group,) = [group for group in graph.groups if group.fixed is None]
    alive[group.ids[keep:]] = False
    return graph.cost(alive)


@pytest.mark.parametrize(("net", "tensors"), [(Residual, 3 * 8 + 2), (Frugal, 3 * 8)])
def test_the_peak_of_a_residual_network(net: type[Residual], tensors: int) -> None:
    """Kept names: a, b, c and the output, 26 floats. Names taken again: a, b and their sum, 24; with the sum and the
    output it is only 10 later. Weights 4 x 8 + 8 x 8 + 8 x 2 = 112 floats, input 4."""
    graph = with_memory(niwaki.trace(net(), X))
    assert cost(graph, 8)["memory"] == 4 * (112 + 4 + tensors)
    assert cost(graph, 3)["memory"] == 4 * (4 * 3 + 3 * 3 + 3 * 2 + 4 + tensors - 3 * 5)
    assert Memory()(net(), X).value == 4 * (112 + 4 + tensors)
    assert Memory()(net(3), X).value == cost(graph, 3)["memory"]


def test_views_and_what_is_done_in_place_take_nothing() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6, bias=False), nn.Linear(3, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu_().view(2, 3)
            return self.second(x)

    graph = with_memory(niwaki.trace(Views(), X))  # 24 + 3 weights, input 4; 6, and then 6 + 2
    assert graph.cost(np.ones(graph.units.count, bool))["memory"] == 4 * (27 + 4 + 8) == Memory()(Views(), X).value


def test_bytes_are_those_of_all_parameters_and_buffers_at_their_types() -> None:
    """Half: 4 x 8 weights and 8 biases; batch norm 4 x 8 floats and a counter of 8 bytes; double: 8 x 2 + 2."""
    net = nn.Sequential(nn.Linear(4, 8).half(), nn.BatchNorm1d(8), nn.Linear(8, 2).double()).eval()
    cast = nn.Sequential(net[0], Cast(torch.float32), net[1], Cast(torch.float64), net[2])
    graph = with_bytes(niwaki.trace(cast, X.half(), device="cpu"))
    assert cost(graph, 8)["bytes"] == 2 * (32 + 8) + 4 * 4 * 8 + 8 + 8 * (16 + 2) == Bytes()(cast).value
    assert cost(graph, 5)["bytes"] == 2 * (20 + 5) + 4 * 4 * 5 + 8 + 8 * (10 + 2)


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


@pytest.mark.parametrize("budget", [niwaki.Budget(0.5, of="bytes"), niwaki.Budget(0.6, of="memory")], ids=str)
def test_budgets_of_bytes_and_memory_are_kept_and_filled(budget: niwaki.Budget) -> None:
    net = Residual(32)
    graph, how = niwaki.trace(net, X), niwaki.scores.Magnitude()
    scores = niwaki.score(graph, niwaki.collect(net, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, budget)
    limit = float(budget.keep) * plan.promised[f"{budget.of}_before"]
    (kept,) = plan.kept.values()
    full = with_memory(with_bytes(graph))
    assert plan.promised[budget.of] <= limit < cost(full, len(kept) + 1)[budget.of]
    small = niwaki.cut(net, plan)
    assert {"bytes": Bytes(), "memory": Memory()}[budget.of](small, X).value == plan.promised[budget.of]


def test_an_amount_is_an_amount() -> None:
    budget = niwaki.Budget.at_most(800.0, "memory")
    assert budget.limit(10_000) == 800.0 and budget.absolute
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(niwaki.errors.BudgetError):
            niwaki.Budget.at_most(wrong, "memory")


def test_what_was_not_measured_is_no_budget() -> None:
    net = Residual()
    graph, how = niwaki.trace(net, X), niwaki.scores.Magnitude()
    scores = niwaki.score(graph, niwaki.collect(net, graph, how.needs), how=how)
    with pytest.raises(niwaki.errors.BudgetError, match="nothing was measured on a target"):
        niwaki.choose(graph, scores, niwaki.Budget(0.5, of="latency"))
