"""`choose_measured`: choose by a measured table, measure what was chosen, correct the table, and choose again."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import nn

from niwaki.budgets.networks import RUNS, Networks, Progress
from niwaki.budgets.tables import Times
from niwaki.errors import BudgetError, NothingChangedWarning
from niwaki.graph import ChannelGraph
from niwaki.graph.plans import alive_of
from niwaki.measure.target import Target
from niwaki.plan import Plan
from niwaki.units import Budget

log = logging.getLogger(__name__)

SAME = 1e-3
"""A plan that the table tells from the one before by less is the same: no other is nearer."""
Choose = Callable[[ChannelGraph, tuple[Budget, ...]], Plan]


@final
@dataclass(frozen=True)
class Round:
    """One plan: what the table said of it and what it took, in milliseconds."""

    table: float
    """By the table as it was measured."""
    promised: float
    """By the table as corrected so far: what the plan was chosen by."""
    measured: float
    plan: Plan

    def to_json(self) -> dict[str, float]:
        return {"promised": self.promised, "measured": self.measured}


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """A plan whose network was measured, and the plans before it that were not near enough."""

    plan: Plan
    """Its promise is that of the corrected table; `decided_by["measured"]` is `to_json()`."""
    graph: ChannelGraph
    """With the corrected cost."""
    limit: float
    """What the plan may take, in milliseconds."""
    uncut: float
    """What the uncut network takes."""
    rounds: tuple[Round, ...]
    best: int
    """The round of the plan, counted from 0."""
    target: Target

    @property
    def off(self) -> float:
        """How far the measured time is above the limit, as a share of it; below 0 where it is under it."""
        return self.rounds[self.best].measured / self.limit - 1

    @property
    def met(self) -> bool:
        return self.off <= self.target.tolerance

    def to_json(self) -> dict[str, Any]:
        """Plain data, in milliseconds."""
        best = self.rounds[self.best]
        return {
            "of": self.target.of,
            "unit": self.target.unit,
            "definition": definition(self.target),
            "limit": self.limit,
            "uncut": self.uncut,
            **best.to_json(),
            "off": self.off,
            "tolerance": self.target.tolerance,
            "met": self.met,
            "rounds": [one.to_json() for one in self.rounds],
        }


def choose_measured(
    model: nn.Module,
    example: Any,
    graph: ChannelGraph,
    budgets: tuple[Budget, ...],
    choose: Choose,
    *,
    target: Target,
    table: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, Measured | None]:
    """A plan whose network, cut and measured on the target, is within `target.tolerance` of the budget of latency.

    A table of layers is off, and most where it chooses: it lies where the table flatters. So the network is cut,
    measured in turns with the uncut one, and the table is made to say what was seen: it is stretched and moved such
    that it is right of the two measured networks (the uncut one among them) that the limit lies between, or of one
    where all are on one side. A share is a share of the uncut network's measured time.

    Source: measuring what was chosen and not its proxy as in Yang et al. 2018, arXiv:1804.03230 (NetAdapt). Differs:
    one choice is corrected as a whole; they measure tables only and take many small steps.

    Args:
        graph: with the cost "latency" (or "energy"), from `timed`.
        choose: the plan for a graph and budgets; it is called once for every round.
        table: the file that keeps what was measured.
        progress: called before each measurement.

    Returns:
        The plan, and how it came about; None where no budget is of what the target measures, or no round was asked for.

    Raises:
        BudgetError: not even the smallest network is as fast, as the table says at first.
        InputError: the network can't run in the target's runtime.
    """
    name = target.of
    if not target.rounds or all(budget.of != name for budget in budgets):
        return choose(graph, budgets), None
    networks = Networks.of(model, example, graph, target=target, table=table, progress=progress)
    every = np.ones(graph.units.count, bool)
    ((_, uncut),) = networks.measured({})
    limit = min(budget.limit(uncut) for budget in budgets if budget.of == name)
    asked = tuple(replace(b, keep=limit, absolute=True) if b.of == name else b for b in budgets)
    whole = graph.cost(every)[name], uncut
    rounds: list[Round] = []
    graphs: list[ChannelGraph] = []
    while len(rounds) < target.rounds:
        now = corrected(graph, name, *line([whole, *((one.table, one.measured) for one in rounds)], limit))
        try:
            with warnings.catch_warnings():
                if rounds:
                    warnings.simplefilter("ignore", NothingChangedWarning)
                plan = choose(now, asked)
        except BudgetError:
            if not rounds:
                raise
            break
        alive = alive_of(graph, plan)
        said = graph.cost(alive)[name]
        if any(abs(said / one.table - 1) < SAME for one in rounds):
            break
        measured = uncut if alive.all() else networks.measured({"chosen": plan})[1][1]
        rounds.append(Round(said, plan.promised[name], measured, plan))
        graphs.append(now)
        log.info("round %d: promised %.4g, measured %.4g, asked %.4g", len(rounds), *_numbers(rounds[-1]), limit)
        if _near(rounds[-1], limit, target.tolerance):
            break
    best = _best(rounds, limit, target.tolerance)
    found = Measured(rounds[best].plan, graphs[best], limit, uncut, tuple(rounds), best, target)
    plan = replace(
        found.plan,
        budget=_as_asked(found.plan.budget, budgets),
        promised={**found.plan.promised, f"{name}_before": uncut},
        decided_by={**found.plan.decided_by, "measured": found.to_json()},
    )
    if not found.met:
        log.warning(
            "%s of %.4g %s was asked for; after %d rounds the network takes %.4g, %.0f %% more",
            name, limit, target.unit, len(rounds), rounds[best].measured, 100 * found.off,
        )  # fmt: skip
    return plan, replace(found, plan=plan)


def _numbers(one: Round) -> tuple[float, float]:
    return one.promised, one.measured


def _near(one: Round, limit: float, tolerance: float) -> bool:
    """Whether the limit is met and used, or another budget lets the network be no slower than it is."""
    off = one.measured / limit - 1
    return abs(off) <= tolerance or (off < 0 and abs(one.measured / one.promised - 1) <= tolerance)


def _best(rounds: Sequence[Round], limit: float, tolerance: float) -> int:
    """The slowest that meets the limit, with the tolerance; the fastest where none does."""
    times = [one.measured for one in rounds]
    good = [i for i, ms in enumerate(times) if ms <= limit * (1 + tolerance)]
    near = [i for i in good if _near(rounds[i], limit, tolerance)]
    if near:
        return near[-1]
    return max(good, key=lambda i: times[i]) if good else min(range(len(times)), key=lambda i: times[i])


def _as_asked(records: Sequence[Mapping[str, Any]], budgets: tuple[Budget, ...]) -> tuple[Mapping[str, Any], ...]:
    """The records of a plan's budgets, of latency as they were asked for."""
    found = []
    for record, budget in zip(records, budgets, strict=True):
        said = {name: value for name, value in record.items() if name != "absolute"}
        found.append({**said, "keep": budget.keep, **({"absolute": True} if budget.absolute else {})})
    return tuple(found)


def definition(target: Target) -> str:
    """What is measured of a whole network."""
    clock = {"cpu": "processor time", "wall": "wall-clock time"}[target.clock]
    what = f"shortest {clock} of {RUNS} forward passes" if target.of == "latency" else "least energy of a forward pass"
    where = f"{target.runtime}, float32, batch {target.batch}, {target.threads} CPU threads"
    return f"{what} in {where}, in turns with the uncut network"


def line(points: Sequence[tuple[float, float]], limit: float) -> tuple[float, float]:
    """The factor, and what is added, that make a table say what was measured; `points` are the table's and measured
    milliseconds, the uncut network's first.

    Through the nearest above the limit and the nearest below it, where there are both and the line rises; else a factor
    alone, that of the nearest (of the uncut network where there is no other).

    Examples:
        >>> line([(10.0, 12.0)], 6.0)
        (1.2, 0.0)
        >>> line([(10.0, 12.0), (5.0, 7.0)], 6.0)
        (1.4, 0.0)
        >>> line([(10.0, 12.0), (5.0, 7.0), (4.0, 5.0)], 6.0)
        (2.0, -3.0)
    """
    above = [one for one in points if one[1] > limit]
    below = [one for one in points if one[1] <= limit]
    if above and below:
        (t1, m1), (t2, m2) = min(above, key=lambda one: one[1]), max(below, key=lambda one: one[1])
        factor = (m1 - m2) / (t1 - t2) if t1 > t2 else 0.0
        if factor > 0:
            return factor, m1 - factor * t1
    said, measured = min(points[1:] or points, key=lambda one: abs(one[1] - limit))
    return measured / said, 0.0


def corrected(graph: ChannelGraph, name: str, factor: float, plus: float) -> ChannelGraph:
    """`graph` with a measured cost `factor` times as high, and `plus` more for every plan."""
    cost = graph.costs[name]
    assert isinstance(cost, Times)
    return replace(graph, costs={**graph.costs, name: cost.corrected(factor, plus)})
