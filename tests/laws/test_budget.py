"""Law: a budget is never exceeded, and filled: nothing that was removed could be given back within it."""

from typing import Any

import numpy as np
import pytest

import niwaki
from laws.common import budget_blocks, choose, has_free_units, random_scores, trace
from niwaki.budgets.choose import TIMES, priced
from niwaki.graph.plans import alive_of, with_slabs
from niwaki.units import BUDGET_KINDS, Budget
from zoo import ZOO, Case, named

BUDGETS = [
    *((Budget(keep=keep, of=of),) for of in BUDGET_KINDS if of not in TIMES for keep in (0.35, 0.6, 0.85)),
    (Budget(keep=0.6, of="macs"), Budget(keep=0.7, of="params")),
    (Budget(keep=0.95, of="macs"), Budget(keep=0.5, of="params")),
    (Budget(keep=0.9, of="params"), Budget(keep=0.5, of="units")),
]


def law(case: Case) -> None:
    model, _, graph = trace(case)
    if not has_free_units(graph):
        return
    graph = priced(graph, tuple(budget for budgets in BUDGETS for budget in budgets))
    met = 0
    for number, budgets in enumerate(BUDGETS):
        for rule in budget_blocks():
            for grids in ("rows", "columns"):
                scores = random_scores(model, graph, seed=number)
                try:
                    plan = niwaki.choose(graph, scores, budgets, how=rule, grids=grids)
                except niwaki.errors.BudgetError as error:
                    assert "least" in str(error), "a budget that cannot be met must say what can"
                    continue
                met += 1
                label = f"{budgets} by {rule} in {grids}"
                holds(plan, budgets, label)
                full(graph, plan, budgets, label)
    assert met, "no budget at all could be met"


def limits(plan: Any, budgets: tuple[Budget, ...]) -> dict[str, float]:
    return {b.of: b.limit(plan.promised[f"{b.of}_before"]) for b in budgets}


def holds(plan: Any, budgets: tuple[Budget, ...], label: str) -> None:
    for of, limit in limits(plan, budgets).items():
        assert plan.promised[of] <= limit, f"{label}: {plan.promised[of]} of {of}, allowed {limit}"


def full(graph: Any, plan: Any, budgets: tuple[Budget, ...], label: str) -> None:
    """Every smallest thing that went would break a budget if it came back."""
    alive = alive_of(graph, plan)
    assert {name: graph.cost(alive)[name] for name in limits(plan, budgets)} == {
        name: plan.promised[name] for name in limits(plan, budgets)
    }
    for back in returns(graph, alive):
        more = alive.copy()
        more[back] = True
        cost = graph.cost(with_slabs(graph, more))
        assert any(cost[of] > limit for of, limit in limits(plan, budgets).items()), (
            f"{label}: units {back.tolist()} could have stayed, {cost}"
        )


def returns(graph: Any, alive: np.ndarray) -> list[np.ndarray]:
    """Sets of removed units that could come back together: one channel, one row of a grid, one column of every row."""
    units = graph.units
    held = np.concatenate([group.ids for group in graph.groups])
    gone = np.intersect1d(np.flatnonzero(~alive), held)
    grid = units.in_row | units.in_column
    found = [np.array([u]) for u in gone if not grid[u]]
    cluster = clusters(graph)
    for number in np.unique(cluster[gone[grid[gone]]]):
        mine = gone[cluster[gone] == number]
        rows = [mine[units.row[mine] == label] for label in np.unique(units.row[mine])]
        columns = [mine[units.column[mine] == label] for label in np.unique(units.column[mine])]
        each = [row[units.column[row] == units.column[row[0]]] for row in rows]  # where rows keep columns of their own
        for back in (*rows, *columns, np.unique(np.concatenate(each))):
            more = alive.copy()
            more[back] = True
            if is_grid(graph, with_slabs(graph, more), cluster == number):
                found.append(back)
    return found


def clusters(graph: Any) -> np.ndarray:
    """Number of the cluster of each unit: units tied by rows, by columns or by lying in one grid."""
    number = np.arange(graph.units.count)
    while True:
        before = number.copy()
        for labels in (graph.units.row, graph.units.column, graph.units.classes):
            least = np.full(int(labels.max(initial=0)) + 1, graph.units.count)
            np.minimum.at(least, labels, number)
            number = least[labels]
        if np.array_equal(before, number):
            return number


def is_grid(graph: Any, alive: np.ndarray, inside: np.ndarray) -> bool:
    """Whether the units inside are a grid still: rows live or die whole, or columns do and every row has as many."""
    units = graph.units
    for view in units.grids:  # [rows, columns]: what a forward views as a grid must be one again
        kept = alive[view].sum(1)
        if np.unique(kept[kept > 0]).size > 1:
            return False
    for stack in units.stacks:  # [grids, rows]: and a stack of grids as many rows of each
        kept = alive[stack].sum(1)
        if np.unique(kept[kept > 0]).size > 1:
            return False
    ids = np.flatnonzero(inside & units.in_row)
    if whole(units.row[ids], alive[ids]):
        return True
    ids = np.flatnonzero(inside & units.in_column & ~units.column_frozen)
    if not whole(units.column[ids], alive[ids]):
        return False
    for group in graph.groups:
        ids = group.ids[inside[group.ids] & units.in_row[group.ids]]
        _, row = np.unique(units.row[ids], return_inverse=True)
        counts = np.bincount(row, weights=alive[ids])
        if counts.size and counts.min() != counts.max():
            return False
    return True


def whole(labels: np.ndarray, alive: np.ndarray) -> bool:
    """Whether what carries one label is alive or dead together."""
    _, place = np.unique(labels, return_inverse=True)
    counts, sizes = np.bincount(place, weights=alive), np.bincount(place)
    return bool(((counts == 0) | (counts == sizes)).all())


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_budget(case: Case) -> None:
    law(case)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_floors_and_multiples(case: Case) -> None:
    model, _, graph = trace(case)
    if not has_free_units(graph):
        return
    settings: list[dict[str, Any]] = [{"floor": 0.5}, {"floor": 3}, {"multiple": 2}, {"multiple": 4, "floor": 0.3}]
    for wish in settings:
        plan, budget = smallest(graph, random_scores(model, graph, 0), wish)
        for name, keep in plan.kept.items():
            group = graph.group(name)
            least = budget.floor * group.units if isinstance(budget.floor, float) else budget.floor
            assert len(keep) >= min(least, group.units), f"{budget}: {name} keeps {len(keep)} of {group.units}"
            assert len(keep) % budget.multiple == 0, f"{budget}: {name} keeps {len(keep)}"


def smallest(graph: Any, scores: Any, wish: dict[str, Any]) -> tuple[Any, Budget]:
    """The plan for the smallest share that can be met."""
    for tenths in range(1, 11):
        budget = Budget(keep=tenths / 10, of="units", **wish)
        try:
            return choose(graph, scores, budget, how=budget_blocks()[0]), budget
        except niwaki.errors.BudgetError:
            continue
    raise AssertionError(f"{wish}: even keeping everything was refused")


def test_a_count_is_a_limit_too() -> None:
    model, _, graph = trace(named("chain"))
    plan = niwaki.choose(graph, random_scores(model, graph, 0), Budget(keep=graph.params // 2, of="params"))
    assert plan.promised["params"] <= graph.params // 2


@pytest.mark.parametrize("name", ["only_one_layer", "chain"])
def test_what_cannot_be_met_is_refused(name: str) -> None:
    model, _, graph = trace(named(name))
    with pytest.raises(niwaki.errors.BudgetError, match="least"):
        niwaki.choose(graph, random_scores(model, graph, 0), Budget(keep=1, of="macs"))
