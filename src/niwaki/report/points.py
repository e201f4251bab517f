"""The points of the accuracy/cost plot: what was tried, at which share of the cost, with which accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from niwaki.report.aimed import sides
from niwaki.report.numbers import title
from niwaki.report.reading import Run

COSTS = ("macs", "params", "latency")
"""Costs that a plot may stand on, best first: the first one that every run has."""


@final
@dataclass(frozen=True)
class Point:
    """One measured trade: `share` of the uncut cost in percent (or the cost itself), `accuracy` in percent."""

    series: str
    label: str
    share: float
    accuracy: float
    span: tuple[float, float] | None = None
    """Least and largest accuracy, where the point is the mean of several runs."""


def cost_of(runs: Sequence[Run]) -> str | None:
    """The cost that every run measured before and after."""
    return next((cost for cost in COSTS if all(run.share(cost) is not None for run in runs)), None)


def metric_of(runs: Sequence[Run]) -> str:
    """What the runs' tasks measure, in words."""
    names = {run.metric for run in runs}
    return title(names.pop()) if len(names) == 1 else "accuracy"


def points(runs: Sequence[Run]) -> tuple[Point, ...]:
    """All points of one run (before, stages, candidates) or the results of several, in drawing order."""
    cost = cost_of(runs)
    if cost is None:
        return ()
    if len(runs) == 1:
        return (*_uncut(runs, cost), *_stages(runs[0], cost), *_candidates(runs[0], cost))
    found = []
    for run in runs:
        share, accuracy = run.share(cost), run.number("after", run.metric)
        if share is not None and accuracy is not None:
            found.append(Point(run.get("method").get("name", "?"), run.name, 100 * share, accuracy))
    return (*_uncut(runs, cost), *sorted(found, key=lambda point: (point.series, point.share)))


def _uncut(runs: Sequence[Run], cost: str) -> list[Point]:
    accuracies = dict.fromkeys(run.number("before", run.metric) for run in runs)
    return [Point("uncut", "uncut", 100.0, accuracy) for accuracy in accuracies if accuracy is not None]


def _stages(run: Run, cost: str) -> list[Point]:
    before, found = run.number("before", cost), []
    for stage in run.get("stages"):
        taken = stage.get("measurements") or {}
        at = taken[cost]["value"] if cost in taken else run.number("after", cost)
        if run.metric in taken and before and at is not None:
            found.append(
                Point(stage.get("stage", "?"), stage.get("stage", "?"), 100 * at / before, taken[run.metric]["value"])
            )
    accuracy, share = run.number("after", run.metric), run.share(cost)
    if not found and accuracy is not None and share is not None:
        found.append(Point("after", "after", 100 * share, accuracy))
    return found


def _candidates(run: Run, cost: str) -> list[Point]:
    before, found = run.number("before", cost), []
    for candidate in candidates_of(run):
        at, accuracy = candidate.get(cost), candidate.get(run.metric)
        if at is not None and accuracy is not None and before:
            found.append(Point("candidates", candidate.get("label") or "", 100 * at / before, accuracy))
    return sorted(found, key=lambda point: point.share)


def candidates_of(run: Run) -> list[dict[str, Any]]:
    """What was tried beside the stages themselves."""
    own = {"before", "after", *(stage.get("stage") for stage in run.get("stages"))}
    return [candidate for candidate in run.get("candidates") if candidate.get("label") not in own]


def layer_widths(run: Run) -> list[tuple[str, int, int]]:
    """Layers and their output widths (axis 0 of the weight) before and after, in the model's order."""
    return [
        (record["tensor"].removesuffix(".weight"), int(record["before"]), int(record["after"]))
        for record in run.get("widths")
        if record["axis"] == 0
    ]


def runtimes(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """Every time that was taken of the small model, by runtime: PyTorch's, the budget's target's, those of exports."""
    found = [
        (f"PyTorch{'' if name == 'latency' else ' (' + name.removeprefix('latency_').replace('_', ' ') + ')'}", record)
        for name, record in run.get("after").items()
        if name.startswith("latency") and record.get("unit") == "ms"
    ]
    there = sides(run)[1].get("runtime_latency")
    if there is not None:
        found.append(
            (f"{(run.settings.get('target') or {}).get('runtime') or 'a runtime'}, the budget's target", there)
        )
    return found + [one for kind, taken in run.get("exports").items() for one in _times(str(kind), taken)]


def _times(label: str, taken: Any) -> list[tuple[str, dict[str, Any]]]:
    """Measurements in milliseconds anywhere in `taken`, by the names that lead there."""
    if not isinstance(taken, dict):
        return []
    if taken.get("unit") == "ms" and isinstance(taken.get("value"), (int, float)):
        return [(label, taken)]
    called = {"latency": label, "pytorch_latency": f"PyTorch beside {label}"}
    inner = [(called.get(str(name), f"{label} {name}"), value) for name, value in taken.items()]
    return [one for name, value in inner for one in _times(name, value)]
