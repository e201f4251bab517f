"""`niwaki sweep`: methods, budgets and seeds, each a run of `niwaki compress`, and the best trade-offs."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli.options import AsJson
from niwaki.cli.talk import say, show


def sweep(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="What is tried; docs/sweeps.md has the keys.")],
    address: Annotated[
        str, typer.Option(help='A Ray cluster: auto or ray://HOST:PORT; "local" starts Ray here and ends it.')
    ] = "local",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the sweep goes, or goes on; runs/FILE unless said.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try methods, budgets and seeds. The same command goes on where a sweep was stopped; done trials stay done.

    Exit code 1 if a trial failed.
    """
    from niwaki.cli import sweep_file

    asked = sweep_file.read(file, address=address)
    folder = Path("runs") / file.stem if out is None else out
    import niwaki.report
    import niwaki.sweep

    with _bar(len(asked.trials)) as hear:
        rows = niwaki.sweep.sweep(
            asked.trials, folder, workers=asked.workers, timing=asked.timing, progress=hear, command=context.obj
        )
    page = niwaki.report.write(folder)
    say(f"saved: {folder}; page: {page}")
    show(niwaki.report.terminal(folder), data=niwaki.report.data(folder) | {"page": str(page)}, as_json=as_json)
    if any(row["status"] != "done" for row in rows):
        raise typer.Exit(1)


def _line(what: str, row: Mapping[str, Any]) -> str:
    """What a row says of its trial, on one line."""
    values = row["values"]
    if row["status"] != "done":
        return f"{row['trial']}: FAILED: {row['error']}"
    said = []
    if what == "latency":
        said.append(f"{values['latency']:.3g} ms" if "latency" in values else "no latency")
    else:
        if "accuracy" in values:
            said.append(f"accuracy {values['accuracy']:.2f} %")
        if values.get("macs_before"):
            said.append(f"{100 * values['macs'] / values['macs_before']:.1f} % of MACs")
        said.append(f"{row['seconds']:.1f} s")
    return f"{row['trial']}: {', '.join(said)}"


@contextmanager
def _bar(count: int) -> Iterator[Callable[[str, int, int, Mapping[str, Any]], None]]:
    """Inside, a function that hears of each trial; a bar on a terminal, plain lines elsewhere."""
    log = logging.getLogger("niwaki")
    if not (sys.stderr.isatty() and log.isEnabledFor(logging.INFO)):
        yield lambda what, through, count, row: say(f"[{what} {through}/{count}] {_line(what, row)}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as live:
        task = live.add_task("trials", total=count)

        def hear(what: str, through: int, count: int, row: Mapping[str, Any]) -> None:
            style = "green" if row["status"] == "done" else "red"
            live.console.print(_line(what, row), style=style, highlight=False, markup=False)
            live.update(task, description=what, completed=through, total=count)

        yield hear
