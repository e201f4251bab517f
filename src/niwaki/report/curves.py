"""Training curves: what was written down after each epoch, one small plot for each number."""

from collections.abc import Sequence
from html import escape
from typing import Any

from niwaki.report.axes import Axes, spread_out
from niwaki.report.numbers import plain
from niwaki.report.reading import Run

ALONG = ("epoch", "step", "steps", "seconds", "samples")
"""Entries that count rather than tell how it went."""
TITLES = {"lr": "learning rate", "loss": "training loss"}
_SMALL = 230  # height


def epochs_of(run: Run) -> list[dict[str, Any]]:
    """Entries of the training history, one for each epoch."""
    return list((run.data.get("history") or {}).get("epochs") or ())


def curves_of(epochs: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Points (epoch, number) of every number of the history; those that an entry lacks are left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for position, entry in enumerate(epochs, start=1):
        for name, value in entry.items():
            if name not in ALONG and isinstance(value, (int, float)) and not isinstance(value, bool):
                epoch = entry.get("epoch", position)
                found.setdefault(name, []).append((float(epoch), float(value)))
    return found


def _title(name: str) -> str:
    return TITLES.get(name, name.replace("_", " "))


def curve(name: str, points: Sequence[tuple[float, float]]) -> str:
    """One curve over the epochs."""
    title = _title(name)
    values = [value for _, value in points]
    axes = Axes((points[0][0], points[-1][0]), spread_out(values, floor=0 if min(values) >= 0 else None), height=_SMALL)
    path = " ".join(f"{axes.x(epoch):.1f},{axes.y(value):.1f}" for epoch, value in points)
    dots = "".join(
        f"<g><title>epoch {plain(epoch)}: {escape(title)} {plain(value)}</title>"
        f'<circle cx="{axes.x(epoch):.1f}" cy="{axes.y(value):.1f}" r="3"/></g>'
        for epoch, value in points[:: max(1, len(points) // 60)]
    )
    inside = f'{axes.frame("epoch", "", whole=True)}<g class="s1"><polyline points="{path}"/>{dots}</g>'
    return axes.picture(inside, f"{title} over the epochs")


def training(run: Run) -> str:
    """All curves side by side; a sentence where there is one epoch only, nothing where nothing was trained."""
    epochs = epochs_of(run)
    found = {name: points for name, points in curves_of(epochs).items() if points}
    if "validation" in found and run.get("validation"):  # which of the task's metrics that is
        found = {
            f"validation {next(iter(run.get('validation')))}" if name == "validation" else name: points
            for name, points in found.items()
        }
    if not found:
        return ""
    seconds = sum(entry["seconds"] for entry in epochs if isinstance(entry.get("seconds"), (int, float)))
    words = f"{len(epochs)} epoch{'s' if len(epochs) > 1 else ''}"
    words += f" in {plain(seconds)} s" if seconds else ""
    if len(epochs) == 1:
        words += ": " + ", ".join(f"{_title(n)} {plain(p[0][1])}" for n, p in found.items())
        return f"<section><h2>Training</h2><p>{escape(words)}.</p></section>"
    drawings = "".join(
        f"<figure><figcaption>{escape(_title(name))}</figcaption>{curve(name, points)}</figure>"
        for name, points in found.items()
    )
    return f'<section><h2>Training</h2><p>{escape(words)}.</p><div class="row">{drawings}</div></section>'
