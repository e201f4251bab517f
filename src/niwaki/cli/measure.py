"""`niwaki measure`: what a model, or a saved run's model, costs."""

from typing import Annotated, Any

import typer

from niwaki.cli.options import AsJson, Checkpoint, Data, Device, Input, Normalisation, Seed, SplitSeed, Threads
from niwaki.cli.talk import show
from niwaki.errors import InputError


def measure(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_FOLDER", help="A model's source, or a run's folder.")],
    factory: Annotated[
        str | None, typer.Option("--model", help="The model a run started from; the run's own record unless said.")
    ] = None,
    checkpoint: Checkpoint = None,
    shape: Input = None,
    data: Data = None,
    normalisation: Normalisation = None,
    split_seed: SplitSeed = None,
    limit_test: Annotated[int | None, typer.Option(min=1, help="Test on at most this many samples.")] = None,
    runs: Annotated[int, typer.Option(min=0, help="Timed passes; 0 leaves latency out.")] = 30,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples in a timed pass.")] = None,
    threads: Threads = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure what a model costs. Parameters, multiply-adds, bytes, latency, and with --data accuracy."""
    if limit_test is not None and data is None:
        raise InputError(f"--limit-test {limit_test}", found="no data to test on", do="give --data")

    from niwaki.cli.sources import ask_as_typed, task_of
    from niwaki.measure import COUNTS, Latency, Meter
    from niwaki.measure import measure as take

    asked = ask_as_typed(context)
    network = asked.loaded.model
    meters: tuple[Meter, ...] = COUNTS if runs == 0 else (*COUNTS, Latency(runs=runs, threads=threads, batch=batch))
    taken = take(network, asked.example, meters=meters)
    if (task := task_of(asked)) is not None:
        taken |= task.metrics(network, limit=limit_test)
    records = {name: measurement.to_json() for name, measurement in taken.items()}
    show(_drawn(records), data=records, as_json=as_json)


def _drawn(records: dict[str, dict[str, Any]]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from niwaki.report.numbers import title, with_spread

    table = Table("", "value", "definition", "measured on", "not counted")
    table.columns[1].justify = "right"
    for name, record in records.items():
        row = (
            title(name),
            with_spread(record),
            record["definition"],
            record["device"],
            ", ".join(record["uncounted"]) or "-",
        )
        table.add_row(*map(escape, row))
    return table
