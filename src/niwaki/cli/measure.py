"""`niwaki measure`: what a model, or a saved run's model, costs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli.options import AsJson, Checkpoint, Data, Device, Input, Normalisation, Seed, SplitSeed, Threads
from niwaki.cli.talk import show
from niwaki.errors import InputError


def measure(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_FOLDER", help="A model's source, or a run's folder.")],
    factory: Annotated[
        str | None, typer.Option("--model", help="The model a run started from; the run's own record unless said.")
    ] = None,
    checkpoint: Checkpoint = None,
    shape: Input = None,
    data: Data = None,
    normalisation: Normalisation = None,
    split_seed: SplitSeed = 0,
    limit_test: Annotated[int | None, typer.Option(min=1, help="Test on at most this many samples.")] = None,
    runs: Annotated[int, typer.Option(min=0, help="Timed passes; 0 leaves latency out.")] = 30,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples in a timed pass.")] = None,
    threads: Threads = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure what a model costs. Parameters, multiply-adds, bytes, latency, and with --data accuracy."""
    folder = Path(model) if Path(model).is_dir() else None
    if folder is not None and checkpoint is not None:
        raise InputError("--checkpoint with a run's folder", found=str(folder), do="the run brings its own weights")
    if limit_test is not None and data is None:
        raise InputError(f"--limit-test {limit_test}", found="no data to test on", do="give --data")
    record = report_of(folder) if folder is not None else {}
    source = factory or (model if folder is None else record.get("model", {}).get("source"))
    if not source:
        raise InputError(f"the model of {folder}", found="the run does not name it", do="give --model SOURCE")

    import niwaki
    from niwaki.cli.sources import ask, shape_text, task_of
    from niwaki.measure import COUNTS, Latency, Meter
    from niwaki.measure import measure as take

    if data is not None and normalisation is None and folder is not None:  # pictures as the run saw them
        seen = (record.get("splits") or {}).get("normalisation") or {}
        published = (tuple(seen["mean"]), tuple(seen["std"])) if {"mean", "std"} <= set(seen) else None
    else:
        published = None
    asked = ask(
        source,
        checkpoint=checkpoint,
        shape=shape or (shape_text((record.get("digest") or {}).get("example")) if data is None else None),
        spec=data,
        normalisation=normalisation or published,
        split_seed=split_seed,
        seed=seed,
        threads=threads,
        device=device,
        own_weights=folder is None,
    )
    network = asked.loaded.model if folder is None else niwaki.load(str(folder), asked.loaded.factory).eval()
    if device is not None:
        network.to(device)
    meters: tuple[Meter, ...] = COUNTS if runs == 0 else (*COUNTS, Latency(runs=runs, threads=threads, batch=batch))
    taken = take(network, asked.example, meters=meters)
    if (task := task_of(asked)) is not None:
        taken |= task.metrics(network, limit=limit_test)
    records = {name: measurement.to_json() for name, measurement in taken.items()}
    show(_drawn(records), data=records, as_json=as_json)


def report_of(folder: Path) -> dict[str, Any]:
    """What a run's folder says of itself; nothing if it says nothing."""
    from niwaki.report.reading import read_run

    return read_run(folder).data if (folder / "report.json").is_file() else {}


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
