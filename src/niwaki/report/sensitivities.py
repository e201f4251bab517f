"""How groups bear being cut alone: a page with one line for every group, and the same as a bare picture."""

from collections.abc import Sequence
from html import escape
from typing import Any

from niwaki.report.axes import Axes, spread_out
from niwaki.report.numbers import plain
from niwaki.report.parts import command, drawn, figure, page
from niwaki.report.scatter import SERIES
from niwaki.report.tables import Table

NAMED = 8
"""Groups that are drawn in colour and named; the others are grey."""
NOTE = "Each group is cut alone, nothing is repaired or trained. Two groups cut together may lose more than both alone."
Group = tuple[str, Sequence[Any]]
"""A group's name and its rows, from wide to narrow."""


def table_of(groups: Sequence[Group], *, before: float, metric: str, unit: str, shares: Sequence[float] = ()) -> Table:
    """A row for every group, the one that suffers most first: the metric at each of the shares that were asked for; a
    share that leaves a group as many units as another one does is empty.
    """
    shares = sorted({*shares} or {row.kept / row.units for _, rows in groups for row in rows}, reverse=True)
    lines = []
    for name, rows in groups:
        cells, at = [""] * len(shares), -1
        for left, row in zip(range(len(rows), 0, -1), rows, strict=True):
            off = [abs(share - row.kept / row.units) for share in shares]
            at = min(range(at + 1, len(shares) - left + 1), key=off.__getitem__)
            cells[at] = f"{plain(row.value)} ({row.kept})"
        lines.append((name, str(rows[0].units), *cells))
    heads = ("group", "units", *(f"{100 * share:.3g} % kept" for share in shares))
    said = f"{metric}{f', {unit}' if unit else ''} (units kept); uncut {plain(before)}"
    return Table(said, heads, tuple(lines), frozenset(range(1, len(shares) + 2)), NOTE)


def plot(groups: Sequence[Group], *, before: float, metric: str, unit: str) -> str:
    """Share of the group that stays against the metric; the groups that suffer most in colour."""
    values = [row.value for _, rows in groups for row in rows if row.value - row.value == 0]
    axes = Axes((0.0, 103.0), spread_out([before, *values]), width=640, height=380)
    parts = [axes.frame("of the group kept, %", f"{metric}{f', {unit}' if unit else ''}")]
    for number, (name, rows) in reversed(list(enumerate(groups))):
        points = [(100.0, before), *((100 * row.kept / row.units, row.value) for row in rows)]
        path = " ".join(f"{axes.x(a):.1f},{axes.y(b):.1f}" for a, b in points if b - b == 0)
        kind = f"s{number % SERIES}" if number < NAMED else "rest"
        colour = 'stroke="currentColor"' if number < NAMED else 'stroke="gray" stroke-opacity="0.35"'
        said = "; ".join(f"{row.kept} of {row.units}: {plain(row.value)}" for row in rows)
        parts.append(
            f'<g class="{kind}"><polyline points="{path}" fill="none" {colour} stroke-width="1.6"/>'
            f"<title>{escape(name)}: {escape(said)}</title></g>"
        )
    return axes.picture("".join(parts), f"{metric} by share kept, {len(groups)} groups")


def names(groups: Sequence[Group]) -> str:
    """Which colour is which group."""
    items = "".join(
        f'<span class="s{number % SERIES}"><svg width="18" height="8" aria-hidden="true">'
        f'<line x1="0" x2="18" y1="4" y2="4" stroke="currentColor" stroke-width="2"/></svg> </span>'
        f"{escape(name)} &nbsp; "
        for number, (name, _) in enumerate(groups[:NAMED])
    )
    return f"<p>{items}{'the others grey' if len(groups) > NAMED else ''}</p>"


def sensitivity_page(
    groups: Sequence[Group],
    *,
    before: float,
    metric: str,
    unit: str,
    heading: str,
    shares: Sequence[float] = (),
    spoken: str | None = None,
) -> str:
    """A self-contained page: the plot, every number, and the command."""
    words = {"before": before, "metric": metric, "unit": unit}
    worst = ", ".join(name for name, _ in groups[:3])
    body = [
        f"<section><h2>Cut alone</h2>{figure(plot(groups, **words) + names(groups), NOTE)}</section>",  # type: ignore[arg-type]
        drawn(table_of(groups, **words, shares=shares), search="groups"),  # type: ignore[arg-type]
        command(spoken),
    ]
    return page(heading, f"{len(groups)} groups cut one at a time; most sensitive: {worst}.", body)


def sensitivity_svg(groups: Sequence[Group], *, before: float, metric: str, unit: str) -> str:
    """The plot as a file of its own."""
    drawing = plot(groups, before=before, metric=metric, unit=unit)
    colours = ("#3465c3", "#c4502d", "#2d8f5d", "#8a4fb5", "#b0831a", "#1d8a99", "#b23a76", "#5e6b2f")
    rules = "".join(f".s{i}{{color:{colour}}}" for i, colour in enumerate(colours))
    style = f"<style>{rules}text{{font:11px sans-serif}}.grid{{stroke:#8884}}</style>"
    return drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{style}", 1)
