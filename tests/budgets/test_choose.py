"""Budgets met exactly as far as units allow: by hand and beside an exhaustive search."""

import re
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from costed import chain, chosen, graph_of, scored
from torch import nn

import niwaki
from niwaki import Budget
from niwaki.budgets import GlobalRank, Uniform
from niwaki.errors import BudgetError
from zoo import ZOO, Case

SHAPE = (1, 2)


def test_macs_by_hand() -> None:
    """2 -> 4 -> 1: 8 + 4 = 12 MACs, 3 for each unit. Half is 6: two units; the two highest stay."""
    plan = chosen(chain(2, 4, 1), SHAPE, [[0.1, 0.4, 0.3, 0.2]], Budget(keep=0.5))
    assert plan.kept == {"0": (1, 2)}
    assert (plan.promised["macs"], plan.promised["macs_before"]) == (6, 12)
    assert (plan.promised["units"], plan.promised["units_before"]) == (2, 4)


def test_a_budget_between_two_units_is_never_exceeded() -> None:
    """Limit 8 of 12: two units cost 6, three would cost 9."""
    plan = chosen(chain(2, 4, 1), SHAPE, [[0.1, 0.4, 0.3, 0.2]], Budget(keep=8, of="macs"))
    assert plan.kept == {"0": (1, 2)}
    assert chosen(chain(2, 4, 1), SHAPE, [[0.1, 0.4, 0.3, 0.2]], Budget(keep=9, of="macs")).kept == {"0": (1, 2, 3)}


@pytest.mark.parametrize(("keep", "units"), [(0.29, 29), (0.57, 57), (0.289, 28), (0.2999999, 29)])
def test_a_share_that_binary_misses_is_the_count_that_is_meant(keep: float, units: int) -> None:
    """0.29 * 100 and 0.57 * 100 are a little below 29 and 57 in binary."""
    plan = chosen(chain(2, 100, 1), SHAPE, [list(range(100))], Budget(keep=keep, of="units"))
    assert plan.promised["units"] == units


def test_parameters_with_biases_by_hand() -> None:
    """2 -> 4 -> 1 with biases: (8 + 4) + (4 + 1) = 17; a unit has 2 + 1 + 1 = 4, and one bias stays: 1 + 4
    n <= 10 gives 2.
    """
    plan = chosen(chain(2, 4, 1, bias=True), SHAPE, [[0.1, 0.4, 0.3, 0.2]], Budget(keep=10, of="params"))
    assert (plan.promised["params_before"], plan.promised["params"]) == (17, 9)
    assert plan.kept == {"0": (1, 2)}


def test_what_still_fits_comes_back() -> None:
    """2 -> 2 -> 3 -> 1 keeps 2 x a + a x b + b MACs. The lowest units go first, then what fits comes back.

    Scores: first layer (1, 2), second (3, 5, 4). Full: 4 + 6 + 3 = 13. Limit 8: removing unit 0 of the first layer
    (a = 1) leaves 2 + 3 + 3 = 8: enough, nothing else goes.
    """
    plan = chosen(
        chain(2, 2, 3, 1),
        SHAPE,
        [[1.0, 2.0], [3.0, 5.0, 4.0]],
        Budget(keep=8, of="macs"),
        how=GlobalRank(normalise="none"),
    )
    assert (plan.kept, plan.promised["macs"]) == ({"0": (1,)}, 8)
    # limit 7: 2 + b + b with b = 2 is 6; nothing comes back (b = 3 would be 8, a = 2 would be 4 + 4 + 2 = 10)
    plan = chosen(
        chain(2, 2, 3, 1),
        SHAPE,
        [[1.0, 2.0], [3.0, 5.0, 4.0]],
        Budget(keep=7, of="macs"),
        how=GlobalRank(normalise="none"),
    )
    assert (plan.kept, plan.promised["macs"]) == ({"0": (1,), "1": (1, 2)}, 6)


def test_a_unit_that_went_early_comes_back_if_it_fits() -> None:
    """Second layer scores lowest (its unit goes first), but one big step of the first layer leaves room for it again.

    5 -> 2 -> 4 -> 1: MACs 5 a + a b + b. Full 10 + 8 + 4 = 22; limit 14. Order: three of b (scores 1, 2, 3; one is its
    floor), then one of a. b = 3: 19, b = 2: 16, b = 1: 13 <= 14 stops: a = 2, b = 1. Nothing fits back (16 > 14).
    Limit 12: then a = 1, b = 1: 5 + 1 + 1 = 7; back come units of b, highest first: b = 2: 9, b = 3: 11, b = 4: 13 no.
    """
    values = [[8.0, 9.0], [1.0, 2.0, 3.0, 7.0]]
    how = GlobalRank(normalise="none")
    assert chosen(chain(5, 2, 4, 1), (1, 5), values, Budget(keep=14, of="macs"), how=how).kept == {"1": (3,)}
    plan = chosen(chain(5, 2, 4, 1), (1, 5), values, Budget(keep=12, of="macs"), how=how)
    assert (plan.kept, plan.promised["macs"]) == ({"0": (1,), "1": (1, 2, 3)}, 11)


@pytest.mark.filterwarnings("ignore::niwaki.errors.NothingChangedWarning")  # the last limit is all
@pytest.mark.parametrize("rule", [GlobalRank(), GlobalRank(per="macs"), Uniform()])
@pytest.mark.parametrize("of", ["macs", "params", "units"])
def test_no_removed_unit_would_still_fit(rule: Any, of: str) -> None:
    """Exhaustive: at every limit the plan holds it, and giving back any one removed unit would break it."""
    net = chain(3, 4, 3, 5, 2, bias=True)
    graph = graph_of(net, 1, 3)
    generator = torch.Generator().manual_seed(1)
    values = [torch.rand(n, generator=generator).tolist() for n in (4, 3, 5)]
    scores = scored(net, graph, values)
    full = graph.cost(np.ones(graph.units.count, bool))[of]
    for limit in range(1, full + 1):
        try:
            plan = niwaki.choose(graph, scores, Budget(keep=limit, of=of), how=rule)
        except niwaki.errors.BudgetError:
            continue
        widths = [len(plan.kept.get(name, range(n))) for name, n in (("0", 4), ("1", 3), ("2", 5))]
        assert cost(widths, of) == plan.promised[of] <= limit
        for i, most in enumerate((4, 3, 5)):
            wider = [w + (j == i) for j, w in enumerate(widths)]
            assert widths[i] == most or cost(wider, of) > limit


def cost(widths: list[int], of: str) -> int:
    a, b, c = widths
    if of == "units":
        return a + b + c
    macs = 3 * a + a * b + b * c + c * 2
    return macs if of == "macs" else macs + a + b + c + 2


def test_several_budgets_hold_jointly() -> None:
    """2 -> 4 -> 4 -> 1: 8 + 16 + 4 = 28 MACs, 8 units. Each alone is looser than both."""
    net, values = chain(2, 4, 4, 1), [[1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 3.5, 4.5]]
    both = chosen(net, SHAPE, values, (Budget(keep=0.5, of="macs"), Budget(keep=4, of="units")))
    assert both.promised["macs"] <= 14 and both.promised["units"] <= 4
    assert [b["of"] for b in both.budget] == ["macs", "units"]
    twice = chosen(net, SHAPE, values, [Budget(keep=0.9, of="macs"), Budget(keep=0.5, of="macs")])
    assert twice.promised["macs"] <= 14


@pytest.mark.parametrize("floor", [3, 0.75])
def test_floors(floor: Any) -> None:
    """Every group keeps 3 of 4 at least, as a count or a share."""
    values = [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]]
    plan = chosen(
        chain(2, 4, 4, 1), SHAPE, values, Budget(keep=6, of="units", floor=floor), how=GlobalRank(normalise="none")
    )
    assert plan.kept == {"0": (1, 2, 3), "1": (1, 2, 3)}
    with pytest.raises(niwaki.errors.BudgetError, match="the least that floors, multiples and fixed groups allow is 6"):
        chosen(chain(2, 4, 4, 1), SHAPE, values, Budget(keep=5, of="units", floor=floor))


@pytest.mark.parametrize(("floor", "least"), [(0.07, 7), (0.14, 14), (0.55, 55), (0.56, 56), (0.551, 56), (0.005, 1)])
def test_a_floor_is_rounded_up_once(floor: float, least: int) -> None:
    """Of 100 units; as floats 0.07, 0.14, 0.55 and 0.56 of 100 are a little more than they should be."""
    values = [[float(score) for score in range(100)]]
    plan = chosen(chain(2, 100, 1), SHAPE, values, Budget(keep=least, of="units", floor=floor))
    assert plan.kept == {"0": tuple(range(100 - least, 100))}


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("keep", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
def test_multiples(keep: float, equal: bool) -> None:
    """10 and 12 units in steps of 4: cut groups keep 8 or 4 of 10, 8 or 4 of 12; never 2, 6 or 10."""
    values = [[1.0] * 10, [1.0] * 12] if equal else [[float(i) for i in range(10)], [i + 0.5 for i in range(12)]]
    plan = chosen(chain(2, 10, 12, 1), SHAPE, values, Budget(keep=keep, of="units", multiple=4))
    assert plan.kept
    assert all(len(k) in (4, 8) for k in plan.kept.values())
    assert plan.promised["units"] <= keep * 22


def test_groups_smaller_than_the_multiple_stay_whole() -> None:
    plan = chosen(
        chain(2, 3, 16, 1),
        SHAPE,
        [[1.0, 2.0, 3.0], [float(i) for i in range(16)]],
        Budget(keep=0.6, of="units", multiple=8),
    )
    assert {name: len(k) for name, k in plan.kept.items()} == {"1": 8}


def test_exact_only_leaves_inexact_groups_whole_and_says_so() -> None:
    net = nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
    graph = graph_of(net, 1, 2)
    values = [[1.0] * 6, [1.0, 2.0, 3.0, 4.0]]
    plan = niwaki.choose(graph, scored(net, graph, values), Budget(keep=0.8, of="units"), exact_only=True)
    assert list(plan.kept) == ["2"] and plan.inexact == {}
    assert plan.decided_by["left_whole"]["0"].startswith("not exact: ")
    loose = niwaki.choose(graph, scored(net, graph, values), Budget(keep=0.5, of="units"))
    assert set(loose.inexact) == {"0"}


def test_keeping_everything_is_an_empty_plan() -> None:
    net = chain(2, 4, 1)
    graph = graph_of(net, *SHAPE)
    with pytest.warns(niwaki.errors.NothingChangedWarning, match="the whole model fits, macs 12 <= 12; do: give"):
        plan = niwaki.choose(graph, scored(net, graph, [[1.0, 2.0, 3.0, 4.0]]), Budget(keep=1.0))
    assert (plan.kept, plan.cuts, plan.promised["macs"]) == ({}, (), 12)


def test_the_plan_says_who_decided() -> None:
    plan = chosen(
        chain(2, 4, 1), SHAPE, [[1.0, 2.0, 3.0, 4.0]], Budget(keep=0.5, floor=2), how=GlobalRank(per="params")
    )
    assert plan.decided_by["rule"] == {"name": "GlobalRank", "normalise": "max", "per": "params"}
    assert plan.decided_by["score"]["name"] == "Random"
    assert plan.budget == ({"keep": 0.5, "of": "macs", "floor": 2, "multiple": 1},)


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    """2 -> 4 -> 1: one unit is 3 MACs of 12."""
    with pytest.raises(
        niwaki.errors.BudgetError,
        match=r"macs <= 2; found: macs: the least .* allow is 3 \(0\.250\); where: 1 of 2 groups",
    ):
        chosen(chain(2, 4, 1), SHAPE, [[1.0, 2.0, 3.0, 4.0]], Budget(keep=2, of="macs"))


def test_each_budget_says_its_own_least_in_whole_numbers() -> None:
    """1500 -> 1501 -> 1500: a unit is 3000 MACs; %g would print 4.503e+06 and 3.003e+06."""
    values = [[float(i) for i in range(1501)]]
    wanted = (
        r"macs <= 10, params <= 2; found: macs: the least [a-z, ]* 3000 \(0\.001\); params: the least [a-z, ]* 3000 "
    )
    with pytest.raises(niwaki.errors.BudgetError, match=wanted):
        chosen(chain(1500, 1501, 1500), (1, 1500), values, (Budget(keep=10, of="macs"), Budget(keep=2, of="params")))


@pytest.mark.filterwarnings("ignore::niwaki.errors.NothingChangedWarning")  # where all is fixed
@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_the_least_that_is_offered_is_accepted(case: Case) -> None:
    """Count and share of every kind of cost, fed back as they are printed."""
    model, example = case.make(), case.example()
    graph = niwaki.trace(model, example)
    how = niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    offered = 0
    for of in ("macs", "params", "units"):
        try:
            niwaki.choose(graph, scores, Budget(keep=1, of=of))
        except niwaki.errors.BudgetError as error:
            found = re.search(rf"{of}: the least .* allow is (\d+) \((\d\.\d+)\)", str(error))
            assert found, str(error)
            offered += 1
            count = niwaki.choose(graph, scores, Budget(keep=int(found[1]), of=of))
            share = niwaki.choose(graph, scores, Budget(keep=float(found[2]), of=of))
            assert count.promised[of] <= int(found[1])
            assert share.promised[of] <= float(found[2]) * share.promised[f"{of}_before"]
            with pytest.raises(niwaki.errors.BudgetError):
                niwaki.choose(graph, scores, Budget(keep=int(found[1]) - 1 or 0.0001, of=of))
    assert offered


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bundle": "median"}, "unknown bundle 'median'; found: known: sum, mean, max"),
        ({"how": "uniform"}, r"choose\(how='uniform'\); found: str; known: GlobalRank, .*Uniform"),
        ({"how": Uniform}, r"found: ABCMeta; known: GlobalRank, .*Uniform; do: pass a rule .* how=.*Uniform\(\)"),
    ],
    ids=["bundle", "rule by name", "rule not made"],
)
def test_settings_of_the_wrong_kind_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(niwaki.errors.InputError, match=message):
        chosen(chain(2, 4, 1), SHAPE, [[1.0] * 4], Budget(keep=0.5), **settings)


def test_nothing_to_cut() -> None:
    net = chain(2, 1)
    graph = graph_of(net, 1, 2)
    with pytest.raises(niwaki.errors.BudgetError, match="0 of"):
        niwaki.choose(graph, scored(net, graph, []), Budget(keep=0.5))


@pytest.mark.parametrize("budget", [(), []])
def test_no_budget_is_refused(budget: Any) -> None:
    with pytest.raises(niwaki.errors.InputError, match=r"budget"):
        chosen(chain(2, 4, 1), SHAPE, [[1.0] * 4], budget)


@pytest.mark.parametrize("budget", [0.5, "0.5", (0.5,), [Budget(keep=0.5), "x"], None])
def test_a_budget_of_the_wrong_kind_is_refused(budget: Any) -> None:
    with pytest.raises(niwaki.errors.InputError):
        chosen(chain(2, 4, 1), SHAPE, [[1.0] * 4], budget)


def test_unknown_grids_are_refused() -> None:
    with pytest.raises(niwaki.errors.InputError, match="known: rows, columns"):
        chosen(chain(2, 4, 1), SHAPE, [[1.0] * 4], Budget(keep=0.5), grids="cells")


WRONG = [
    {"keep": 0.0},
    {"keep": 1.5},
    {"keep": 0},
    {"keep": -3},
    {"keep": True},
    {"keep": "half"},
    {"keep": float("nan")},
    {"keep": None},
    {"keep": 0.5, "of": "joules"},
    {"keep": 0.5, "floor": 0},
    {"keep": 0.5, "floor": 1.5},
    {"keep": 0.5, "floor": -0.1},
    {"keep": 0.5, "multiple": 0},
    {"keep": 0.5, "multiple": 1.5},
    {"keep": 0.5, "floor": "x"},
    {"keep": float("inf")},
]


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_budgets_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(niwaki.errors.BudgetError, match="Budget"):
        Budget(**settings)


def test_costs_are_exact_for_every_choice_of_widths() -> None:
    """All 4 x 3 x 5 width triples of 3 -> 4 -> 3 -> 5 -> 2 against the formula."""
    graph = graph_of(chain(3, 4, 3, 5, 2, bias=True), 1, 3)
    groups = [g for g in graph.groups if g.fixed is None]
    for widths in product(range(1, 5), range(1, 4), range(1, 6)):
        alive = np.ones(graph.units.count, bool)
        for group, width in zip(groups, widths, strict=True):
            alive[group.ids[width:]] = False
        found = graph.cost(alive)
        assert {of: found[of] for of in ("macs", "params", "units")} == {
            of: cost(list(widths), of) for of in ("macs", "params", "units")
        }


def test_a_budget_out_of_reach_says_its_unit() -> None:
    with pytest.raises(BudgetError, match=r"memory <= \d+ bytes; found: memory: the least .* is \d+ bytes"):
        chosen(chain(2, 4, 1), SHAPE, [[0.1, 0.4, 0.3, 0.2]], Budget.at_most(1, "memory"))
