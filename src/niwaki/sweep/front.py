"""The best trade-offs: candidates that no other one beats in cost and accuracy at once."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True)
class Candidate:
    """Trials that differ in their seed only: one point of the front."""

    settings: Mapping[str, Any]
    """Options of `niwaki compress` but the seed; a method's own under "settings"."""
    trials: tuple[str, ...]
    """Names of the trials that are done."""
    values: Mapping[str, float]
    """Mean of every measurement that all of these trials have."""
    spans: Mapping[str, tuple[float, float]]
    """Least and largest of the same."""


def pareto(points: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Positions of the points (cost, accuracy) that no other point beats, by rising cost.

    A point is beaten by one that costs no more and is no less accurate, and is better in one of the two. Equal points
    do not beat each other.

    Examples:
        >>> pareto([(50, 90.0), (30, 80.0), (50, 85.0), (70, 89.0)])
        (1, 0)
    """
    order = sorted(range(len(points)), key=lambda number: (points[number][0], -points[number][1], number))
    front: list[int] = []
    best: tuple[float, float] | None = None
    for number in order:
        cost, accuracy = points[number]
        if best is None or accuracy > best[1] or (cost, accuracy) == best:
            front.append(number)
            best = (cost, accuracy)
    return tuple(front)


def candidates(rows: Iterable[Mapping[str, Any]]) -> tuple[Candidate, ...]:
    """Trials that are done (rows of results.jsonl), gathered over seeds, in the order they first appear."""
    gathered: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "done":
            gathered.setdefault(json.dumps(_but_seed(row["options"]), sort_keys=True), []).append(row)
    found = []
    for group in gathered.values():
        names = [
            name
            for name, value in group[0]["values"].items()
            if isinstance(value, (int, float)) and all(name in row["values"] for row in group)
        ]
        columns = {name: [float(row["values"][name]) for row in group] for name in names}
        found.append(
            Candidate(
                settings=_but_seed(group[0]["options"]),
                trials=tuple(row["trial"] for row in group),
                values={name: statistics.fmean(column) for name, column in columns.items()},
                spans={name: (min(column), max(column)) for name, column in columns.items()},
            )
        )
    return tuple(found)


def front(found: Sequence[Candidate], cost: str, quality: str = "accuracy") -> tuple[Candidate, ...]:
    """The candidates that no other beats in `cost` (less is better) and `quality` (more is better), by rising cost.

    Candidates that lack one of the two are left out.
    """
    able = [one for one in found if cost in one.values and quality in one.values]
    return tuple(able[number] for number in pareto([(one.values[cost], one.values[quality]) for one in able]))


def _but_seed(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "seed"}
