"""The plot of accuracy against cost, and the front in it."""

from collections.abc import Sequence
from html import escape

from niwaki.report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, spread_out, ticks
from niwaki.report.numbers import plain
from niwaki.report.points import Point

SERIES = 8  # colours the page defines; further series take them again with another marker
_AROUND = ((0, -13), (-13, -4), (13, 4), (0, 14), (-13, 10), (13, -10))
"""Where a number may lie, seen from its point, in units of the picture; the first that is free."""
_APART, _CLEAR = 13, 10  # what two numbers, and a number and a marker, keep apart

__all__ = ["SERIES", "legend", "marker", "scatter", "series_of", "ticks"]


def marker(kind: int, x: float, y: float, size: float = 4.5) -> str:
    """A marker that can be told from the others without colour."""
    if kind % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    corners = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        2: ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
        3: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
    }[kind % 4]
    path = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}"/>'


def series_of(points: Sequence[Point]) -> list[str]:
    """Names of the series in drawing order."""
    return list(dict.fromkeys(point.series for point in points))


def scatter(
    points: Sequence[Point],
    *,
    cost: str,
    joined: bool,
    unit: str = "%",
    front: Sequence[Point] = (),
    metric: str = "accuracy",
) -> str:
    """The plot: cost against accuracy; one colour and marker per series, `joined` by lines.

    Every point says its label and numbers to whoever points at it (an SVG title), and has a line from its least to its
    largest accuracy where it has a span.

    Args:
        metric: what the points' accuracy is called.
        unit: of the cost; "%" is the share of `cost` that stays.
        front: the best of the points by rising cost: joined by a line, and numbered from 1.
    """
    shares, accuracies = [p.share for p in points], [a for p in points for a in (p.accuracy, *(p.span or ()))]
    across = (min(0.0, *shares), max(100.0, *shares) + 3) if unit == "%" else spread_out(shares, floor=0)
    margin = max(1.0, 0.08 * (max(accuracies) - min(accuracies)))
    low, high = min(accuracies) - margin, min(100.0, max(accuracies) + margin)
    low = max(0.0, low) if min(accuracies) >= 0 else low  # gains may be losses
    axes = Axes(across, (low, high) if high > low else (low - 1, high + 1))
    x, y = axes.x, axes.y
    parts = [axes.frame(f"{cost} kept, %" if unit == "%" else f"{cost}, {unit}", f"{metric}, %")]
    if len(front) > 1:
        path = " ".join(f"{x(p.share):.1f},{y(p.accuracy):.1f}" for p in front)
        parts.append(f'<polyline class="front" points="{path}"/>')
    for number, name in enumerate(series_of(points)):
        mine = [point for point in points if point.series == name]
        parts.append(f'<g class="s{number % SERIES}">')
        if joined and len(mine) > 1 and name != "uncut":
            path = " ".join(f"{x(point.share):.1f},{y(point.accuracy):.1f}" for point in mine)
            parts.append(f'<polyline points="{path}"/>')
        for point in mine:
            at = f"{point.share:.1f} % of {cost}" if unit == "%" else f"{plain(point.share)} {unit}"
            say = escape(f"{point.label}: {at}, {metric} {point.accuracy:.2f} %")
            span = ""
            if point.span is not None and point.span[1] > point.span[0]:
                ends = f'y1="{y(point.span[0]):.1f}" y2="{y(point.span[1]):.1f}"'
                span = f'<line class="span" x1="{x(point.share):.1f}" x2="{x(point.share):.1f}" {ends}/>'
            parts.append(f"<g><title>{say}</title>{span}{marker(number, x(point.share), y(point.accuracy))}</g>")
        parts.append("</g>")
    parts += _numbers(*([(x(p.share), y(p.accuracy)) for p in some] for some in (front, points)))
    return axes.picture("".join(parts), f"{metric} against {cost}")


def _numbers(places: Sequence[tuple[float, float]], markers: Sequence[tuple[float, float]]) -> list[str]:
    """The numbers of the front beside its points, where they lie on nothing else; one that can't is left out."""
    drawn: list[tuple[float, float]] = []
    parts = []
    for number, (x, y) in enumerate(places, start=1):
        others = [(a, b) for a, b in markers if (a, b) != (x, y)]
        for dx, dy in _AROUND:
            place = (x + dx, y + dy)
            inside = LEFT < place[0] < WIDTH - RIGHT and TOP < place[1] < HEIGHT - BOTTOM
            if inside and not _near(place, drawn, _APART) and not _near(place, others, _CLEAR):
                drawn.append(place)
                words = f'x="{place[0]:.1f}" y="{place[1] + 4:.1f}" text-anchor="middle"'
                parts.append(f'<text class="rank" {words}>{number}</text>')
                break
    return parts


def _near(place: tuple[float, float], others: Sequence[tuple[float, float]], apart: float) -> bool:
    return any(abs(place[0] - a) < apart and abs(place[1] - b) < apart for a, b in others)


def legend(points: Sequence[Point], *, front: bool = False) -> str:
    """Marker and name of every series, as HTML that wraps on narrow screens."""
    items = []
    for number, name in enumerate(series_of(points)):
        mark = f'<svg class="mark s{number % SERIES}" viewBox="0 0 14 14">{marker(number, 7, 7)}</svg>'
        items.append(f"<span>{mark}{escape(name)}</span>")
    if front:
        line = '<svg class="mark" viewBox="0 0 14 14"><polyline class="front" points="0,11 14,3"/></svg>'
        items.append(f"<span>{line}front</span>")
    return f'<p class="legend">{"".join(items)}</p>'
