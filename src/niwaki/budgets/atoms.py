"""From groups and scores to atoms: what can be removed so that a grid stays a grid."""

from typing import Literal

import numpy as np

from niwaki.budgets.rule import Atoms
from niwaki.graph import ChannelGraph
from niwaki.graph.groups import components
from niwaki.scores import Scores

Grids = Literal["rows", "columns"]


def make_atoms(graph: ChannelGraph, scores: Scores, *, grids: Grids, exact_only: bool, bundle: str) -> tuple[Atoms, dict[str, str]]:
    """Atoms with their scores, and why groups without atoms have none (group -> reason).

    Plain groups: one atom per unit. Grids, by rows: whole rows (a head with all its queries, keys and values). Grids, by
    columns: one position of every row; where rows keep different positions, the lowest-scored of each row go together.
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
        elif group.name not in scores.values:
            skipped[group.name] = "the score can't judge it"
        else:
            value[group.ids] = scores.values[group.name].numpy()
            judged[group.ids] = True
        width[group.ids] = 1
    in_grid = units.in_row | units.in_column
    inexact = {kind: marks >= 0 for kind, marks in units.inexact.items()}

    lists: list[np.ndarray] = []
    pools: list[int] = []
    names: dict[int, str] = {}
    for number, group in enumerate(graph.groups):
        if group.name in skipped or in_grid[group.ids[0]]:
            continue
        if exact_only and inexact["row"][group.ids].any():
            skipped[group.name] = f"not exact: {group.inexact}"
            continue
        if group.units < 2:
            skipped[group.name] = "a single unit"
            continue
        lists.extend(group.ids[:, None])
        pools.extend([number] * group.units)
        names[number] = group.name

    keys: dict[tuple[int, ...], int] = {}
    closures = {"rows": units.row, "columns": units.column}
    members = np.flatnonzero(in_grid)
    cluster = _clusters(graph)
    for c in np.unique(cluster[members]):
        mine = members[cluster[members] == c]
        held = [graph.groups[g].name for g in np.unique(group_of[mine]) if g >= 0]
        order: tuple[Grids, ...] = ("rows", "columns") if grids == "rows" else ("columns", "rows")
        found: list[np.ndarray] = []
        why = "a slab that stays with its grid"
        for mode in order:
            found, reason = _grid_atoms(graph, mine, closures[mode], mode, judged, value, exact_only, inexact)
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
            lists.append(atom)
            pools.append(number)

    known = {number: i for i, number in enumerate(sorted(names))}
    score = np.array([_bundled(value[a[judged[a]]], bundle) for a in lists]) if lists else np.zeros(0)
    spans = np.array([max(1, int(np.bincount(group_of[a][group_of[a] >= 0]).max(initial=1))) for a in lists], dtype=np.int64)
    order_ = np.argsort([known[p] for p in pools], kind="stable") if pools else np.zeros(0, int)
    atoms = Atoms(
        units=tuple(lists[i] for i in order_), score=score[order_],
        pool=np.array([known[pools[i]] for i in order_], dtype=np.int64), width=spans[order_], saves={},
        pools=tuple(names[n] for n in sorted(names)),
    )
    return atoms, skipped


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


def _grid_atoms(graph: ChannelGraph, mine: np.ndarray, closure: np.ndarray, mode: Grids, judged: np.ndarray, value: np.ndarray,
                exact_only: bool, inexact: dict[str, np.ndarray]) -> tuple[list[np.ndarray], str | None]:
    """Atoms of one cluster in one manner, and a reason where it has none."""
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
    parts = np.split(inside, starts[1:])
    good, why = [], None
    for part in parts:
        if (reasons[part] >= 0).any():
            why = units.reasons[int(reasons[part].max())]
        elif exact_only and inexact[kind][part].any():
            why = "not exact: " + units.inexact_reasons[int(units.inexact[kind][part].max())]
        elif judged[part].any():
            good.append(part)
        else:
            why = why or "the score can't judge it"
    if mode == "rows":
        return good, why
    rows = [np.unique(units.row[part[units.in_row[part]]]) for part in good]
    total = len(np.unique(units.row[inside[units.in_row[inside]]]))
    if not good or all(r.size == total for r in rows):
        return good, why
    if len(good) != len(parts):
        return [], why
    # rows keep their own positions, equally many each: the lowest-scored of every row go together
    lanes: dict[tuple[int, int], list[int]] = {}
    graph_group = {int(u): g for g, group in enumerate(graph.groups) for u in group.ids} if len(good) else {}
    for i, part in enumerate(good):
        owners = {graph_group.get(int(u), -1) for u in part} - {-1}
        for row in rows[i]:
            lanes.setdefault((int(row), min(owners, default=-1)), []).append(i)
    lengths = {len(lane) for lane in lanes.values()}
    if len(lengths) != 1:
        return [], "rows of different lengths"
    totals = np.array([value[part[judged[part]]].sum() for part in good])
    ranked = [[lane[j] for j in np.argsort(totals[lane], kind="stable")] for lane in lanes.values()]
    return [np.unique(np.concatenate([good[lane[j]] for lane in ranked])) for j in range(lengths.pop())], None


def _bundled(numbers: np.ndarray, bundle: str) -> float:
    if numbers.size == 0:
        return 0.0
    return float(numbers.mean() if bundle == "mean" else numbers.max() if bundle == "max" else numbers.sum())
