"""`choose`: scores and budgets become a plan."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import get_args

import numpy as np

from niwaki.budgets.atoms import Blocks, Bundle, Grids, Splits, make_atoms
from niwaki.budgets.engine import Ledger, refill, remove
from niwaki.budgets.global_rank import GlobalRank
from niwaki.budgets.rule import Atoms, Parts, Rule, Savings, runs
from niwaki.errors import BudgetError, InputError, NothingChangedWarning, Setting, UnknownNameError
from niwaki.graph import ChannelGraph
from niwaki.graph.memory import with_bytes, with_memory
from niwaki.graph.plans import plan_of
from niwaki.plan import Plan
from niwaki.scores import Scores
from niwaki.scores.score import describe
from niwaki.units import Budget, budgets_of, share_up, unit_of

_DEFAULT = GlobalRank()
TIMES = ("latency", "energy")
"""Costs that are measured, and may be higher for fewer units."""
Worth = Callable[[np.ndarray], np.ndarray]


def choose(
    graph: ChannelGraph,
    scores: Scores,
    budget: Budget | tuple[Budget, ...] | list[Budget],
    *,
    how: Rule = _DEFAULT,
    exact_only: bool = False,
    grids: Grids = "rows",
    bundle: Bundle = "mean",
    blocks: Blocks = "keep",
    splits: Splits = "free",
) -> Plan:
    """Which units stay so that every budget holds; as many as fit stay. Warns where the whole model fits.

    Args:
        budget: one, or several that hold jointly.
        how: the order in which units go.
        exact_only: leave groups whole whose removal changes more than zeroing does.
        grids: what goes where an axis is a grid: whole rows (heads, groups), or equally many columns of every row.
            A grid that allows only one manner is cut in that one.
        bundle: how the scores of the units of a row (or of one column of every row) become one.
        blocks: residual blocks that may be left out whole (`graph.blocks`): keep them all, let them go beside units of
            width, or let nothing else go. They are compared with each other as the units of one group are.
        splits: where a call splits an axis in equal parts (`chunk`): let each keep what it keeps, or all equally many,
            which the model's own forward asks for (else the cut model is a rewritten graph).

    Raises:
        BudgetError: the budgets can't be met; the message says what can.
        UnknownNameError: unknown grids, bundle, blocks or splits.
        InputError: `how` is no rule.
    """
    budgets = budgets_of(budget)
    choices = {
        "grids": (grids, Grids),
        "bundle": (bundle, Bundle),
        "blocks": (blocks, Blocks),
        "splits": (splits, Splits),
    }
    for name, (value, known) in choices.items():
        if value not in get_args(known):
            raise UnknownNameError.of(name, value, get_args(known))
    if not isinstance(how, Rule):
        raise InputError(
            f"choose(how={how!r})",
            found=f"{type(how).__name__}; known: {', '.join(sorted(rule.__name__ for rule in Rule.__subclasses__()))}",
            do="pass a rule from niwaki.budgets, e.g. how=niwaki.budgets.Uniform()",
        )
    graph = priced(graph, budgets)
    atoms, skipped = make_atoms(graph, scores, grids=grids, exact_only=exact_only, bundle=bundle, blocks=blocks,
                                splits=splits)  # fmt: skip
    every = np.append(np.ones(graph.units.count, bool), True)
    full = graph.widths.counts(every)
    parts = Parts.of(atoms.units)
    single = cache(lambda: Ledger.of(graph.widths, graph.costs, parts, graph.units.count))
    atoms = replace(atoms, units=parts, saves=Savings(lambda name: single().savings(name, full)))
    priority = how(atoms)
    timed = [name for name in TIMES if any(budget.of == name for budget in budgets)]
    chunks, chunk_priority, chained = _chunks(
        atoms, priority, budgets, [partial(single().worth, name, full=full) for name in timed]
    )
    ledger = Ledger.of(graph.widths, graph.costs, chunks, graph.units.count)
    before = ledger.totals(full)
    limits: dict[str, float] = {}
    for one in budgets:
        limits[one.of] = min(limits.get(one.of, np.inf), one.limit(before[one.of]))
    number = np.arange(len(chunks))  # of equal priorities the lower index stays; a chain goes in its own order
    first = chunks.each(np.minimum)
    order = np.lexsort((np.where(chained >= 0, number, -first), chunk_priority))
    gone = remove(ledger, full, order, limits)
    if gone is None:
        least = ledger.totals(ledger.counts(np.ones(len(chunks), bool), full))
        raise BudgetError(
            ", ".join(f"{name} <= {_plain(limit)}{unit_of(name)}" for name, limit in limits.items()),
            found="; ".join(
                f"{name}: the least that floors, multiples and fixed groups allow is "
                f"{_plain(least[name])}{unit_of(name)} ({_share(least[name], before[name]):.3f})"
                for name in limits
            ),
            where=f"{len(graph.groups) - len(skipped)} of {len(graph.groups)} groups can be cut"
            + (f", {len(graph.blocks)} blocks can be left out" if blocks != "keep" else ""),
            do=("write ", Setting("keep", 1.0), " for all of it: 1 is a count of one")
            if any(type(one.keep) is int and one.keep == 1 for one in budgets)
            else (
                "raise ",
                Setting("keep"),
                ", lower ",
                Setting("floor"),
                ", or allow more groups: ",
                Setting("protect"),
                " fewer, ",
                Setting("exact_only", False),
            ),
        )
    refill(ledger, full, gone, order, limits, chained)
    alive = np.ones(graph.units.count, bool)
    alive[chunks.pick(np.flatnonzero(gone)).flat] = False
    if not gone.any():
        fits = ", ".join(
            f"{name} {_plain(before[name])} <= {_plain(limit)}{unit_of(name)}" for name, limit in limits.items()
        )
        warnings.warn(
            f"choose removed nothing; found: the whole model fits, {fits}; do: give a smaller keep (keep=0.5 is half)",
            NothingChangedWarning,
            stacklevel=2,
        )
    decided = {
        "score": scores.how,
        "rule": describe(how),
        "grids": grids,
        "exact_only": exact_only,
        "bundle": bundle,
        "blocks": blocks,
        "left_whole": dict(sorted(skipped.items())),
    } | ({} if splits == "free" else {"splits": splits})
    return plan_of(graph, alive, budgets=budgets, decided_by=decided, grids=grids)


def priced(graph: ChannelGraph, budgets: tuple[Budget, ...]) -> ChannelGraph:
    """`graph` with every cost that a budget is about. Bytes and memory follow from the trace; times are measured, and
    have to be there.

    Raises:
        BudgetError: they are not.
    """
    known = {"bytes": with_bytes, "memory": with_memory}
    for name in dict.fromkeys(budget.of for budget in budgets):
        if name in graph.costs:
            continue
        if name not in known:
            more = "" if name == "latency" else f", of={name!r}"
            raise BudgetError(
                f"Budget(of={name!r})",
                found="nothing was measured on a target",
                do="graph = niwaki.budgets.timed(model, example, graph, "
                f"target=niwaki.measure.Target('onnxruntime'{more})), "
                "or niwaki.compress(..., target=...)",
            )
        graph = known[name](graph)
    return graph


def _plain(amount: float) -> str:
    """A count without, an amount of a few with what is behind the point."""
    return str(math.floor(amount)) if amount >= 1000 or float(amount).is_integer() else f"{amount:.4g}"


def _share(least: float, before: float) -> float:
    """The smallest share in thousandths that, as a budget, allows `least` of `before`."""
    thousandths = int(-(-least * 1000 // before))
    while thousandths / 1000 * before < least:  # 0.29 x 100 is 28.999999999999996
        thousandths += 1
    return thousandths / 1000


def _chunks(
    atoms: Atoms, priority: np.ndarray, budgets: tuple[Budget, ...], worth: Sequence[Worth]
) -> tuple[Parts, np.ndarray, np.ndarray]:
    """Atoms that may go, joined where multiples or times ask for it; what floors protect is left out.

    Returns units per chunk, priority per chunk, and the chain of each chunk (or -1): chunks of a chain go in order.
    """
    orders: list[np.ndarray] = []
    firsts: list[np.ndarray] = []
    chains: list[np.ndarray] = []
    multiple = int(np.lcm.reduce([b.multiple for b in budgets]))
    count = 0
    ranked = np.lexsort((-np.arange(priority.size), priority, atoms.pool))  # of equal ones the lower index stays
    bounds = np.searchsorted(atoms.pool[ranked], np.arange(len(atoms.pools) + 1))
    for pool in range(len(atoms.pools)):
        order = ranked[bounds[pool] : bounds[pool + 1]]
        stops, tied = stops_of(atoms, order, int(atoms.least[pool]), budgets, multiple)
        if worth and stops.size:  # of the counts that are left, those at which a measured time steps down
            good = np.logical_and.reduce([one(order) for one in worth])
            tied = tied or not good[stops - 1].all()
            stops = stops[good[stops - 1]]
        if stops.size:
            orders.append(order[: stops[-1]])
            firsts.append(count + np.append(0, stops[:-1]))
            chains.append(np.full(stops.size, pool if tied else -1, dtype=np.int64))
            count += int(stops[-1])
    if not orders:
        return Parts.of([]), np.zeros(0), np.zeros(0, np.int64)
    order, first = np.concatenate(orders), np.concatenate(firsts)
    chunks = Parts.of(atoms.units).pick(order).join(first)
    return chunks, np.maximum.reduceat(priority[order], first), np.concatenate(chains)


def stops_of(
    atoms: Atoms, order: np.ndarray, least: int, budgets: tuple[Budget, ...], multiple: int
) -> tuple[np.ndarray, bool]:
    """After how many atoms of a pool, in `order`, every group holds a multiple and no floor is undercut; and whether a
    multiple of more than one is asked of any."""
    if atoms.takes is None or atoms.sizes is None:
        takes, sizes = np.full((order.size, 1), int(atoms.width[order[0]])), np.array([int(atoms.width[order].sum())])
        multiples = np.array([multiple])
    else:
        at, bounds = runs(atoms.takes.indptr, order)
        groups = atoms.takes.indices[at]
        if groups.size and (groups == groups[0]).all():
            held, place = groups[:1], np.zeros(groups.size, np.intp)
        else:
            held, place = np.unique(groups, return_inverse=True)
        takes, sizes = np.zeros((order.size, held.size), dtype=np.int64), atoms.sizes[held]
        takes[np.repeat(np.arange(order.size), np.diff(bounds)), place] = atoms.takes.data[at]
        own = atoms.multiples[held] if atoms.multiples is not None else np.ones(held.size, dtype=np.int64)
        multiples = np.lcm(own, multiple)
    floors = np.ones(sizes.size)
    for budget in budgets:
        floor = budget.floor
        least_of = [share_up(floor, size) if isinstance(floor, float) else min(floor, size) for size in sizes.tolist()]
        floors = np.maximum(floors, least_of)
    left = sizes - np.cumsum(takes, axis=0)  # [atoms, groups]
    good = (left >= floors).all(1) & (left % multiples == 0).all(1)
    good[max(0, order.size - least) :] = False
    return np.flatnonzero(good) + 1, bool((multiples > 1).any())
