"""The report on a sweep: its best trade-offs, all candidates, and what failed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final
from urllib.parse import quote

from rich.console import Group, RenderableType
from rich.text import Text

from niwaki.files import REPORT
from niwaki.report.console import drawn as drawn_in_terminal
from niwaki.report.numbers import NOISE, plain, short, title
from niwaki.report.parts import command, drawn, figure, page
from niwaki.report.points import Point
from niwaki.report.reading import Run, read_json, read_run
from niwaki.report.scatter import legend, scatter
from niwaki.report.tables import Table, definitions
from niwaki.sweep.front import Candidate, candidates, front
from niwaki.sweep.results import PLAN, TRIALS, read_rows, times_of

COSTS = {"macs": "MACs", "latency": "ms"}
"""Costs that a front stands on, with their units."""


@final
@dataclass(frozen=True)
class Sweep:
    """A sweep as its files tell it."""

    folder: Path
    plan: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    candidates: tuple[Candidate, ...]
    earlier: tuple[Mapping[str, Any], ...] = ()
    """Rows of trials that were asked for once: they may be of other models or data, so they are compared with none."""

    @property
    def varied(self) -> tuple[str, ...]:
        """Options that not all trials share, a method's own as settings.NAME; the seed is not among them."""
        flat = [_flat(row["options"]) for row in self.rows]
        names = dict.fromkeys(name for one in flat for name in one if name != "seed")
        return tuple(name for name in names if len({json.dumps(one.get(name)) for one in flat}) > 1)

    @property
    def shared(self) -> dict[str, Any]:
        """Options that all trials share."""
        first = _flat(self.rows[0]["options"]) if self.rows else {}
        return {name: value for name, value in first.items() if name not in self.varied and name != "seed"}

    @property
    def metric(self) -> str:
        """The figure that the trials' task judges by; accuracy where they differ or name none of theirs."""
        named = {str(row.get("metric")) for row in self.rows if row.get("metric") in row["values"]}
        return named.pop() if len(named) == 1 else "accuracy"

    def front(self, cost: str) -> tuple[Candidate, ...]:
        return front(self.candidates, cost, self.metric)

    def count(self, status: str) -> int:
        return sum(1 for row in self.rows if row["status"] == status)


def read_sweep(folder: str | Path) -> Sweep:
    """The sweep in `folder`, checked.

    Raises:
        InputError: no sweep there.
        FileDamagedError: a file is damaged.
    """
    folder = Path(folder)
    every = read_rows(folder)
    rows = tuple(row for row in every if not row.get("earlier"))
    plan = read_json(folder / PLAN) if (folder / PLAN).is_file() else {}
    return Sweep(folder, plan, rows, candidates(rows), tuple(row for row in every if row.get("earlier")))


def headline(sweep: Sweep) -> str:
    """The sweep in one sentence."""
    done, failed, waiting = (sweep.count(status) for status in ("done", "failed", "waiting"))
    said = [f"{done} of {len(sweep.rows)} trials are done"]
    said += [f"{failed} failed"] if failed else []
    said += [f"{waiting} wait"] if waiting else []
    words = ", ".join(said) + f"; {len(sweep.candidates)} candidates"
    best = [
        f"{len(sweep.front(cost))} best in {title(sweep.metric)} against {title(cost)}"
        for cost in COSTS
        if sweep.front(cost)
    ]
    return words + (", " + ", ".join(best) if best else "") + "."


def front_table(sweep: Sweep, cost: str) -> Table:
    """The candidates that no other beats in this cost and the task's figure."""
    best = sweep.front(cost)
    heads = ("", *map(_called, sweep.varied), title(sweep.metric), title(cost), "of uncut", "seeds")
    rows = tuple(
        (
            str(number),
            *(_shown(_flat(one.settings).get(name)) for name in sweep.varied),
            _quality(one, sweep.metric),
            *_cost(one, cost),
            str(len(one.trials)),
        )
        for number, one in enumerate(best, start=1)
    )
    first = len(sweep.varied) + 1
    right = frozenset({0, *range(first, first + 4)})
    name = f"Best trade-offs: {title(sweep.metric)} against {title(cost)}"
    note = ""
    if rows and cost == "latency" and any(_noisy(one) for one in sweep.candidates):
        note = "Some times spread by more than a quarter (noisy): the machine did other work, so this front is a guess."
    if not rows:
        why = (
            "no latency was measured"
            if cost == "latency"
            else f"no trial measured {title(sweep.metric)} (no data was given)"
        )
        note = f"No front: {why}."
    return Table(name, heads, rows, right, note, _links(sweep, best), linked=1 if sweep.varied else 0)


def all_candidates(sweep: Sweep) -> Table:
    """Every candidate, with the fronts it is on."""
    fronts = {cost: sweep.front(cost) for cost in COSTS}
    timed = any("latency" in one.values for one in sweep.candidates)
    heads = (*map(_called, sweep.varied), title(sweep.metric), "MACs", "of uncut", "parameters")
    heads = (*heads, *(("latency",) if timed else ()), "seeds", "best in", "judge")
    rows = []
    for one in sweep.candidates:
        flat = _flat(one.settings)
        passed = [row.get("passed") for row in sweep.rows if row["trial"] in one.trials]
        rows.append(
            (
                *(_shown(flat.get(name)) for name in sweep.varied),
                _quality(one, sweep.metric),
                *_cost(one, "macs"),
                short(one.values["params"], "parameters") if "params" in one.values else "-",
                *((_cost(one, "latency")[0],) if timed else ()),
                str(len(one.trials)),
                ", ".join(title(cost) for cost, best in fronts.items() if one in best),
                "passed" if all(passed) else "NOT passed",
            )
        )
    first = len(sweep.varied)
    right = frozenset(range(first, first + 5 + timed))
    return Table("All candidates", heads, tuple(rows), right, "", _links(sweep, sweep.candidates))


def troubles(sweep: Sweep) -> Table:
    """Trials that are not done, and those that needed several attempts."""
    rows, gone = [], 0
    for row in sweep.rows:
        attempts, lost = int(row.get("attempts") or 0), int(row.get("lost") or 0)
        if row["status"] != "done" or attempts > 1:
            tried, gone = f"{attempts}" + (f" ({lost} lost)" if lost else ""), gone + lost
            rows.append((row["trial"], row["status"], tried, str(row.get("error") or "")))
    note = "lost: the worker or its machine went away; the trial was begun again." if gone else ""
    return Table("Failed, waiting, or begun more than once", ("trial", "status", "attempts", "error"), tuple(rows),
                 frozenset({2}), note)  # fmt: skip


def earlier_trials(sweep: Sweep) -> Table:
    """Trials that the sweep's file asked for once, and does not any more."""

    def cell(row: Mapping[str, Any], name: str, unit: str) -> str:
        return short(row["values"][name], unit) if name in row["values"] else "-"

    rows = tuple(
        (row["trial"], cell(row, sweep.metric, "%"), cell(row, "macs", "MACs"), _shown(list(_words(row))))
        for row in sweep.earlier
    )
    note = "The file has changed since: these trials are compared with none, and on no front." if rows else ""
    return Table("Asked for earlier", ("trial", title(sweep.metric), "MACs", "options"), rows, frozenset({1, 2}), note)


def _words(row: Mapping[str, Any]) -> Iterator[str]:
    return (f"{_called(name)} {_shown(value)}" for name, value in _flat(row["options"]).items())


def facts(sweep: Sweep) -> Table:
    """What all trials share, and who made them."""
    rows = [(_called(name), _shown(value)) for name, value in sweep.shared.items()]
    seeds = list(dict.fromkeys(str(row["options"]["seed"]) for row in sweep.rows if "seed" in row["options"]))
    rows += [("seeds", ", ".join(seeds))] if seeds else []
    rows += [(key, str(sweep.plan[key])) for key in ("started", "niwaki", "python", "platform") if sweep.plan.get(key)]
    nodes = list(dict.fromkeys(str(row["node"]) for row in sweep.rows if row.get("node")))
    rows += [("machines", ", ".join(nodes))] if nodes else []
    seconds = sum(float(row.get("seconds") or 0) for row in sweep.rows)
    rows += [("seconds of all trials", plain(round(seconds, 1)))] if seconds else []
    return Table("The same for all", ("", ""), tuple(rows))


def plot(sweep: Sweep, cost: str) -> str:
    """The task's figure against this cost, with the front."""
    able = [one for one in sweep.candidates if cost in one.values and sweep.metric in one.values]
    if not able:
        return ""
    share = cost == "macs" and len({one.values.get("macs_before") for one in able}) == 1 and _before(able[0], cost)

    def point(one: Candidate) -> Point:
        value = 100 * one.values[cost] / one.values["macs_before"] if share else one.values[cost]
        return Point(_method(one), _label(one, sweep.varied), value, one.values[sweep.metric], one.spans[sweep.metric])

    uncut = dict.fromkeys(
        (100.0 if share else before, one.values[f"{sweep.metric}_before"])
        for one in able
        if (before := _before(one, cost)) and f"{sweep.metric}_before" in one.values
    )
    found = [Point("uncut", "uncut", *place) for place in uncut]
    found += sorted((point(one) for one in able), key=lambda p: (p.series, p.share))
    best = [point(one) for one in sweep.front(cost)]
    unit = "%" if share else COSTS[cost]
    drawing = scatter(found, cost=title(cost), joined=False, unit=unit, front=best, metric=title(sweep.metric))
    words = "Numbers are those of the table; a line through a marker goes from its worst seed to its best."
    return figure(drawing + legend(found, front=len(best) > 1), words)


def page_of(sweep: Sweep, *, heading: str) -> str:
    """The page of a sweep."""
    body: list[str] = []
    for cost in COSTS:
        body += [drawn(front_table(sweep, cost)), plot(sweep, cost)]
    body += [
        drawn(all_candidates(sweep), search="candidates"),
        drawn(troubles(sweep)),
        drawn(earlier_trials(sweep)),
        command(sweep.plan.get("command")),
        drawn(facts(sweep)),
        drawn(meanings(sweep)),
    ]
    return page(heading, headline(sweep), body)


def terminal_of(sweep: Sweep) -> RenderableType:
    """The same for the terminal."""
    tables = [*(front_table(sweep, cost) for cost in COSTS), all_candidates(sweep), troubles(sweep)]
    tables += [earlier_trials(sweep), facts(sweep)]
    notes = [Text(table.note) for table in tables if table.note]
    drawings = (drawn_in_terminal(table) for table in tables if table.rows)
    return Group(Text(headline(sweep), style="bold"), *drawings, *notes)


def data_of(sweep: Sweep) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "folder": str(sweep.folder),
        "trials": list(sweep.rows),
        "earlier": list(sweep.earlier),
        "fronts": {
            cost: [
                {"options": dict(one.settings), "trials": list(one.trials), "values": dict(one.values)}
                for one in sweep.front(cost)
            ]
            for cost in COSTS
        },
    }


def meanings(sweep: Sweep) -> Table:
    """What the numbers mean: those of a run, and the latency that was measured afterwards."""
    table = definitions(_example(sweep))
    record = next(iter(times_of(sweep.folder).values()), None)
    if record is None:
        return table
    where = "after all trials, one after another"
    row = ("latency", f"{record.get('definition') or ''}; {where}", str(record.get("device") or ""), "-")
    return replace(table, rows=(*(one for one in table.rows if one[0] != "latency"), row))


def _example(sweep: Sweep) -> Sequence[Run]:
    """A trial that is done, for what its numbers mean."""
    done = next((row for row in sweep.rows if row["status"] == "done"), None)
    folder = sweep.folder / TRIALS / str(done["trial"]) if done else None
    return () if folder is None or not (folder / REPORT).is_file() else (read_run(folder),)


def _links(sweep: Sweep, found: Sequence[Candidate]) -> tuple[str | None, ...]:
    """A candidate's own page, seen from the sweep's."""
    places = [f"{TRIALS}/{one.trials[0]}/report.html" for one in found]
    return tuple(quote(place) if (sweep.folder / place).is_file() else None for place in places)


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    own = options.get("settings") or {}
    return {**{k: v for k, v in options.items() if k != "settings"}, **{f"settings.{k}": v for k, v in own.items()}}


def _called(name: str) -> str:
    return name.removeprefix("settings.").replace("_", " ")


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _method(one: Candidate) -> str:
    return str(one.settings.get("method", "magnitude"))


def _label(one: Candidate, varied: Sequence[str]) -> str:
    flat = _flat(one.settings)
    return ", ".join(f"{_called(name)} {_shown(flat[name])}" for name in varied if name in flat) or _method(one)


def _before(one: Candidate, cost: str) -> float | None:
    return one.values.get(f"{cost}_before") or None


def _noisy(one: Candidate) -> bool:
    return any(
        one.values.get(f"{side}_spread", 0.0) > NOISE * one.values.get(side, 0.0)
        for side in ("latency", "latency_before")
    )


def _cost(one: Candidate, cost: str) -> tuple[str, str]:
    """A cost and its share of the uncut one."""
    if cost not in one.values:
        return "-", ""
    value, before = one.values[cost], _before(one, cost)
    text = short(value, COSTS[cost])
    if cost == "latency":
        text = f"{plain(value)} ± {one.values.get('latency_spread', 0.0):.2g} ms" + (" (noisy)" if _noisy(one) else "")
    return text, "" if before is None else f"{100 * value / before:.1f} %"


def _quality(one: Candidate, metric: str) -> str:
    if metric not in one.values:
        return "-"
    low, high = one.spans[metric]
    mean = f"{one.values[metric]:.2f} %"
    return mean if len(one.trials) == 1 else f"{mean} ({low:.1f}..{high:.1f})"
