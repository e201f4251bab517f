"""Reports on saved runs: for the terminal, as one HTML page, and as a file."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from niwaki.errors import InputError
from niwaki.verbs import callable_module

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["html", "terminal", "write"]


def terminal(folder: str | Path) -> "RenderableType":
    """The run in `folder` as tables for a rich console; several runs below it side by side.

    Raises:
        InputError: no run there.
        FileDamagedError: a file of the run is truncated, tampered with or contradicts another.
    """
    from niwaki.report.console import terminal_of
    from niwaki.report.reading import read

    return terminal_of(read(folder))


def html(folder: str | Path) -> str:
    """The run in `folder`, or all runs below it, as one HTML page that loads nothing.

    Raises:
        InputError: no run there.
        FileDamagedError: a file of the run is truncated, tampered with or contradicts another.
    """
    from niwaki.report.page import page_of
    from niwaki.report.reading import read

    runs = read(folder)
    first = runs[0]
    model = first.get("model").get("source") or first.get("model").get("class") or "a model"
    method = first.get("method").get("name", "?")
    heading = f"niwaki: {model}, {method}" if len(runs) == 1 else f"niwaki: {Path(folder).resolve().name}"
    return page_of(runs, heading=heading)


def write(folder: str | Path, file: str | Path | None = None) -> Path:
    """Write the page to `file` (`folder`/report.html unless said) in one step, and return its path.

    Raises:
        InputError: the place cannot be written to; what was there is still there.
    """
    text = html(folder)
    target = Path(folder) / "report.html" if file is None else Path(file)
    try:
        number, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with open(number, "w", encoding="utf-8") as made:
                made.write(text)
            os.chmod(name, 0o666 & ~_mask())  # mkstemp makes files that only their owner may read
            os.replace(name, target)
        except OSError:
            os.unlink(name)
            raise
    except OSError as error:
        raise InputError(f"write {target}", found=str(error), do="give a file in a folder you may write to") from error
    return target


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


VERB = "write"
callable_module(__name__)
