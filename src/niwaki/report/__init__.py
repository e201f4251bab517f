"""Reports on saved runs and sweeps: for the terminal, as one HTML page, and as a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from niwaki.errors import InputError
from niwaki.files import write_text
from niwaki.sweep.results import is_sweep
from niwaki.verbs import callable_module

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    Folders = str | Path | Sequence[str | Path]

_SHORT = 40  # characters of a model's source that a heading has room for: longer ones are paths

__all__ = ["data", "html", "terminal", "write"]


def terminal(folder: "Folders") -> "RenderableType":
    """The run or the sweep in `folder` as tables for a rich console; several runs below it, or folders, side by side.

    Raises:
        InputError: no run there.
        FileDamagedError: a file of the run is truncated, tampered with or contradicts another.
    """
    from niwaki.report import console, sweeps
    from niwaki.report.reading import read_all

    place = _sweep(folder)
    if place is not None:
        return sweeps.terminal_of(sweeps.read_sweep(place))
    found = read_all(folder)
    return console.terminal_of(found.runs, left_out=found.left_out)


def html(folder: "Folders") -> str:
    """The run or the sweep in `folder`, all runs below it, or several folders, as one HTML page that loads nothing.

    Raises:
        InputError: no run there.
        FileDamagedError: a file of the run is truncated, tampered with or contradicts another.
    """
    from niwaki.report import page, sweeps
    from niwaki.report.reading import read_all

    place = _sweep(folder)
    if place is not None:
        return sweeps.page_of(sweeps.read_sweep(place), heading=f"niwaki sweep: {place.resolve().name}")
    found = read_all(folder)
    runs = found.runs
    if len(runs) == 1 and not found.left_out:
        source, kind = (runs[0].get("model").get(key) or "" for key in ("source", "class"))
        model = (kind if len(source) > _SHORT and kind else source or kind) or "a model"
        return page.page_of(runs, heading=f"niwaki: {model}, {runs[0].get('method').get('name', '?')}")
    name = Path(folder).resolve().name if isinstance(folder, (str, Path)) else f"{len(runs)} runs"
    return page.page_of(runs, heading=f"niwaki: {name}", left_out=found.left_out)


def write(folder: "Folders", file: str | Path | None = None) -> Path:
    """Write the page to `file` in one step, and return its path.

    Unless said, that is report.html in the folder, sweep.html in that of a sweep; of several folders it must be said.

    Raises:
        InputError: the place cannot be written to; what was there is still there.
    """
    text = html(folder)
    if file is None:
        if not isinstance(folder, (str, Path)):
            raise InputError("write one page for several folders", found="no file", do="say which file")
        file = Path(folder) / ("report.html" if _sweep(folder) is None else "sweep.html")
    return write_text(Path(file), text)


def data(folder: "Folders") -> dict[str, Any]:
    """The same as plain data: `runs` and what was `left_out`, or `trials` and `fronts` of a sweep."""
    from niwaki.report import sweeps
    from niwaki.report.reading import read_all

    place = _sweep(folder)
    if place is not None:
        return sweeps.data_of(sweeps.read_sweep(place))
    found = read_all(folder)
    return {
        "runs": [{"folder": str(run.folder), **run.data} for run in found.runs],
        "left_out": found.left_out,
    }


def _sweep(folder: "Folders") -> Path | None:
    """The folder, if it is one and that of a sweep."""
    if not isinstance(folder, (str, Path)):
        return _sweep(folder[0]) if len(folder) == 1 else None
    return Path(folder) if is_sweep(folder) else None


VERB = "write"
callable_module(__name__)
