"""Between a choice of units and a plan, both ways."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from niwaki.errors import BudgetError, InputError, PlanMismatchError
from niwaki.graph.copies import HEARD, along, heard, refuse_rigid
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
    """The plan in which exactly the units flagged in `alive` (bool `[units]`) stay; or, of whole numbers, in which each
    is there so often: what is there more than once grows.

    Raises:
        BudgetError: a group would be left with nothing.
        InputError: a unit that is fixed would go or grow, or one of a grid would grow.
    """
    times = alive.astype(np.int64)
    refuse_rigid(graph, times)
    alive = with_slabs(graph, alive > 0)
    times[~alive] = 0
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
    lively = np.zeros(graph.units.row.max(initial=-1) + 1, bool)  # rows that keep something
    lively[graph.units.row[graph.units.in_row & alive]] = True
    for group in graph.groups:
        stays, often = alive[group.ids], times[group.ids]
        if (often == 1).all():
            continue
        if not stays.any():
            raise BudgetError(f"cut group {group.name}", found="no unit of it would stay", do="keep at least one")
        if group.fixed is not None:
            raise InputError(f"cut group {group.name}", found=f"it is fixed: {group.fixed}", do="leave it whole")
        kept[group.name] = tuple(np.repeat(np.arange(group.units), often).tolist())
        sizes[group.name] = group.units
        rows = graph.units.row[group.ids[~stays]]
        kind = "column" if lively[rows].any() else "row"  # how removed units of a grid went
        marks = graph.units.inexact[kind][group.ids[often != 1]]
        if (marks >= 0).any():
            inexact[group.name] = graph.units.inexact_reasons[int(marks.max())]
    if (times > 1).any():
        echoes = heard(graph) & (times > 1)
        inexact |= {g.name: HEARD for g in graph.groups if g.name not in inexact and echoes[g.ids].any()}
    cuts: list[dict[str, Any]] = [
        {"tensor": every, "axis": 0, "keep": []}
        for name in sorted(gone_with)
        for every in graph.names[name]
        if graph.shapes[name]
    ]
    padded = np.append(times, 1)
    same: Same = {}
    whole: dict[bytes, bool] = {}  # many axes have the same units: a layer's outputs, its norm's scale and shift
    for axis in graph.axes:
        key = axis.units.tobytes()
        stays = whole.get(key)
        if stays is None:
            stays = whole[key] = bool((padded[axis.units] == 1).all())
        if stays or axis.tensor in gone_with:
            continue
        for name in graph.names[axis.tensor]:
            cuts.append(_entry(axis, name, padded, same, key))
    for name, source, values in graph.tables:
        stays = padded[source] > 0
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
    after, before = graph.cost(times), graph.cost(np.ones_like(alive))
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


Same = dict[tuple[str, bytes], Any]
"""What was found for the units of an axis, and lists of positions."""


def _entry(
    axis: Axis, name: str, times: np.ndarray, same: Same | None = None, key: bytes | None = None
) -> dict[str, Any]:
    """The cut of one axis of a tensor; `times` has a number for each unit, and 1 behind them. Equal lists of `same` are
    one list; `key` are the bytes of the axis's units, where somebody has them.
    """
    entry: dict[str, Any] = {"tensor": name, "axis": axis.axis}
    if axis.blocks == 1:
        same = {} if same is None else same
        units = "units", axis.units.tobytes() if key is None else key
        if units not in same:
            positions, copies = along(axis.units, times)
            keep = same.setdefault(("positions", positions.tobytes()), positions.tolist())
            same[units] = keep, np.flatnonzero(copies).tolist()
        entry["keep"], new = same[units]
        if new:
            entry["new"] = list(new)
            entry["zero"] = axis.role == "in"
    else:
        stays = times[axis.units] > 0
        entry["blocks"] = axis.blocks
        entry["keep"] = [np.flatnonzero(block).tolist() for block in stays.reshape(axis.blocks, -1)]
    if axis.role == "direction":
        entry["mask"] = False
    return entry


def cuts_of(graph: ChannelGraph, tensor: str, alive: np.ndarray) -> list[Mapping[str, Any]]:
    """What a plan that keeps the units `alive` (bool `[units]`) cuts of one tensor, as `Plan.by_tensor` lists it."""
    padded = np.append(alive, True)
    cuts: list[Mapping[str, Any]] = [
        _entry(axis, tensor, padded) for axis in graph.axes if axis.tensor == tensor and not padded[axis.units].all()
    ]
    return sorted(cuts, key=lambda cut: cut.get("blocks", 1) == 1)


def alive_of(graph: ChannelGraph, plan: Plan) -> np.ndarray:
    """Which units of the graph a plan keeps; bool `[units]`. Slabs go when all they span are gone."""
    return times_of(graph, plan) > 0


def times_of(graph: ChannelGraph, plan: Plan) -> np.ndarray:
    """How often each unit of the graph is there by a plan: 0 where it goes, more than 1 where its group grows; int64
    `[units]`. Slabs go when all they span are gone.
    """
    times = np.ones(graph.units.count, np.int64)
    known = {group.name: group for group in graph.groups}
    for name, keep in plan.kept.items():
        ids = (known.get(name) or graph.group(name)).ids
        if len(ids) != plan.units[name] or keep[-1] >= len(ids):
            raise PlanMismatchError(
                f"group {name} of {plan.units[name]} units",
                found=f"the model's has {len(ids)}",
                do="use the model of the plan",
            )
        times[ids] = np.bincount(np.array(keep, np.int64), minlength=len(ids))
    blocks = {graph.inside[block.name].path: block for block in graph.blocks}
    for path in plan.dropped:
        if path not in blocks:
            raise PlanMismatchError(
                f"leave out {path}",
                found=f"the model's blocks are {', '.join(blocks) or 'none'}",
                do="use the model of the plan",
            )
        times[blocks[path].ids] = 0
    times[~with_slabs(graph, times > 0)] = 0
    return times


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
