"""Widths above and below those there are: whole numbers near given shares that meet every limit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from niwaki.budgets.pools import Pools
from niwaki.budgets.rule import Atoms
from niwaki.errors import BudgetError
from niwaki.graph import ChannelGraph
from niwaki.graph.copies import growable
from niwaki.graph.plans import plan_of
from niwaki.plan import Plan
from niwaki.units import Budget


def may_grow(graph: ChannelGraph, atoms: Atoms) -> np.ndarray:
    """Pools of which every atom may be copied; bool `[pools]`."""
    free = growable(graph)
    found = np.ones(len(atoms.pools), bool)
    for number in range(len(atoms.units)):
        found[atoms.pool[number]] &= bool(free[atoms.units[number]].all())
    return found


def times_at(graph: ChannelGraph, atoms: Atoms, widths: np.ndarray) -> np.ndarray:
    """How often each unit is there when pools have so many atoms; int64 `[units]`. The first atoms stay, and they are
    the first to be copied.

    Args:
        widths: int64 `[pools]`.
    """
    times = np.ones(graph.units.count, np.int64)
    for pool in range(len(atoms.pools)):
        members = np.flatnonzero(atoms.pool == pool)
        often, more = divmod(int(widths[pool]), members.size)
        for place, number in enumerate(members.tolist()):
            times[atoms.units[number]] = often + (place < more)
    return times


@final
@dataclass(frozen=True, eq=False)
class Near:
    """Shares of pools, not yet whole numbers of atoms."""

    pools: Pools
    shares: np.ndarray
    """Of the pools' atoms; float64 `[pools]`."""
    least: np.ndarray
    """The smallest shares; float64 `[pools]`."""
    most: np.ndarray
    """The largest, not below `least`; float64 `[pools]`."""


def resized(
    graph: ChannelGraph, atoms: Atoms, near: Near, budgets: tuple[Budget, ...], *, decided_by: dict[str, Any]
) -> Plan:
    """The plan of the widths next to `near` that meet all budgets and leave no room for a step more.

    Starts at the rounded shares. While a limit is broken, the pool shrinks by a step whose log density is the cheapest
    for what it saves; then those grow, the dearest for what they cost first, as long as any fits. A step goes
    to the next multiple that is asked for, or to the width that the pool has, which it may always keep.

    Raises:
        BudgetError: even the smallest shares cost too much.
    """
    before = graph.cost(np.ones(graph.units.count, bool))
    limits: dict[str, float] = {}
    for budget in budgets:
        limits[budget.of] = min(limits.get(budget.of, np.inf), budget.limit(before[budget.of]))
    steps = np.full(len(atoms.pools), np.lcm.reduce([budget.multiple for budget in budgets]))
    if atoms.takes is not None and atoms.multiples is not None:
        for number, pool in enumerate(atoms.pool.tolist()):
            steps[pool] = np.lcm.reduce([steps[pool], *atoms.multiples[atoms.takes[number].indices]])
    times = times_at(graph, atoms, _widths(graph, atoms, near, limits, steps))
    return plan_of(graph, times, budgets=budgets, decided_by=decided_by)


def _widths(
    graph: ChannelGraph, atoms: Atoms, near: Near, limits: Mapping[str, float], steps: np.ndarray
) -> np.ndarray:
    """Atoms of every pool; int64 `[pools]`."""
    pools, shares = near.pools, near.shares
    least = np.ceil(near.least * pools.sizes - 1e-9).astype(np.int64)
    most = np.floor(near.most * pools.sizes + 1e-9).astype(np.int64)
    sizes = np.maximum(pools.sizes, 1)
    worth = np.maximum(pools.slopes[pools.layers.may()].sum(0), 1e-3)
    low, high = -(-least // steps) * steps, most // steps * steps
    wanted, own = shares * sizes, pools.sizes
    widths = np.clip(np.round(wanted / steps).astype(np.int64) * steps, low, np.maximum(high, low))
    widths = np.where((high < low) | (np.abs(wanted - own) < np.abs(wanted - widths)), own, widths)

    def beside(pool: int, change: int) -> int:
        """The next width up or down: a multiple, or the pool's own; the present one where there is none."""
        now, step = int(widths[pool]), int(steps[pool])
        to = (now // step + 1) * step if change > 0 else (-(-now // step) - 1) * step
        if min(now, to) < own[pool] < max(now, to) or not low[pool] <= to <= high[pool]:
            to = int(own[pool]) if (own[pool] - now) * change > 0 else to
        return to if low[pool] <= to <= high[pool] or to == own[pool] else now

    def true(now: np.ndarray) -> dict[str, float]:
        found = graph.cost(times_at(graph, atoms, now))
        return {name: found[name] for name in limits}

    def fits(costs: Mapping[str, float]) -> bool:
        return all(costs[name] <= limit for name, limit in limits.items())

    def rough(now: np.ndarray) -> float:
        """What is used of the limits together."""
        return sum(pools.costs[name](now / sizes) / limit for name, limit in limits.items())

    def best(change: int, fit: Callable[[np.ndarray], bool]) -> np.ndarray | None:
        """The widths after the best step up or down, or None where none may be made."""
        found: list[tuple[float, int]] = []
        base = rough(widths)
        for pool in range(widths.size):
            to = beside(pool, change)
            if to != widths[pool]:
                after = widths.copy()
                after[pool] = to
                cost = abs(rough(after) - base)
                value = worth[pool] * abs(np.log(to / widths[pool]))
                found.append((value / max(cost, 1e-30), pool))
        for _, pool in sorted(found, key=lambda one: (-change * one[0], one[1])):
            after = widths.copy()
            after[pool] = beside(pool, change)
            if fit(after):
                return after
        return None

    while not fits(true(widths)):
        smaller = best(-1, lambda after: True)
        if smaller is None:
            costs = true(widths)
            raise BudgetError(
                ", ".join(f"{name} <= {int(limit)}" for name, limit in limits.items()),
                found="; ".join(f"{name}: the least that floors and fixed groups allow is {int(costs[name])}"
                                for name in limits),
                do="raise keep, or lower floor",
            )  # fmt: skip
        widths = smaller
    while (larger := best(1, lambda after: fits(true(after)))) is not None:
        widths = larger
    return widths
