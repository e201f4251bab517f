"""Densities of layers: by hand, against each other, and against every feasible change."""

import math
from typing import Any

import numpy as np
import pytest

from niwaki.budgets import ERK, EqualDensity, Layers, WaterFilling
from niwaki.errors import BudgetError, InputError

COSTS = Layers({"params": np.array([100.0, 400.0, 500.0])})


def objective(densities: np.ndarray) -> float:
    return float(np.log(densities).sum())


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [(300, (1, 0.25, 0.2)), (500, (1, 0.5, 0.4)), (600, (1, 0.625, 0.5)), (1000, (1, 1, 1)), (5000, (1, 1, 1))],
)
def test_water_filling_by_hand(budget: float, wanted: tuple[float, ...]) -> None:
    """Layers that are cut keep the same cost: 100, 200, 250 each."""
    assert WaterFilling()(COSTS, {"params": budget}) == pytest.approx(wanted, abs=1e-12)


def test_layers_that_may_grow() -> None:
    """600 / 3 = 200 each: twice the first layer. Objectives: log .4, log .3125, 3 log .6."""
    grown, cut = WaterFilling(cap=4)(COSTS, {"params": 600}), WaterFilling()(COSTS, {"params": 600})
    assert grown == pytest.approx((2, 0.5, 0.4))
    equal = EqualDensity()(COSTS, {"params": 600})
    assert equal == pytest.approx((0.6, 0.6, 0.6))
    assert [objective(p) for p in (grown, cut, equal)] == pytest.approx([-0.9163, -1.1632, -1.5325], abs=1e-4)
    assert WaterFilling(cap=1.5)(COSTS, {"params": 600}) == pytest.approx((1.5, 0.5625, 0.45))  # 600 - 150 = 2 x 225


def test_two_limits_by_hand() -> None:
    """P = (1, 4), F = (4, 1), 2.5 each: by symmetry one half; each alone would be (1, .375)."""
    layers = Layers({"params": np.array([1.0, 4.0]), "macs": np.array([4.0, 1.0])})
    assert WaterFilling()(layers, {"params": 2.5, "macs": 2.5}) == pytest.approx((0.5, 0.5), abs=1e-9)
    assert WaterFilling()(layers, {"params": 2.5, "macs": 5}) == pytest.approx((1, 0.375))
    assert WaterFilling()(layers, {"params": 5, "macs": 2.5}) == pytest.approx((0.375, 1))


def drawn(seed: int) -> tuple[Layers, np.random.Generator]:
    generator = np.random.default_rng(seed)
    return Layers({name: generator.uniform(0.1, 9, 12) for name in ("params", "macs")}), generator


@pytest.mark.parametrize("cap", [1.0, 3.0])
@pytest.mark.parametrize("names", [("params",), ("macs",), ("params", "macs")], ids="+".join)
def test_no_feasible_change_is_better(names: tuple[str, ...], cap: float) -> None:
    layers, generator = drawn(3)
    limits = {name: 0.35 * float(layers.costs[name].sum()) for name in names}
    best = WaterFilling(cap=cap)(layers, limits)
    for name in names:
        assert float(layers.costs[name] @ best) <= limits[name] * (1 + 1e-9)
    for _ in range(2000):
        other = np.clip(best * np.exp(generator.normal(0, 0.2, best.size)), 1e-6, cap)
        other /= max(1.0, *(float(layers.costs[name] @ other) / limits[name] for name in names))
        assert objective(other) <= objective(best) + 1e-9


def test_laws_of_the_program() -> None:
    """Order, scale, permutation, and what a tighter limit does."""
    layers, generator = drawn(5)
    limits = {name: 0.4 * float(costs.sum()) for name, costs in layers.costs.items()}
    found = WaterFilling()(layers, limits)
    scaled = Layers({"params": layers.costs["params"] * 7, "macs": layers.costs["macs"]})
    assert WaterFilling()(scaled, limits | {"params": limits["params"] * 7}) == pytest.approx(found, rel=1e-9)
    order = generator.permutation(found.size)
    mixed = Layers({name: costs[order] for name, costs in layers.costs.items()})
    assert WaterFilling()(mixed, limits) == pytest.approx(found[order], rel=1e-9)
    for name, costs in layers.costs.items():
        tight = WaterFilling()(layers, limits | {name: limits[name] * 0.8})
        assert objective(tight) < objective(found)
        assert float(costs @ tight) < float(costs @ found)
        for other, price in layers.costs.items():  # what is used of a limit never rises above it
            assert float(price @ tight) <= limits[other] * (1 + 1e-9)
    for alone in limits:  # with one limit alone, a smaller one takes from every layer, and so from every total
        less, more = (WaterFilling()(layers, {alone: limits[alone] * share}) for share in (0.8, 1.0))
        assert (less <= more + 1e-12).all()
    assert (
        objective(WaterFilling(cap=4)(layers, limits)) >= objective(found) >= objective(EqualDensity()(layers, limits))
    )


def test_layers_that_are_fixed_count_whole() -> None:
    """The second layer takes 400 of 650; 250 are left for 100 and 500: 100 and 150."""
    layers = Layers(COSTS.costs, free=np.array([True, False, True]))
    assert WaterFilling()(layers, {"params": 650}) == pytest.approx((1, 1, 0.3))
    assert EqualDensity()(layers, {"params": 700}) == pytest.approx((0.5, 1, 0.5))
    with pytest.raises(BudgetError, match="cost 400 alone"):
        WaterFilling()(layers, {"params": 400})


def test_erk_by_hand() -> None:
    """Two matrices 2 x 2 and 8 x 8: levels 4/4 = 1 and 16/64 = 1/4.

    t (4 x 1 + 64 / 4) = 20 t. A budget of 10: t = .5, densities .5 and .125. Of 34: the first is whole at t = 1 (20);
    30 are left for the second: 30/64.
    """
    layers = Layers({"params": np.array([4.0, 64.0])}, ((2, 2), (8, 8)))
    assert ERK()(layers, {"params": 10}) == pytest.approx((0.5, 0.125))
    assert ERK()(layers, {"params": 34}) == pytest.approx((1, 30 / 64))
    with pytest.raises(InputError, match="without shapes"):
        ERK()(COSTS, {"params": 10})


@pytest.mark.parametrize("cap", [0.5, math.nan, -1])
def test_caps_below_one_are_refused(cap: Any) -> None:
    with pytest.raises(InputError, match="cap"):
        WaterFilling(cap=cap)


def test_limits_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="no budget"):
        WaterFilling()(COSTS, {})
    with pytest.raises(InputError, match="known: params"):
        EqualDensity()(COSTS, {"latency": 1.0})
    with pytest.raises(InputError, match="three limits"):
        costs = np.ones(3)
        WaterFilling()(Layers({"a": costs, "b": costs, "c": costs}), {"a": 1, "b": 1, "c": 1})
