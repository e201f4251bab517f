"""What a search by losses did to every group: a plot of how much went by how sensitive tasks were, and every number."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, final

from niwaki.report.axes import Axes, spread_out
from niwaki.report.numbers import plain
from niwaki.report.parts import drawn, figure
from niwaki.report.reading import Run
from niwaki.report.scatter import SERIES, marker
from niwaki.report.tables import Table

NOTE = "Losses are of training pictures, of the network as cut so far, before any training; rises are relative."


@final
@dataclass(frozen=True)
class Searched:
    """One group in one round."""

    round: int
    group: str
    size: float
    gone: float
    """How many of it went, 0 where none."""
    task: str
    """Whose loss rose most at the first share that was tried."""
    first: float
    """That rise, over the share of the group that it was for: how sensitive the tasks are."""
    stopped: str
    """Whose loss rose most at the last trial."""
    rise: float
    """At the share that was accepted."""
    allowance: float
    tried: int
    losses: str
    grain: float = 0.0
    """By what share of the group its cuts grow; 0 where it was not said."""


def searched(run: Run) -> list[Searched]:
    """Every group that was tried, round by round."""
    found = []
    for number, told in enumerate(run.get("search").get("rounds") or [], start=1):
        grains = {one.get("name"): one.get("grain") for one in told.get("groups") or []}
        for step in told.get("steps") or []:
            trials, at = step.get("trials") or [], step.get("accepted")
            size = float(step.get("size") or 0)
            if not trials or size <= 0:
                continue
            taken = trials[at] if at is not None and 0 <= at < len(trials) else {}
            first, last = trials[0], trials[-1]
            share = float(first.get("count") or 1) / size
            kept = (told.get("selected") or {}).get(step.get("group"), 0) if told.get("selected") is not None else None
            gone = float(taken.get("count") or 0) if kept is None else float(kept)
            losses = ", ".join(f"{name} {plain(value)}" for name, value in (taken.get("losses") or {}).items())
            found.append(
                Searched(
                    number,
                    str(step.get("group")),
                    size,
                    gone,
                    str(first.get("task")),
                    _number(first.get("rise")) / share,
                    str(last.get("task")),
                    _number(taken.get("rise")) if taken else 0.0,
                    float(step.get("allowance") or 0),
                    len(trials),
                    losses,
                    float(grains.get(step.get("group")) or 0),
                )
            )
    return found


def _number(value: Any) -> float:
    return float("inf") if value is None else float(value)


def table_of(found: Sequence[Searched]) -> Table:
    """A row for every group, in the order of the search."""
    rows = tuple(
        (
            str(one.round),
            one.group,
            f"{one.gone:.0f} of {one.size:.0f}",
            f"{100 * one.gone / one.size:.0f} %",
            f"{100 * one.grain:.3g} %" if one.grain else "",
            one.task,
            f"{plain(one.first)}",
            f"{100 * one.rise:.2f} %",
            f"{100 * one.allowance:.2f} %",
            str(one.tried),
            one.stopped,
            one.losses,
        )
        for one in found
    )
    heads = (
        *(
            "round",
            "group",
            "gone",
            "share",
            "in steps of",
            "most sensitive",
            "sensitivity",
            "rise",
            "allowed",
            "tried",
            "last raised",
        ),
        "losses after",
    )
    return Table("The search, group after group", heads, rows, frozenset({0, 2, 3, 4, 6, 7, 8, 9}), NOTE)


def notes(run: Run) -> Table:
    """What the search has to say of itself: what it could not judge, cut finely enough, or reach."""
    return Table("To be known of the search", ("",), tuple((one,) for one in run.get("search").get("notes") or ()))


def plot(found: Sequence[Searched]) -> str:
    """Sensitivity against the share that went, the most sensitive task as marker and colour."""
    drawn_ = [one for one in found if one.first < float("inf")]
    if not drawn_:
        return ""
    tasks = list(dict.fromkeys(one.task for one in drawn_))
    axes = Axes(spread_out([one.first for one in drawn_]), (-4.0, 100.0), width=640, height=360)
    parts = [axes.frame("rise of the most sensitive loss per share of the group, at the first trial", "gone, %")]
    for number, task in enumerate(tasks):
        parts.append(f'<g class="s{number % SERIES}">')
        for one in drawn_:
            if one.task == task:
                said = (
                    f"{one.group}, round {one.round}: {one.gone:.0f} of {one.size:.0f} gone; {task} {plain(one.first)}"
                )
                mark = marker(number, axes.x(one.first), axes.y(100 * one.gone / one.size))
                parts.append(f"<g><title>{escape(said)}</title>{mark}</g>")
        parts.append("</g>")
    picture = axes.picture("".join(parts), f"share gone of {len(drawn_)} groups by sensitivity")
    box = '<svg class="mark s{}" viewBox="0 0 14 14">{}</svg>'
    names = [f"<span>{box.format(n % SERIES, marker(n, 7, 7))}{escape(task)}</span>" for n, task in enumerate(tasks)]
    return f'{picture}<p class="legend">{"".join(names)}</p>'


def searches(run: Run) -> str:
    """The part of the page; nothing where nothing was searched."""
    found = searched(run)
    if not found:
        return ""
    caption = "Each mark is a group; its colour is the task whose loss its first cut raised most."
    drawing = plot(found)
    picture = f"<section><h2>Shares by sensitivity</h2>{figure(drawing, caption)}</section>" if drawing else ""
    return picture + drawn(table_of(found), search="groups")
