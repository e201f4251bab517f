"""From groups and scores to atoms: what can be removed so that a grid stays a grid."""

from typing import Literal

import numpy as np
from scipy.sparse import csr_matrix

from niwaki.budgets.rule import Atoms, Parts
from niwaki.graph import ChannelGraph
from niwaki.graph.groups import components
from niwaki.graph.splits import even_parts
from niwaki.scores import Scores

Grids = Literal["rows", "columns"]
Bundle = Literal["sum", "mean", "max"]
Blocks = Literal["keep", "also", "only"]
Splits = Literal["free", "even"]
ACROSS = "rows of grids that lie across each other"


def make_atoms(
    graph: ChannelGraph,
    scores: Scores,
    *,
    grids: Grids,
    exact_only: bool,
    bundle: Bundle,
    blocks: Blocks = "keep",
    splits: Splits = "free",
) -> tuple[Atoms, dict[str, str]]:
    """Atoms with their scores, and why groups without atoms have none (group -> reason).

    Plain groups: one atom per unit. Grids, by rows: whole rows (a head with its queries, keys and values). Grids, by
    columns: one position of every row; where rows keep different positions, the lowest-scored of each row go together.
    Blocks are the atoms of one pool: all of them may go. With even splits, groups that a call splits off one axis in
    equal parts lose their lowest-scored together, then their second lowest, and so on.
    """
    units = graph.units
    value = np.zeros(units.count)
    judged = np.zeros(units.count, bool)
    width = np.zeros(units.count, np.int64)
    group_of = np.full(units.count, -1, np.int64)
    skipped: dict[str, str] = {}
    for number, group in enumerate(graph.groups):
        group_of[group.ids] = number
        if group.fixed is not None:
            skipped[group.name] = group.fixed
        elif blocks == "only":
            skipped[group.name] = "only whole blocks are left out"
        elif group.name not in scores.values:
            skipped[group.name] = "the score can't judge it"
        else:
            value[group.ids] = scores.values[group.name].numpy()
            judged[group.ids] = True
        width[group.ids] = 1
    in_grid = units.in_row | units.in_column
    inexact = {kind: marks >= 0 for kind, marks in units.inexact.items()}

    lists: list[np.ndarray] = []  # units, atom by atom
    lengths: list[np.ndarray] = []  # of the atoms
    pools: list[np.ndarray] = []
    names: dict[int, str] = {}
    joint = {number: part for part in (even_parts(graph) if splits == "even" else []) for number in part}
    for number, group in enumerate(graph.groups):
        if group.name in skipped or in_grid[group.ids[0]]:
            continue
        if exact_only and inexact["row"][group.ids].any():
            skipped[group.name] = f"not exact: {group.inexact}"
            continue
        if group.units < 2:
            skipped[group.name] = "a single unit"
            continue
        if number in joint:
            continue
        lists.append(group.ids)
        lengths.append(np.ones(group.units, np.int64))
        pools.append(np.full(group.units, number, np.int64))
        names[number] = group.name

    for part in {id(part): part for part in joint.values()}.values():
        sides = [graph.groups[number] for number in part]
        if len({group.units for group in sides}) > 1 or any(group.name in skipped for group in sides):
            for group in sides:
                skipped.setdefault(group.name, "another part of its split stays whole")
            continue
        ranked = [group.ids[np.lexsort((-np.arange(group.units), value[group.ids]))] for group in sides]
        lists.append(np.stack(ranked, axis=1).ravel())  # [units, parts]
        lengths.append(np.full(sides[0].units, len(sides), np.int64))
        pools.append(np.full(sides[0].units, part[0], np.int64))
        names[part[0]] = sides[0].name

    least: dict[int, int] = {}
    keys: dict[tuple[int, ...], int] = {}
    closures: dict[Grids, np.ndarray] = {"rows": units.row, "columns": units.column}
    members = np.flatnonzero(in_grid) if blocks != "only" else np.zeros(0, np.int64)
    torn = {mode: _torn(graph, closures[mode], mode, group_of >= 0) for mode in closures if members.size}
    cluster = _clusters(graph) if members.size else np.zeros(units.count, np.int64)
    grids_of: dict[int, list[np.ndarray]] = {}
    stacks_of: dict[int, list[np.ndarray]] = {}
    for table, grids_seen in ((grids_of, units.grids), (stacks_of, units.stacks)):
        for grid in grids_seen:  # the units of a grid are of one class, and so in one cluster
            table.setdefault(int(cluster[grid.flat[0]]), []).append(grid)
    for c in np.unique(cluster[members]):
        mine = members[cluster[members] == c]
        held = [graph.groups[g].name for g in np.unique(group_of[mine]) if g >= 0]
        order: tuple[Grids, ...] = ("rows", "columns") if grids == "rows" else ("columns", "rows")
        found: list[np.ndarray] = []
        why = "a slab that stays with its grid"
        mode: Grids = grids
        for mode in order:
            viewed, stacked = tuple(grids_of.get(int(c), ())), tuple(stacks_of.get(int(c), ()))
            found, reason = _grid_atoms(
                graph, mine, (viewed, stacked), closures[mode], mode, judged, value, exact_only, inexact, torn[mode]
            )
            why = reason or why
            if len(found) > 1:
                break
        if len(found) < 2:
            for name in held:
                skipped.setdefault(name, why)
            continue
        for atom in found:  # alternatives are atoms that take from the same groups
            touched = tuple(np.unique(group_of[atom][group_of[atom] >= 0]).tolist())
            number = keys.setdefault(touched, len(graph.groups) + len(keys))
            names[number] = graph.groups[touched[0]].name
            least[number] = 2 if mode == "columns" else 1
            lists.append(atom)
            lengths.append(np.array([atom.size]))
            pools.append(np.array([number]))

    if blocks != "keep":
        judged_blocks = [block for block in graph.blocks if block.name in scores.values]
        number = len(graph.groups) + len(keys)
        for block in judged_blocks:
            value[block.ids] = scores.values[block.name].numpy()
            judged[block.ids] = True
        if judged_blocks:
            names[number], least[number] = "blocks", 0
            lists.append(np.concatenate([block.ids for block in judged_blocks]))
            lengths.append(np.ones(len(judged_blocks), np.int64))
            pools.append(np.full(len(judged_blocks), number, np.int64))

    shown = np.array(sorted(names), dtype=np.int64)
    empty = [np.zeros(0, np.int64)]
    parts = Parts(
        np.concatenate([*empty, *lists]).astype(np.int64),
        np.concatenate([[0], np.cumsum(np.concatenate(lengths or empty))]),
    )
    pool = np.searchsorted(shown, np.concatenate(pools or empty))
    score = _bundled(value[parts.flat], judged[parts.flat], parts.owner, len(parts), bundle)
    groups = group_of[parts.flat]
    takes = csr_matrix(
        (np.ones(int((groups >= 0).sum()), np.int64), (parts.owner[groups >= 0], groups[groups >= 0])),
        shape=(len(parts), len(graph.groups)),
    )
    takes.sum_duplicates()
    spans = np.ones(len(parts), dtype=np.int64)
    np.maximum.at(spans, np.repeat(np.arange(len(parts)), np.diff(takes.indptr)), takes.data)
    order_ = np.argsort(pool, kind="stable")
    atoms = Atoms(
        units=parts.pick(order_),
        score=score[order_],
        pool=pool[order_],
        width=spans[order_],
        saves={},
        least=np.array([least.get(n, 1) for n in sorted(names)], dtype=np.int64),
        pools=tuple(names[n] for n in sorted(names)),
        takes=takes[order_],
        sizes=np.array([group.units for group in graph.groups], dtype=np.int64),
        multiples=np.array([group.multiple for group in graph.groups], dtype=np.int64),
    )
    return atoms, skipped


def _torn(graph: ChannelGraph, closure: np.ndarray, mode: Grids, shown: np.ndarray) -> np.ndarray:
    """Which closures hold a slab without all of what it spans: it would go, and that would stay; bool `[closures]`."""
    frozen = graph.units.row_frozen if mode == "rows" else graph.units.column_frozen
    slab, element = graph.units.slabs
    apart = (closure[slab] != closure[element]) | frozen[element]
    torn = np.zeros(int(closure.max(initial=0)) + 1, bool)
    torn[closure[slab[apart & ~frozen[slab] & shown[element]]]] = True
    return torn


def _clusters(graph: ChannelGraph) -> np.ndarray:
    """Units tied in any way, rows, columns or a common grid: they are decided in one manner."""
    units = graph.units
    n = units.count
    base = np.arange(n, dtype=np.int64)
    edges = []
    for closure in (units.row, units.column, units.classes):
        first = np.full(int(closure.max(initial=0)) + 1, -1, dtype=np.int64)
        first[closure[::-1]] = base[::-1]
        edges.append((base, first[closure]))
    return components(n, edges)


def _grid_atoms(
    graph: ChannelGraph,
    mine: np.ndarray,
    viewed: tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]],
    closure: np.ndarray,
    mode: Grids,
    judged: np.ndarray,
    value: np.ndarray,
    exact_only: bool,
    inexact: dict[str, np.ndarray],
    torn: np.ndarray,
) -> tuple[list[np.ndarray], str | None]:
    """Atoms of one cluster in one manner, and a reason where it has none; `viewed` has its grids and its stacks."""
    units = graph.units
    kind = "row" if mode == "rows" else "column"
    frozen = units.row_frozen if mode == "rows" else units.column_frozen
    reasons = units.row_reason if mode == "rows" else units.column_reason
    inside = mine[~frozen[mine]]
    if not inside.size:
        return [], None
    order = np.argsort(closure[inside], kind="stable")
    inside = inside[order]
    starts = np.flatnonzero(np.r_[True, np.diff(closure[inside]) != 0])
    stops = np.append(starts[1:], inside.size)
    reason = np.maximum.reduceat(reasons[inside], starts)  # of each part, as all that follows
    vague = np.maximum.reduceat(units.inexact[kind][inside], starts)
    whole = ~torn[closure[inside[starts]]]
    bad = (reason >= 0) | ~whole | (exact_only & np.logical_or.reduceat(inexact[kind][inside], starts))
    seen = np.logical_or.reduceat(judged[inside], starts)
    why = None if seen.all() else "the score can't judge it"
    if bad.any():
        last = int(np.flatnonzero(bad)[-1])
        if reason[last] >= 0:
            why = units.reasons[int(reason[last])]
        else:
            why = "not exact: " + units.inexact_reasons[int(vague[last])] if whole[last] else ACROSS
    good = [inside[starts[i] : stops[i]] for i in np.flatnonzero(~bad & seen).tolist()]
    grids, stacks = viewed
    if mode == "rows" and good:
        even, _, _ = _takes(grids, good, rows_go=True)
        why = why if even.all() else ACROSS
        good = [part for part, fits in zip(good, even.tolist(), strict=True) if fits]
    if not good or (mode == "rows" and not stacks):
        return good, why
    totals = np.array([value[part[judged[part]]].sum() for part in good])
    return _balanced(stacks if mode == "rows" else grids, good, totals, why, rows_go=mode == "rows")


def _balanced(
    grids: tuple[np.ndarray, ...], parts: list[np.ndarray], totals: np.ndarray, why: str | None, *, rows_go: bool
) -> tuple[list[np.ndarray], str | None]:
    """Atoms that take equally from every row of every grid.

    A part that does so is one by itself. Parts that take from one row only wait for their like in the other rows: the
    lowest-scored of every row go together, then the second lowest, and so on.
    """
    even, marks, shapes = _takes(grids, parts, rows_go=rows_go)
    atoms = [parts[i] for i in np.flatnonzero(even)]
    lanes: dict[tuple[tuple[int, int, int], ...], list[int]] = {}
    for i in np.flatnonzero(~even).tolist():
        lanes.setdefault(tuple(sorted(marks[i])), []).append(i)
    if not lanes:
        return atoms, why
    for family in _families(list(lanes)):
        together: dict[tuple[int, int], int] = {}
        for lane in family:
            for g, r, n in lane:
                together[g, r] = together.get((g, r), 0) + n
        touched = {g for g, _ in together}
        if any(len({together.get((g, r), 0) for r in range(shapes[g])}) > 1 for g in touched):
            why = ACROSS
        elif len({len(lanes[lane]) for lane in family}) > 1:
            why = "rows of different lengths"
        else:
            ranked = [[lanes[lane][j] for j in np.argsort(totals[lanes[lane]], kind="stable")] for lane in family]
            atoms += [np.unique(np.concatenate([parts[row[j]] for row in ranked])) for j in range(len(ranked[0]))]
    return atoms, why


def _takes(
    grids: tuple[np.ndarray, ...], parts: list[np.ndarray], *, rows_go: bool
) -> tuple[np.ndarray, list[list[tuple[int, int, int]]], dict[int, int]]:
    """Whether each part leaves every grid a grid; else what it takes, as (grid, row, count); rows of grids."""
    mine = np.unique(np.concatenate(parts))
    owner = np.full(mine.size, -1, dtype=np.int64)
    for i, part in enumerate(parts):
        owner[np.searchsorted(mine, part)] = i
    marks: list[list[tuple[int, int, int]]] = [[] for _ in parts]
    shapes: dict[int, int] = {}
    even = np.ones(len(parts), bool)
    for g, grid in enumerate(grids):
        at = np.minimum(np.searchsorted(mine, grid), mine.size - 1)
        held = np.where(mine[at] == grid, owner[at], -1)
        if (held < 0).all():
            continue
        taken = np.zeros((len(parts), grid.shape[0]), dtype=np.int64)
        rows = np.broadcast_to(np.arange(grid.shape[0])[:, None], grid.shape)
        np.add.at(taken, (held[held >= 0], rows[held >= 0]), 1)
        shapes[g] = grid.shape[0]
        uneven = (taken != taken[:, :1]).any(1)
        if rows_go:  # rows that go as a whole disturb no other; what goes from every row has to be columns of it
            uneven &= ~((taken == 0) | (taken == grid.shape[1])).all(1)
            for i in np.flatnonzero(~uneven & (taken[:, 0] > 0) & (taken[:, 0] < grid.shape[1])).tolist():
                uneven[i] = ((held == i) != (held[:1] == i)).any()
        even &= ~uneven
        for i in np.flatnonzero(uneven).tolist():
            marks[i].extend((g, int(r), int(taken[i, r])) for r in np.flatnonzero(taken[i]))
    return even, marks, shapes


Lane = tuple[tuple[int, int, int], ...]


def _families(lanes: list[Lane]) -> list[list[Lane]]:
    """Lanes that touch a common grid, directly or through others."""
    owner: dict[int, int] = {}
    families: dict[int, list[Lane]] = {}
    for i, lane in enumerate(lanes):
        mine = [lane]
        for old in {owner[g] for g, _, _ in lane if g in owner}:
            mine = families.pop(old) + mine
        families[i] = mine
        for other in mine:
            for g, _, _ in other:
                owner[g] = i
    return list(families.values())


def _bundled(value: np.ndarray, judged: np.ndarray, owner: np.ndarray, atoms: int, bundle: Bundle) -> np.ndarray:
    """One score per atom from those of its judged units; float64 `[atoms]`."""
    value, owner = value[judged], owner[judged]
    if bundle == "max":
        best = np.full(atoms, -np.inf)
        np.maximum.at(best, owner, value)
        return best
    total = np.bincount(owner, weights=value, minlength=atoms)
    return total if bundle == "sum" else total / np.maximum(np.bincount(owner, minlength=atoms), 1)
