"""The result of a budget of time or energy: one number before and one after, in the runtime that the budget is about.

The network that was chosen was measured in turns with the uncut one: that is the result. What PyTorch takes, and what a
later measurement of each network by itself said, stand beside it under their own names.
"""

from dataclasses import dataclass
from typing import Any, final

from niwaki.report.numbers import short, title
from niwaki.report.reading import Run

EAGER = "latency"
"""The time that every run measures, in PyTorch."""


@final
@dataclass(frozen=True)
class Aimed:
    """What a budget of time or energy came to."""

    of: str
    where: str
    """The runtime, batch and threads, in words; nothing where the run does not say."""
    before: dict[str, Any]
    """The uncut network's, as a measurement."""
    after: dict[str, Any]
    limit: float | None
    met: str
    """Whether the limit was, in words."""

    @property
    def words(self) -> str:
        """In a sentence about the run."""
        first, last, unit = self.before["value"], self.after["value"], self.after["unit"]
        said = f"{100 * last / first:.1f} % of the {self.of}"
        if not self.where or self.limit is None:
            return said
        values = f"{short(last, unit)} of {short(first, unit)}, at most {short(self.limit, unit)} asked for"
        return f"{said} in {self.where}: {values}, {self.met}"


def aimed(run: Run) -> Aimed | None:
    """What the run's budget of time or energy came to; None where it had none, or nothing was measured."""
    told = run.get("measured")
    uncut, measured = told.get("uncut"), told.get("measured")
    if not uncut or not measured:
        return None
    of, unit, limit = told.get("of") or "latency", told.get("unit") or "ms", told.get("limit")
    met = "NOT met"
    if limit is not None and measured <= limit:
        met = "met"
    elif told.get("met"):
        met = f"met within {100 * (told.get('tolerance') or 0):g} %"
    record = run.get("after").get(f"runtime_{of}") or {}
    definition = told.get("definition") or f"{of}, measured in turns with the uncut network"
    shared = {"unit": unit, "definition": definition, "device": record.get("device"), "spread": None}
    return Aimed(of, _where(run), {**shared, "value": uncut}, {**shared, "value": measured}, limit, met)


def sides(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """All measurements before and after, those of the budget as they came out in turns."""
    found, before, after = aimed(run), run.get("before"), run.get("after")
    if found is None:
        return before, after
    name = f"runtime_{found.of}"
    return {**before, name: found.before}, {**after, name: found.after}


def called(run: Run, name: str) -> str:
    """How tables of this run call a measurement: times by their runtime, where there are several."""
    target = _target(run)
    if name.startswith("runtime_") and target.get("runtime"):
        own = f"{title(name.removeprefix('runtime_'))} in {_named(target)}"
        found = aimed(run)
        return f"{own}, the budget's" if found is not None and name == f"runtime_{found.of}" else own
    if name == EAGER and target.get("runtime"):
        return "latency in PyTorch eager"
    return title(name)


def _target(run: Run) -> dict[str, Any]:
    found = run.settings.get("target")
    return found if isinstance(found, dict) else {}


def _named(target: dict[str, Any]) -> str:
    """ "pytorch" is eager, too: as a target it has its own clock, batch and threads."""
    return "PyTorch as the target" if target["runtime"] == "pytorch" else str(target["runtime"])


def _where(run: Run) -> str:
    target = _target(run)
    if not target.get("runtime"):
        return ""
    threads = target.get("threads")
    sizes = f"batch {target.get('batch')}, {threads} CPU thread{'' if threads == 1 else 's'}"
    return f"{_named(target)} ({sizes})"
