"""`niwaki sensitivity`: which groups of a model bear being cut."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli.options import (
    AsJson,
    Batch,
    Checkpoint,
    Data,
    Device,
    Input,
    Model,
    Normalisation,
    Protect,
    Seed,
    SplitSeed,
    Threads,
    number_of,
)
from niwaki.cli.talk import say, show
from niwaki.errors import InputError, UnknownNameError
from niwaki.files import refuse_unwritable

SCORES = ("magnitude", "norm_scale", "random", "taylor")


def sensitivity(
    context: typer.Context,
    model: Model,
    checkpoint: Checkpoint = None,
    shape: Input = None,
    data: Data = None,
    normalisation: Normalisation = None,
    split_seed: SplitSeed = None,
    shares: Annotated[str, typer.Option(help="Of each group, what stays.", metavar="SHARES")] = "0.75,0.5,0.25",
    score: Annotated[str, typer.Option(help=f"What goes first: {', '.join(SCORES)}.")] = "magnitude",
    protect: Protect = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Judge on at most this many validation samples.")] = None,
    batch: Batch = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Keeps each row; the same command goes on from there.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw into this file: .html for a page, .svg for the picture.")
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Cut each group alone, at several widths, and measure. On validation data, or by how far random inputs' outputs
    move."""
    listed = [number_of(text, f"--shares {shares}") for text in shares.split(",")]
    if score not in SCORES:
        raise UnknownNameError.of("score", score, SCORES)
    if plot is not None and plot.suffix not in (".html", ".svg"):
        raise InputError(f"--plot {plot}", found=f"ending {plot.suffix!r}", do="end it with .html or .svg")
    for option, number in (("--limit", limit), ("--batch", batch)):
        if number is not None and data is None:
            raise InputError(f"{option} {number}", found="no data to judge on", do="give --data")

    import niwaki
    from niwaki.cli.sources import ask_as_typed, task_of
    from niwaki.report.sensitivities import sensitivity_page, sensitivity_svg, table_of

    made: dict[str, Any] = {
        "magnitude": niwaki.scores.Magnitude,
        "norm_scale": niwaki.scores.NormScale,
        "random": niwaki.scores.Random,
        "taylor": niwaki.scores.Taylor,
    }
    how = made[score](seed=seed) if score == "random" else made[score]()
    niwaki.sensitivity.refuse([float(share) for share in listed], how, data=data is not None)
    for place in filter(None, (file, plot)):
        refuse_unwritable(place)
    asked = ask_as_typed(context)
    if data is None:
        say("no data: what is told is how far outputs move on random inputs, relative to their length")
    asked_for = [float(share) for share in listed]
    with _bar() as hear:
        found = niwaki.sensitivity.sensitivity(
            asked.loaded.model,
            asked.example,
            task=task_of(asked, batch=batch),
            shares=asked_for,
            how=how,
            protect=(*asked.loaded.protect, *(protect or ())),
            limit=limit,
            seed=seed,
            file=file,
            progress=hear,
        )
    groups = found.worst_first()
    words: dict[str, Any] = {"before": found.before, "metric": found.metric, "unit": found.unit}
    if plot is not None:
        if plot.suffix == ".svg":
            _write(plot, sensitivity_svg(groups, **words))
        else:
            heading = f"Sensitivity of {model}"
            _write(plot, sensitivity_page(groups, **words, heading=heading, shares=asked_for, spoken=context.obj))
        say(f"plot: {plot}")
    from niwaki.report.console import drawn

    show(drawn(table_of(groups, **words, shares=asked_for)), data=found.to_json(), as_json=as_json)


def _write(path: Path, text: str) -> None:
    """The file, aside and renamed."""
    aside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise InputError(
            f"write {path}", found=error.strerror or str(error), do="choose a place where files can be made"
        ) from error


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """Hears of each measurement: a bar on a terminal, lines elsewhere."""
    if not (sys.stderr.isatty() and logging.getLogger("niwaki").isEnabledFor(logging.INFO)):
        yield lambda number, of, what: say(f"{number + 1} of {of}: {what}")
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as live:
        task = live.add_task("at work", total=None)
        yield lambda number, of, what: live.update(task, description=what, completed=number, total=of)
