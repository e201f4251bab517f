"""The accuracy/cost plot as one inline SVG, coloured by the page's own variables (light and dark)."""

import math
from collections.abc import Sequence
from html import escape

from niwaki.report.points import Point

WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 46
SERIES = 8  # colours the page defines; further series take them again with another marker


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high].

    Examples:
        >>> ticks(0, 100)
        [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


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


def scatter(points: Sequence[Point], *, cost: str, joined: bool) -> str:
    """The plot: share of `cost` that stays against accuracy; one colour and marker per series, `joined` by lines.

    Every point says its label and numbers to whoever points at it (an SVG title).
    """
    shares, accuracies = [p.share for p in points], [p.accuracy for p in points]
    low_x, high_x = min(0.0, *shares), max(100.0, *shares) + 3
    margin = max(1.0, 0.08 * (max(accuracies) - min(accuracies)))
    low_y, high_y = max(0.0, min(accuracies) - margin), min(100.0, max(accuracies) + margin)
    if high_y <= low_y:
        low_y, high_y = low_y - 1, high_y + 1

    def x(share: float) -> float:
        return LEFT + (share - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def y(accuracy: float) -> float:
        return HEIGHT - BOTTOM - (accuracy - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="accuracy against {escape(cost)}">'
    ]
    for share in ticks(low_x, high_x):
        parts.append(f'<line class="grid" x1="{x(share):.1f}" x2="{x(share):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x(share):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{share:g}</text>')
    for accuracy in ticks(low_y, high_y):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(accuracy):.1f}" y2="{y(accuracy):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 7}" y="{y(accuracy) + 4:.1f}" text-anchor="end">{accuracy:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(cost)} kept, %</text>')
    height = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(13 {height:.0f}) rotate(-90)" text-anchor="middle">accuracy, %</text>')
    for number, name in enumerate(series_of(points)):
        mine = [point for point in points if point.series == name]
        parts.append(f'<g class="s{number % SERIES}">')
        if joined and len(mine) > 1:
            path = " ".join(f"{x(point.share):.1f},{y(point.accuracy):.1f}" for point in mine)
            parts.append(f'<polyline points="{path}"/>')
        for point in mine:
            say = escape(f"{point.label}: {point.share:.1f} % of {cost}, accuracy {point.accuracy:.2f} %")
            parts.append(f"<g><title>{say}</title>{marker(number, x(point.share), y(point.accuracy))}</g>")
        parts.append("</g>")
    parts.append("</svg>")
    return "".join(parts)


def legend(points: Sequence[Point]) -> str:
    """Marker and name of every series, as HTML that wraps on narrow screens."""
    items = []
    for number, name in enumerate(series_of(points)):
        mark = f'<svg class="mark s{number % SERIES}" viewBox="0 0 14 14">{marker(number, 7, 7)}</svg>'
        items.append(f"<span>{mark}{escape(name)}</span>")
    return f'<p class="legend">{"".join(items)}</p>'
