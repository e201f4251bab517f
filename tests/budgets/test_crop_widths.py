"""From densities to channels: by hand, against a search, and on coupled widths."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from costed import chain, graph_of
from torch import Tensor, nn

import niwaki
from niwaki.budgets import DensityWidths, Pools, TargetWidths, WaterFilling, WidthProgram, pools_of
from niwaki.budgets.atoms import make_atoms
from niwaki.budgets.pools import to_limits
from niwaki.errors import InputError
from niwaki.graph.weights import streams, weights_of
from niwaki.scores import Scores


def neutral(graph: Any) -> Scores:
    ones = {g.name: torch.ones(g.units, dtype=torch.float64) for g in graph.groups if g.fixed is None}
    return Scores(ones, {"name": "none"})


def pooled(graph: Any) -> Pools:
    atoms, _ = make_atoms(graph, neutral(graph), grids="rows", exact_only=False, bundle="mean")
    return pools_of(graph, atoms, weights_of(graph), ("params", "macs"))


def shares(pools: Pools, **limits: float) -> np.ndarray:
    return WidthProgram()(pools, limits, least=1 / pools.sizes)


def test_a_chain_by_hand() -> None:
    """10-20-10: 400 weights, half is 200 = 20 x 10: D keeps one half; A takes sqrt(.5), 70.7 % of the weights."""
    pools = pooled(graph_of(chain(10, 20, 10), 1, 10))
    assert pools.costs["params"](np.array([0.5])) == 200
    assert shares(pools, params=200) == pytest.approx([0.5], abs=1e-6)
    densities = WaterFilling()(pools.layers, {"params": 200.0})
    assert densities == pytest.approx([0.5, 0.5])
    literal = DensityWidths("square_root")(pools, densities)
    assert literal == pytest.approx([0.7071], abs=1e-4)
    assert pools.costs["params"](literal) == pytest.approx(282.8, abs=0.1)
    assert to_limits(pools, literal, {"params": 200}, np.ones(1)) == pytest.approx([0.5])


def test_closed_rules_by_hand() -> None:
    """4-8-8-4, densities .25, .64, .5: A .5 and .8; B (.16)^(1/4) and (.32)^(1/4).

    C: x = log .25 and y = log .5 by the outer layers, x + y = log .64 by the inner one: least squares of three lines.
    """
    pools = pooled(graph_of(chain(4, 8, 8, 4), 1, 4))
    densities = np.array([0.25, 0.64, 0.5])
    assert DensityWidths("square_root")(pools, densities) == pytest.approx([0.5, 0.8])
    assert DensityWidths("neighbours")(pools, densities) == pytest.approx([0.16**0.25, 0.32**0.25])
    x = np.linalg.lstsq(np.array([[1.0, 0], [1, 1], [0, 1]]), np.log(densities), rcond=None)[0]
    assert DensityWidths("log_fit")(pools, densities) == pytest.approx(np.exp(x))
    consistent = np.array([0.5, 0.125, 0.25])  # q = .5, .25: they are found again
    assert DensityWidths("log_fit")(pools, consistent) == pytest.approx([0.5, 0.25])
    with pytest.raises(InputError, match="square_root"):
        DensityWidths("cube")  # type: ignore[arg-type]


def test_the_gradient_of_a_cost_is_its_slope() -> None:
    pools = pooled(graph_of(chain(3, 8, 6, 2, bias=True), 1, 3))
    at, step = np.array([0.6, 0.7]), 1e-6
    for cost in pools.costs.values():
        for pool in range(2):
            more, less = at.copy(), at.copy()
            more[pool] += step
            less[pool] -= step
            assert cost.gradient(at)[pool] == pytest.approx((cost(more) - cost(less)) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("limits", [{"params": 0.4}, {"macs": 0.3}, {"params": 0.5, "macs": 0.3}], ids=str)
def test_no_feasible_crop_is_better(limits: dict[str, float]) -> None:
    """Against random feasible shares, on a chain of convolutions whose MACs and parameters disagree."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, stride=2), nn.Conv2d(16, 32, 3), nn.Flatten(1),
        nn.Linear(32 * 9, 5),
    )  # fmt: skip
    graph = niwaki.trace(net, torch.zeros(1, 3, 13, 13))
    pools = pooled(graph)
    ones = np.ones(pools.sizes.size)
    allowed = {name: share * pools.costs[name](ones) for name, share in limits.items()}
    best = shares(pools, **allowed)
    assert all(pools.costs[name](best) <= limit * (1 + 1e-6) for name, limit in allowed.items())
    worth, generator = pools.slopes.sum(0), np.random.default_rng(0)
    for _ in range(500):
        other = np.clip(best * np.exp(generator.normal(0, 0.2, best.size)), 1 / pools.sizes, 1)
        other = to_limits(pools, other, allowed, ones)
        if (other >= 1 / pools.sizes).all():
            assert float(worth @ np.log(other)) <= float(worth @ np.log(best)) + 1e-6


class Residual(nn.Module):
    """A stream of 8 with two blocks, a depthwise filter, and two branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.wide, self.deep = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.back = nn.Conv2d(16, 8, 1)
        self.side = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.two(self.one(x).relu())
        x = x + self.back(self.deep(self.wide(x).relu()).relu())
        both: Tensor = torch.cat([x, self.side(x)], 1).mean((2, 3))
        return self.head(both)  # type: ignore[no-any-return]


def residual() -> tuple[nn.Module, Any, Pools]:
    torch.manual_seed(0)
    net = Residual()
    graph = niwaki.trace(net, torch.zeros(1, 3, 8, 8))
    return net, graph, pooled(graph)


def test_layers_of_coupled_widths_by_hand() -> None:
    """What each weight costs, and how far its axes are of a pool: 8 of the head's 12 inputs are the stream's."""
    _, graph, pools = residual()
    found = {weight.name: (weight.params, weight.macs) for weight in weights_of(graph)}
    assert found["one.weight"] == (12 * 8 * 9, 12 * 8 * 9 * 64)
    assert found["deep.weight"] == (16 * 9, 16 * 9 * 64)
    assert found["head.weight"] == (60, 60)
    sizes = pools.sizes.tolist()
    stream, inner, wide, side = (sizes.index(n) for n in (8, 12, 16, 4))
    rows = dict(zip(pools.names, pools.slopes, strict=True))
    assert rows["two.weight"][[stream, inner]].tolist() == [1, 1]
    assert rows["deep.weight"][wide] == 1 and rows["deep.weight"].sum() == 1  # linear in its width, not quadratic
    assert rows["head.weight"][[stream, side]] == pytest.approx([8 / 12, 4 / 12])
    held = streams(graph)
    assert {g.units for g in graph.groups if g.fixed is None and held[g.ids].all()} == {8}


def test_inside_blocks_a_width_is_the_root_of_both_densities() -> None:
    """With the stream whole, both convolutions of a block have one width: q = sqrt(p1 p2)."""
    torch.manual_seed(0)
    net = Residual()
    graph = niwaki.trace(net, torch.zeros(1, 3, 8, 8), protect=("stem", "two", "back"))
    pools = pooled(graph)
    densities = np.ones(len(pools.names))
    densities[pools.names.index("one.weight")], densities[pools.names.index("two.weight")] = 0.5, 0.32
    found = DensityWidths("neighbours", one_sided=True)(pools, densities)
    assert found[pools.sizes.tolist().index(12)] == pytest.approx(0.4)


@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_the_first_channels_stay_and_nothing_more_fits(of: str, keep: float) -> None:
    net, graph, pools = residual()
    limit = keep * pools.costs[of](np.ones(pools.sizes.size))
    found = shares(pools, **{of: limit})
    how = TargetWidths(tuple(found.tolist()))
    plan = niwaki.choose(graph, neutral(graph), niwaki.Budget(keep=keep, of=of), how=how)
    assert all(kept == tuple(range(len(kept))) for kept in plan.kept.values())
    small = niwaki.cut(net, plan)
    counted = niwaki.measure(small, torch.zeros(1, 3, 8, 8))[of].value
    assert counted == plan.promised[of] <= limit
    alive = niwaki.graph.plans.alive_of(graph, plan)
    for group in graph.groups:
        left = group.ids[~alive[group.ids]]
        if left.size:
            more = alive.copy()
            more[left[0]] = True
            assert graph.cost(more)[of] > limit


def test_target_widths_by_hand() -> None:
    """Two pools of 4 with shares 1 and .5 at 10 of 2 x 4 + 4 x 4 + 4 x 1 = 28 MACs: 2a + ab + b.

    Paces: a falls below 4 at 3.5/4, b at 3.5/2 (of .5 x 4 = 2). At pace 1: 4 and 2 (8 + 8 + 2 = 18); below 7/8: 3, 2
    (14); below 3/4: 3, 1 (6 + 3 + 1 = 10).
    """
    graph = graph_of(chain(2, 4, 4, 1), 1, 2)
    budget = niwaki.Budget(keep=10, of="macs")
    plan = niwaki.choose(graph, neutral(graph), budget, how=TargetWidths((1.0, 0.5)))
    assert {name: len(kept) for name, kept in plan.kept.items()} == {"0": 3, "1": 1}
    with pytest.raises(InputError, match="2 pools"):
        niwaki.choose(graph, neutral(graph), budget, how=TargetWidths((1.0,)))


def test_a_whole_network_fits() -> None:
    pools = pooled(graph_of(chain(2, 4, 4, 1), 1, 2))
    assert shares(pools, params=1000).tolist() == [1, 1]
    assert shares(pools, params=1).tolist() == [0.25, 0.25]  # the least there is: `choose` says that it can't be met
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert WidthProgram(steps=100)(pools, {"params": 14}, least=np.array([0.5, 0.25])).min() >= 0.25
