"""`niwaki bench`: networks and files side by side."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from niwaki.cli.listing import split
from niwaki.cli.options import RUNTIMES, THREADS, AsJson, Input, Seed, shape_of
from niwaki.cli.talk import say, show
from niwaki.errors import InputError, UnknownNameError


def bench(
    names: Annotated[
        list[str],
        typer.Argument(metavar="A B ...", help="Runs' folders, .onnx, .xml and .pt2 files, sources of models."),
    ],
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...", help=f"One or more of: {', '.join(RUNTIMES)}; what the first suits unless said."
        ),
    ] = None,
    batch: Annotated[list[str] | None, typer.Option(metavar="N...", help="One or more batches; 1 unless said.")] = None,
    threads: Annotated[int, typer.Option(min=1, max=THREADS, help="CPU threads inside an operation.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Timed passes of each.")] = 30,
    warm_up: Annotated[int, typer.Option(min=0, help="Passes of each before the clock starts.")] = 5,
    shape: Input = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Time networks and files side by side. One process per runtime, one pass of each in turns, medians and ratios."""
    runtimes = split(runtime)
    for name in runtimes:
        if name not in RUNTIMES:
            raise UnknownNameError.of("runtime", name, RUNTIMES)
    batches = [_number(text) for text in split(batch)] or [1]
    shaped = shape_of(shape)

    import niwaki.bench as library

    with _heard() as hear:
        found = library.bench(
            names,
            runtimes=runtimes,
            batches=batches,
            threads=threads,
            runs=runs,
            warm_up=warm_up,
            shape=shaped,
            seed=seed,
            progress=hear,
        )
    if found.settings["assumed"]:
        say(f"input {', '.join(found.settings['inputs'])}: {found.settings['assumed']} (no --input)")
    show(_drawn(found), data=found.to_json(), as_json=as_json)
    if not any(row.ms for row in found.rows):
        raise typer.Exit(1)


def _number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"--batch {text}", found="no number from 1", do="--batch 1 32, behind the names")
    return int(text)


@contextmanager
def _heard() -> Iterator[Callable[[str, int, int], None]]:
    """Inside, a function that hears of progress: a bar on a terminal, a line per step elsewhere."""
    import logging
    import sys

    if not (sys.stderr.isatty() and logging.getLogger("niwaki").isEnabledFor(logging.INFO)):
        said: set[str] = set()

        def line(what: str, done: int, of: int) -> None:
            if what not in said:
                said.add(what)
                say(what)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as live:
        task = live.add_task("", total=None)
        yield lambda what, done, of: live.update(task, description=what, completed=done, total=of)


def _drawn(found: Any) -> Any:
    from rich.console import Group
    from rich.text import Text

    from niwaki.report.console import drawn
    from niwaki.report.numbers import short
    from niwaki.report.tables import Table

    def count(value: float | None, unit: str) -> str:
        return "-" if value is None else short(value, unit)

    items = tuple(
        (item.label, item.kind, count(item.macs, "MACs"), count(item.params, "parameters"), count(item.bytes, "bytes"))
        for item in found.items
    )
    rows = []
    for row in found.rows:
        if row.ms is None or row.quarters is None:
            rows.append((row.runtime, str(row.batch), row.item, "-", "", "", "", row.failed))
            continue
        low, high = row.quarters
        noise = "noisy: the quartiles lie far apart" if high - low > 0.25 * row.ms else ""
        ratio = "" if row.times_as_fast is None else f"{row.times_as_fast:.2f}"
        times = (f"{row.ms:.4g} ms", f"{low:.4g} .. {high:.4g}", f"{row.cpu_ms:.4g} ms", ratio)
        rows.append((row.runtime, str(row.batch), row.item, *times, noise))
    said = found.settings
    words = (
        f"{said['threads']} CPU threads, {said['runs']} runs after {said['warm_up']} of warm-up, in turns; inputs "
        f"{', '.join(said['inputs'])}, the same for all; {said['machine']}; "
        + ", ".join(f"{name} {number}" for name, number in said["versions"].items())
    )
    heads = ("runtime", "batch", "", "median", "quartiles", "processor time", "times as fast", "remark")
    return Group(
        drawn(Table("What was timed", ("", "kind", "MACs", "parameters", "on disk"), items, frozenset({2, 3, 4}))),
        drawn(Table("Times", heads, tuple(rows), frozenset({1, 3, 4, 5, 6}))),
        Text(words),
    )
