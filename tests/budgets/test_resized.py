"""Widths above those there are: by hand on a chain, and where steps and pools that stay bind."""

from typing import Any

import numpy as np
import pytest
import torch
from costed import chain, graph_of
from torch import nn

import niwaki
from niwaki.budgets import WidthProgram, pools_of
from niwaki.budgets.atoms import make_atoms
from niwaki.budgets.resized import Near, may_grow, resized, times_at
from niwaki.errors import BudgetError
from niwaki.graph.weights import weights_of
from niwaki.scores import Scores


def parts(graph: Any) -> tuple[Any, Any]:
    ones = {g.name: torch.ones(g.units, dtype=torch.float64) for g in graph.groups if g.fixed is None}
    atoms, _ = make_atoms(graph, Scores(ones, {"name": "none"}), grids="rows", exact_only=False, bundle="mean")
    return atoms, pools_of(graph, atoms, weights_of(graph), ("params", "macs"))


def widths(
    graph: Any, shares: list[float], limit: float, *more: niwaki.Budget, least: Any = None, **given: Any
) -> list[int]:
    atoms, pools = parts(graph)
    least = 1 / pools.sizes if least is None else np.array(least)
    near = Near(pools, np.array(shares), least, most=np.array(given.pop("most", [2.0] * pools.sizes.size)))
    budgets = (niwaki.Budget.at_most(limit, "params", **given), *more)
    plan = resized(graph, atoms, near, budgets, decided_by={})
    assert plan.promised["params"] <= limit
    return [len(plan.kept.get(g.name, range(g.units))) for g in graph.groups if g.fixed is None]


def test_the_program_widens_where_it_is_worth_it() -> None:
    """2-a-b-1 from 2-4-4-1: 2a + ab + b <= 28 and the largest ab: 2a = b, a^2 + 2a = 14, a = 2.8730.

    With b at most 4 times as wide that is free; at most 1.25 x 4 = 5, 2a + 5a + 5 = 28 and a = 23/7.
    """
    _, pools = parts(graph_of(chain(2, 4, 4, 1), 1, 2))
    least = np.array([0.25, 0.25])
    free = WidthProgram()(pools, {"params": 28}, least=least, most=np.array([4.0, 4.0]))
    assert free == pytest.approx([2.8730 / 4, 2 * 2.8730 / 4], abs=1e-4)
    capped = WidthProgram()(pools, {"params": 28}, least=least, most=np.array([1.25, 1.25]))
    assert capped == pytest.approx([23 / 28, 1.25], abs=1e-4)
    whole = WidthProgram()(pools, {"params": 1000}, least=least, most=np.array([2.0, 1.0]))
    assert whole.tolist() == [2, 1]


def test_rounding_by_hand() -> None:
    """(2.87, 5.75) is (3, 6) and costs 30. To take one of b loses 2 log 6/5 for 4, one of a 2 log 3/2 for 8: (3, 5)
    costs 26, and nothing fits any more. (1, 1) costs 4, of 21 the dearest for its cost comes first, and so on.
    """
    graph = graph_of(chain(2, 4, 4, 1), 1, 2)
    assert widths(graph, [2.873 / 4, 5.746 / 4], 28) == [3, 5]
    found = widths(graph, [0.25, 0.25], 21)
    assert 2 * found[0] + found[0] * found[1] + found[1] <= 21
    for more in ((1, 0), (0, 1)):
        a, b = found[0] + more[0], found[1] + more[1]
        assert 2 * a + a * b + b > 21


def test_steps_and_pools_that_stay() -> None:
    graph = graph_of(chain(2, 4, 4, 1), 1, 2)
    assert widths(graph, [1.5, 1.5], 60, multiple=2) == [6, 6]  # 12 + 36 + 6 = 54; 6, 8 costs 68 and 8, 6 costs 70
    # of 50, 4 of a save 16 for 2 log 6/4, 4 of b 14: a, which leaves room for 8 of b
    assert widths(graph, [1.5, 1.5], 50, multiple=2) == [4, 8]
    assert widths(graph, [1.5, 1.5], 50, multiple=2, most=[2.0, 1.0]) == [6, 4]  # 8, 4 costs 52


def test_multiples_never_lift_a_pool_above_its_cap() -> None:
    """Up to 4 x 1.2 there is no multiple of 8 for a pool of 4: it stays. Up to 4 x 2 there is 8."""
    graph = graph_of(chain(2, 4, 20, 1), 1, 2)
    assert widths(graph, [1.2, 1.2], 10_000, multiple=8, most=[1.2, 1.2]) == [4, 24]
    assert widths(graph, [1.0, 1.0], 10_000, multiple=8, most=[2.0, 1.0]) == [8, 20]
    assert widths(graph, [1.0, 1.0], 8 + 80 + 20, multiple=8, most=[1.2, 1.2]) == [4, 20]
    # 8 + 64 + 16 = 88; the width that it has lies between two multiples
    assert widths(graph, [1.2, 1.2], 8 + 80 + 19, multiple=8, most=[1.2, 1.2]) == [4, 16]


def test_shares_between_two_widths() -> None:
    """1.2 x 4 and 1.2 x 20 are at most 4 and 24; 0.3 x 4 is at least 2: 2-2-2-1 costs 10. Of multiples of 4 it is at
    least 4: 2-4-4-1 costs 28."""
    wide = graph_of(chain(2, 4, 20, 1), 1, 2)
    assert widths(wide, [1.2, 1.2], 10_000, most=[1.2, 1.2]) == [4, 24]
    graph, least = graph_of(chain(2, 4, 4, 1), 1, 2), [0.3, 0.3]
    assert widths(graph, [1.0, 1.0], 10, least=least) == [2, 2]
    with pytest.raises(BudgetError, match="fixed groups allow is 10"):
        widths(graph, [1.0, 1.0], 9, least=least)
    with pytest.raises(BudgetError, match="fixed groups allow is 28"):
        widths(graph, [1.0, 1.0], 27, least=least, multiple=4)


def test_several_budgets() -> None:
    """Multiples of 2 and of 3 are multiples of 6; of two limits on one cost, and of limits on two, all hold."""
    at_most, graph = niwaki.Budget.at_most, graph_of(chain(2, 6, 6, 1), 1, 2)
    # 9, 9 would cost 108; of multiples of 6, 12, 12 cost 180, 6, 12 cost 96 and 12, 6 cost 102
    assert widths(graph, [1.5, 1.5], 108, at_most(10_000, "macs", multiple=3), multiple=2) in ([6, 12], [12, 6])
    for first, second in ((54, 1000), (1000, 54)):  # 12 + 36 + 6 = 54
        assert widths(graph, [1.0, 1.0], first, at_most(second, "params"), multiple=6) == [6, 6]
        assert widths(graph, [1.0, 1.0], first, at_most(second, "macs"), multiple=6) == [6, 6]


def test_the_nearest_width_is_the_first_to_be_tried() -> None:
    """20 are asked for of 20, and no multiple of 8 is as near: there is no room for 8 or 16 of a besides."""
    graph = graph_of(chain(2, 4, 20, 1), 1, 2)
    assert widths(graph, [1.0, 1.0], 8 + 80 + 20, multiple=8) == [4, 20]


def test_of_equals_the_first_grows() -> None:
    """Two pools of 4 that cost and are worth the same, with room for one step."""
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 3, bias=False))
    twins = nn.ModuleDict({"a": net, "b": nn.Sequential(*[nn.Linear(*size, bias=False) for size in ((2, 4), (4, 3))])})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = twins

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(part(x) for part in self.both.values())

    graph = graph_of(Both(), 1, 2)
    assert widths(graph, [1.0, 1.0], 45) == [5, 4]


def test_what_is_copied_first() -> None:
    """Of four atoms at width six the first two are there twice, at three the last is gone, at nine one thrice."""
    graph = graph_of(chain(2, 4, 1), 1, 2)
    atoms, _ = parts(graph)
    group = next(g for g in graph.groups if g.fixed is None)
    wanted = {6: [2, 2, 1, 1], 3: [1, 1, 1, 0], 9: [3, 2, 2, 2]}
    for width, often in wanted.items():
        assert times_at(graph, atoms, np.array([width]))[group.ids].tolist() == often


def test_grids_stay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1))
    graph = graph_of(net, 1, 3, 8, 8)
    atoms, _ = parts(graph)
    free = dict(zip(atoms.pools, may_grow(graph, atoms).tolist(), strict=True))
    assert free == {"0#2": False, "2": True}


def test_what_cannot_be_met() -> None:
    with pytest.raises(BudgetError, match="the least that floors and fixed groups allow is 4"):
        widths(graph_of(chain(2, 4, 4, 1), 1, 2), [1.0, 1.0], 3)
