"""From ties to units and groups: connected components, once for all labels."""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from niwaki.graph.labels import LabelSpace
from niwaki.graph.values import Parameter
from niwaki.units import Group, Member

Edges = list[tuple[np.ndarray, np.ndarray]]


def components(size: int, edges: Edges) -> np.ndarray:
    """Component number of each of `size` nodes; int32 `[size]`."""
    if not edges:
        return np.arange(size, dtype=np.int32)
    a = np.concatenate([edge[0] for edge in edges])
    b = np.concatenate([edge[1] for edge in edges])
    matrix = coo_matrix((np.ones(a.size, dtype=np.int8), (a, b)), shape=(size, size))
    return connected_components(matrix, directed=False)[1].astype(np.int32)


@dataclass(frozen=True, eq=False)
class Axis:
    """One labelled axis of a parameter or buffer: the unit at each position (once per block with `blocks > 1`)."""

    tensor: str
    axis: int
    blocks: int
    size: int
    units: np.ndarray
    role: str
    buffer: bool


@dataclass(frozen=True, eq=False)
class Units:
    """What is known of every unit, as arrays over units (the graph's own count)."""

    count: int
    unit_of: np.ndarray
    """Label -> unit, or -1; int32 `[labels]`."""
    row: np.ndarray
    """What goes when whole rows (heads, groups) are removed; equal numbers go together."""
    column: np.ndarray
    """What goes when columns are removed."""
    in_row: np.ndarray
    """Whether a unit takes part in rows; bool."""
    in_column: np.ndarray
    row_frozen: np.ndarray
    """Units that stay when rows are removed (they span all rows); bool."""
    column_frozen: np.ndarray
    reason: np.ndarray
    """Index into `reasons` of why a unit is fixed, or -1."""
    row_reason: np.ndarray
    """The same for the removal of the unit's whole row."""
    column_reason: np.ndarray
    reasons: tuple[str, ...]
    inexact: dict[str, np.ndarray]
    """"row" and "column" -> index into `inexact_reasons`, or -1."""
    inexact_reasons: tuple[str, ...]
    multiple: np.ndarray
    """A multiple of how many units like this one a kernel needs; 1 for any number."""
    classes: np.ndarray
    """Units of one viewed grid, or of grids that share units."""
    slabs: tuple[np.ndarray, np.ndarray]
    """Pairs of a slab and an element it spans, rows and columns together."""
    grids: tuple[np.ndarray, ...]
    """Every viewed grid as units `[rows, columns]`: all rows that keep anything keep equally many."""
    stacks: tuple[np.ndarray, ...]
    """Every viewed stack of grids as first units of rows `[grids, rows]`: all that keep any row keep equally many."""
    needed: tuple[np.ndarray, ...] = ()
    """Sets of units of each of which some must stay: whatever a kernel takes that takes nothing empty."""


def resolve(space: LabelSpace, parameters: dict[str, Parameter]) -> tuple[Units, list[Axis]]:
    """Units from the ties, and the units along every labelled axis."""
    length = rows_of_grids(space)
    component = components(space.count, space.strict)
    seeded = [(p, axis) for p in parameters.values() for axis in sorted(p.seeds)]
    used = np.zeros(int(component.max(initial=-1)) + 1, dtype=bool)
    every = np.concatenate([np.zeros(0, np.int32), *(parameter.seeds[axis] for parameter, axis in seeded)])
    used[component[every]] = True
    slabs = {kind: [(component[a], component[b]) for a, b in edges] for kind, edges in space.slabs.items()}
    for edges in slabs.values():
        for a, b in edges:
            used[a] = used[b] = True
    order = np.full(used.size, -1, dtype=np.int32)
    order[used] = np.arange(int(used.sum()), dtype=np.int32)  # components are numbered by first label already
    unit_of = order[component] if component.size else np.zeros(0, np.int32)
    count = int(used.sum())

    slabs["row"], slabs["outer"] = settle_outer(slabs["row"], slabs["outer"], used.size)
    ends = {}
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    closure = {}
    for kind in ("row", "column"):
        edges = [(order[a], order[b]) for a, b in slabs[kind]]  # type: ignore[index]
        closure[kind] = components(count, edges)
        pairs += edges
        is_slab, is_element = np.zeros(count, bool), np.zeros(count, bool)
        for a, b in edges:
            is_slab[a] = True
            is_element[b] = True
        ends[kind] = (is_slab, is_element)
    outer = np.zeros(count, bool)
    for a, b in slabs["outer"]:
        outer[order[a]] = True
        pairs.append((order[a], order[b]))
    in_row, in_column = ends["row"][0] | ends["row"][1], ends["column"][0] | ends["column"][1]
    outer &= ~in_row & ~in_column
    in_column |= outer
    row_frozen = ends["column"][0] & ~ends["column"][1] & ~in_row
    column_frozen = ends["row"][0] & ~ends["row"][1] & ~in_column
    row_frozen, column_frozen = row_frozen | outer, column_frozen | outer

    reasons: dict[str, int] = {}
    reason = np.full(count, -1, dtype=np.int32)
    for labels, why in (*space.fixed, *space.held):
        units = unit_of[labels]
        units = units[units >= 0]
        units = units[reason[units] < 0]
        reason[units] = reasons.setdefault(why, len(reasons))
    slabs_of = _pairs(pairs)
    _hold(reason, *slabs_of)
    inexact_reasons: dict[str, int] = {}
    inexact = {kind: np.full(count, -1, dtype=np.int32) for kind in ("row", "column")}
    for mark in space.inexact:
        units = unit_of[mark.labels]
        units = units[units >= 0]
        along = mark.along
        if mark.columns and bool((length[mark.labels] < mark.columns).any()):
            along = frozenset({"row", "column"})
        for kind in along:
            inexact[kind][units] = inexact_reasons.setdefault(mark.reason, len(inexact_reasons))
    multiple = np.ones(count, dtype=np.int64)
    for labels, step in space.multiples:
        held = np.unique(unit_of[labels])
        held = held[held >= 0]
        multiple[held] = np.lcm(multiple[held], step)
    classes = np.arange(count, dtype=np.int32)
    viewed, stacked = _viewed(space.grids, unit_of), _viewed(space.stacks, unit_of)
    if space.grids:
        links: Edges = []
        for grid in space.grids:
            flat = unit_of[grid.ravel()]
            flat = flat[flat >= 0]
            if flat.size:
                links.append((np.full(flat.size - 1, flat[0], dtype=np.int32), flat[1:]))
        classes = components(count, links)
    units = Units(
        count=count,
        unit_of=unit_of,
        row=closure["row"],
        column=closure["column"],
        in_row=in_row,
        in_column=in_column,
        row_frozen=row_frozen,
        column_frozen=column_frozen,
        reason=reason,
        row_reason=_spread(reason, closure["row"]),
        column_reason=_spread(reason, closure["column"]),
        reasons=tuple(reasons),
        inexact={k: _spread(v, closure[k]) for k, v in inexact.items()},
        inexact_reasons=tuple(inexact_reasons),
        multiple=multiple,
        classes=classes,
        slabs=slabs_of,
        grids=viewed,
        stacks=stacked,
        needed=_sets(space.needed, unit_of),
    )
    axes: list[Axis] = []
    ordered, along, start = sorted(space.roles), unit_of[every], 0
    for parameter, axis in seeded:
        seeds = parameter.seeds[axis]
        start += seeds.size
        axes.append(
            Axis(
                parameter.name,
                axis,
                parameter.blocks[axis],
                parameter.shape[axis],
                along[start - seeds.size : start],
                _role(space, ordered, seeds),
                parameter.buffer,
            )
        )
    return units, axes


def _sets(needed: list[np.ndarray], unit_of: np.ndarray) -> tuple[np.ndarray, ...]:
    """Labels as sets of units, each once."""
    found = [np.unique(unit_of[labels.ravel()]) for labels in needed]
    return tuple({units.tobytes(): units for units in found if units.size and units[0] >= 0}.values())


def _viewed(grids: list[np.ndarray], unit_of: np.ndarray) -> tuple[np.ndarray, ...]:
    """Grids of labels as grids of units, each once."""
    found: dict[tuple[int, bytes], np.ndarray] = {}
    for grid in grids:
        flat = unit_of[grid.ravel()]
        if (flat >= 0).all():
            found.setdefault((len(grid), flat.tobytes()), flat.reshape(grid.shape))
    return tuple(found.values())


def _hold(reason: np.ndarray, slab: np.ndarray, element: np.ndarray) -> None:
    """What can't be removed holds every slab that it lies in, whichever way that slab would go (in place)."""
    while True:
        held = np.flatnonzero((reason[slab] < 0) & (reason[element] >= 0))
        if not held.size:
            return
        reason[slab[held]] = reason[element[held]]


def _pairs(edges: Edges) -> tuple[np.ndarray, np.ndarray]:
    if not edges:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    a, b = np.concatenate([e[0] for e in edges]), np.concatenate([e[1] for e in edges])
    differ = a != b
    return a[differ], b[differ]


def settle_outer(row: Edges, outer: Edges, size: int) -> tuple[Edges, Edges]:
    """A slab of several rows that is one row elsewhere (a head with its points) goes as that does: it is one of rows.

    Takes and gives the ties of row slabs and of outer ones, between `size` components.
    """
    rows = np.zeros(size, bool)
    for a, b in row:
        rows[a] = rows[b] = True
    goes = [rows[a] for a, _ in outer]
    settled = [(a[g], b[g]) for (a, b), g in zip(outer, goes, strict=True) if g.any()]
    return [*row, *settled], [(a[~g], b[~g]) for (a, b), g in zip(outer, goes, strict=True)]


def rows_of_grids(space: LabelSpace) -> np.ndarray:
    """Rows of every viewed grid as slabs. Of grids within each other (thirds, heads, channels) the innermost counts.

    Returns the length of the row each label lies in; int32 `[labels]`.
    """
    length = np.full(space.count, np.iinfo(np.int32).max, dtype=np.int32)
    for grid in space.grids:
        np.minimum.at(length, grid.ravel().astype(np.intp), np.int32(grid.shape[1]))
    for grid in space.grids:
        inner = length[grid[:, 0]] == grid.shape[1]
        if inner.any():
            rows = grid[inner]
            _, first, same = np.unique(rows[:, 0], return_index=True, return_inverse=True)
            slabs = space.new(first.size)[same]
            space.slabs["row"].append((np.repeat(slabs, rows.shape[1]), rows.ravel()))
    return length


def _role(space: LabelSpace, ordered: list[int], seeds: np.ndarray) -> str:
    """How an axis is used, whose labels follow one another; `ordered` are those that roles are noted under."""
    role = space.roles.get(int(seeds[0]))
    if role is None and seeds.size < 65536:  # a slice of the axis was used first: look for the first of its labels
        at = bisect_left(ordered, int(seeds[0]))
        if at < len(ordered) and ordered[at] <= int(seeds[-1]):
            role = space.roles[ordered[at]]
    return role or "other"


def _spread(marks: np.ndarray, closure: np.ndarray) -> np.ndarray:
    """Each unit gets the mark of any unit in its closure."""
    if int(closure.max(initial=-1)) + 1 == closure.size:  # nobody's closure holds another
        return marks
    best = np.full(int(closure.max(initial=-1)) + 1, -1, dtype=np.int32)
    np.maximum.at(best, closure.astype(np.intp), marks)
    return np.where(marks >= 0, marks, best[closure] if best.size else marks)


def make_groups(units: Units, axes: list[Axis]) -> list[Group]:
    """Units that lie on the same axes equally often, and are fixed for the same reason, form a group.

    So do those that the same kernels need: a group keeps a unit at least, and that kernel has one then.
    """
    if units.count == 0:
        return []
    random = np.random.default_rng(0)
    signature = np.zeros(units.count, dtype=np.uint64)
    present = np.zeros(units.count, dtype=bool)
    # positions of all axes, end to end; numpy is fastest where indices are of its own type
    flat = np.concatenate([np.zeros(0, np.int32), *(axis.units for axis in axes)]).astype(np.intp)
    sizes = np.array([axis.units.size for axis in axes], dtype=np.int64)
    of_axis = np.repeat(np.arange(sizes.size), sizes)
    at = np.arange(flat.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    owned = flat >= 0
    if not owned.all():
        flat, of_axis, at = flat[owned], of_axis[owned], at[owned]
    codes = random.integers(1, 1 << 62, len(axes), dtype=np.uint64)
    np.add.at(signature, flat, codes[of_axis])
    present[flat] = True
    for needed, code in zip(units.needed, random.integers(1, 1 << 62, len(units.needed), dtype=np.uint64), strict=True):
        signature[needed] += code
    with np.errstate(over="ignore"):
        for mark in (
            units.reason,
            units.in_row * 4 + units.in_column * 2 + units.row_frozen,
            units.row_reason,
            units.inexact["column"],
        ):
            signature += random.integers(1, 1 << 62, dtype=np.uint64) * (mark + 1).astype(np.uint64)
    shown = np.flatnonzero(present)
    _, first, inverse = np.unique(signature[shown], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))  # groups in the order of their first unit
    number = rank[inverse.reshape(-1)]
    group_of = np.full(units.count + 1, -1, dtype=np.int64)
    group_of[shown] = number
    order = np.argsort(number, kind="stable")
    bounds = np.searchsorted(number[order], np.arange(first.size + 1))
    ids = [shown[order[bounds[g] : bounds[g + 1]]] for g in range(first.size)]
    local = np.zeros(units.count + 1, dtype=np.int64)
    for held in ids:
        local[held] = np.arange(held.size)
    members: list[list[Member]] = [[] for _ in ids]
    owner = group_of[flat]
    run = of_axis * len(ids) + owner  # a number for each group on each axis
    if (run[1:] < run[:-1]).any():
        order = np.argsort(run, kind="stable")
        flat, of_axis, owner, at, run = flat[order], of_axis[order], owner[order], at[order], run[order]
    index, unit = at.astype(np.int32), local[flat].astype(np.int32)
    starts = np.flatnonzero(np.diff(run, prepend=-1))
    stops = np.append(starts, flat.size)[1:]
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        axis = axes[of_axis[start]]
        members[owner[start]].append(
            Member(axis.tensor, axis.axis, axis.role, axis.blocks, index[start:stop], unit[start:stop])
        )
    groups = []
    taken: dict[str, int] = {}
    buffers = {axis.tensor for axis in axes if axis.buffer}
    for held, listed in zip(ids, members, strict=True):
        u = int(held[0])
        if all(member.tensor in buffers for member in listed):
            continue
        grid = bool(units.in_row[u] or units.in_column[u])
        rows = int(np.unique(units.row[held]).size) if grid else 1
        why = units.inexact["row" if grid else "column"][u]
        fixed = _fixed(units, u, grid)
        name = _name(listed)
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            name = f"{name}#{taken[name]}"
        groups.append(
            Group(
                name,
                int(held.size),
                tuple(listed),
                fixed=fixed,
                exact=bool(why < 0),
                inexact=None if why < 0 else units.inexact_reasons[why],
                kind="grid" if grid else "channels",
                rows=rows,
                multiple=int(np.lcm.reduce(units.multiple[held])),
                ids=held.astype(np.int32),
            )
        )
    return groups


def _fixed(units: Units, u: int, grid: bool) -> str | None:
    """Why a unit can be removed in no way, or None."""
    if units.reason[u] >= 0:
        return units.reasons[units.reason[u]]
    if grid:
        row = units.row_reason[u] if not units.row_frozen[u] else -2
        column = units.column_reason[u] if not units.column_frozen[u] else -2
        if row != -1 and column != -1:
            return units.reasons[max(row, column)] if max(row, column) >= 0 else "a slab that stays with its grid"
    return None


def _name(members: list[Member]) -> str:
    order = {"out": 0, "scale": 1, "other": 2, "in": 3}
    best = min(members, key=lambda m: order.get(m.role, 4))
    return best.tensor.rsplit(".", 1)[0] if best.tensor.endswith((".weight", ".bias")) else best.tensor
