"""Between a choice of units and a plan, both ways."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from niwaki.errors import BudgetError, InputError, PlanMismatchError
from niwaki.graph.groups import Axis
from niwaki.graph.trace import ChannelGraph
from niwaki.plan import Plan, encode_example
from niwaki.units import Budget


def plan_of(
    graph: ChannelGraph,
    alive: np.ndarray,
    *,
    budgets: tuple[Budget, ...] = (),
    decided_by: dict[str, Any] | None = None,
    grids: str = "rows",
) -> Plan:
    """The plan in which exactly the units flagged in `alive` (bool `[units]`) stay.

    Raises:
        BudgetError: a group would be left with nothing.
    """
    alive = with_slabs(graph, alive.copy())
    dropped = {
        graph.inside[block.name].path: graph.inside[block.name].puts_out
        for block in graph.blocks
        if not alive[block.ids[0]]
    }
    gone_with = {
        name for block in graph.blocks if not alive[block.ids[0]] for name in graph.inside[block.name].parameters
    }
    kept: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}
    inexact: dict[str, str] = {}
    for group in graph.groups:
        stays = alive[group.ids]
        if stays.all():
            continue
        if not stays.any():
            raise BudgetError(f"cut group {group.name}", found="no unit of it would stay", do="keep at least one")
        if group.fixed is not None:
            raise InputError(f"cut group {group.name}", found=f"it is fixed: {group.fixed}", do="leave it whole")
        kept[group.name] = tuple(np.flatnonzero(stays).tolist())
        sizes[group.name] = group.units
        gone = group.ids[~stays]
        kind = _manner(graph, gone, alive)
        marks = graph.units.inexact[kind][gone]
        if (marks >= 0).any():
            inexact[group.name] = graph.units.inexact_reasons[int(marks.max())]
    cuts: list[dict[str, Any]] = [
        {"tensor": every, "axis": 0, "keep": []}
        for name in sorted(gone_with)
        for every in graph.names[name]
        if graph.shapes[name]
    ]
    padded = np.append(alive, True)
    for axis in graph.axes:
        stays = padded[axis.units]
        if stays.all() or axis.tensor in gone_with:
            continue
        for name in graph.names[axis.tensor]:
            cuts.append(_entry(axis, name, stays))
    for name, source, values in graph.tables:
        stays = padded[source]
        if not stays.all():
            kept_at = np.flatnonzero(stays[values])
            cuts.extend(
                {
                    "tensor": every,
                    "axis": 0,
                    "keep": kept_at.tolist(),
                    "values": (np.cumsum(stays) - 1)[values[kept_at]].tolist(),
                }
                for every in graph.names[name]
                if not any(cut["tensor"] == every for cut in cuts)
            )
    after, before = graph.cost(alive), graph.cost(np.ones_like(alive))
    return Plan(
        fingerprint=graph.fingerprint,
        model=graph.model,
        kept=kept,
        units=sizes,
        cuts=tuple(cuts),
        promised={**after, **{f"{name}_before": value for name, value in before.items()}},
        budget=tuple(_record(b) for b in budgets),
        decided_by=decided_by or {},
        grids=grids,
        dropped=dropped,
        inexact=inexact,
        example=encode_example(graph.example),
        graph=graph,
    )


def _record(budget: Budget) -> dict[str, Any]:
    record = asdict(budget)
    if not budget.absolute:
        del record["absolute"]
    return record


def _entry(axis: Axis, name: str, stays: np.ndarray) -> dict[str, Any]:
    """The cut of one axis of a tensor; `stays` is bool along it."""
    entry: dict[str, Any] = {"tensor": name, "axis": axis.axis}
    if axis.blocks == 1:
        entry["keep"] = np.flatnonzero(stays).tolist()
    else:
        entry["blocks"] = axis.blocks
        entry["keep"] = [np.flatnonzero(block).tolist() for block in stays.reshape(axis.blocks, -1)]
    if axis.role == "direction":
        entry["mask"] = False
    return entry


def cuts_of(graph: ChannelGraph, tensor: str, alive: np.ndarray) -> list[Mapping[str, Any]]:
    """What a plan that keeps the units `alive` (bool `[units]`) cuts of one tensor, as `Plan.by_tensor` lists it."""
    padded = np.append(alive, True)
    cuts: list[Mapping[str, Any]] = [
        _entry(axis, tensor, padded[axis.units])
        for axis in graph.axes
        if axis.tensor == tensor and not padded[axis.units].all()
    ]
    return sorted(cuts, key=lambda cut: cut.get("blocks", 1) == 1)


def _manner(graph: ChannelGraph, gone: np.ndarray, alive: np.ndarray) -> str:
    """Whether removed grid units went as whole rows or as columns."""
    row = graph.units.row
    hit = np.zeros(row.max(initial=-1) + 1, bool)
    hit[row[gone]] = True
    return "column" if (hit[row] & graph.units.in_row & alive).any() else "row"


def alive_of(graph: ChannelGraph, plan: Plan) -> np.ndarray:
    """Which units of the graph a plan keeps; bool `[units]`. Slabs go when all they span are gone."""
    alive = np.ones(graph.units.count, bool)
    for name, keep in plan.kept.items():
        ids = graph.group(name).ids
        if len(ids) != plan.units[name] or keep[-1] >= len(ids):
            raise PlanMismatchError(
                f"group {name} of {plan.units[name]} units",
                found=f"the model's has {len(ids)}",
                do="use the model of the plan",
            )
        alive[ids] = False
        alive[ids[list(keep)]] = True
    blocks = {graph.inside[block.name].path: block for block in graph.blocks}
    for path in plan.dropped:
        if path not in blocks:
            raise PlanMismatchError(
                f"leave out {path}",
                found=f"the model's blocks are {', '.join(blocks) or 'none'}",
                do="use the model of the plan",
            )
        alive[blocks[path].ids] = False
    return with_slabs(graph, alive)


def with_slabs(graph: ChannelGraph, alive: np.ndarray) -> np.ndarray:
    """`alive`, with units that no parameter holds as their grid has them (in place).

    A slab goes when all it spans is gone; an element goes with any slab it lies in.
    """
    units = graph.units
    hidden = np.ones(units.count, bool)
    for group in graph.groups:
        hidden[group.ids] = False
    slab, element = units.slabs
    spans = np.zeros(units.count, bool)
    spans[slab] = True
    while True:
        gone = np.zeros(units.count, bool)
        gone[element[~alive[slab]]] = True
        lives = np.zeros(units.count, bool)
        lives[slab[alive[element]]] = True
        gone |= spans & ~lives
        gone &= hidden & alive
        if not gone.any():
            return alive
        alive[gone] = False
