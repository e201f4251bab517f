"""`niwaki export`: a model, or a saved run's model, as files for other runtimes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli.exporting import Exporting, in_the_way, need, wanted
from niwaki.cli.options import EXPORTS, AsJson, Checkpoint, Input, Seed, Threads
from niwaki.cli.talk import say, show
from niwaki.errors import InputError, RunExistsError, UnknownNameError, making
from niwaki.files import WEIGHTS, refuse_unwritable


def export(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder, or a model's source.")],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    to: Annotated[
        list[str] | None, typer.Option(metavar="TARGET...", help=f"One or more of: {', '.join(EXPORTS)}.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="dynamic|N", help="Batch of the files; dynamic where possible unless said.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the files go; the run's folder unless said.")
    ] = None,
    factory: Annotated[
        str | None, typer.Option("--model", help="The model a run started from; the run's own record unless said.")
    ] = None,
    checkpoint: Checkpoint = None,
    shape: Input = None,
    runs: Annotated[int, typer.Option(min=0, help="Timed passes of each file and of PyTorch; 0 leaves them out.")] = 10,
    threads: Threads = None,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model for other runtimes. Each file is run in its own and compared with PyTorch before it is there."""
    if more:
        raise UnknownNameError.of("export target", more[0], EXPORTS)
    names = wanted(to)
    if not names:
        raise InputError("export", found="no target", do=f"give --to, one or more of {', '.join(EXPORTS)}")
    length = _batch(batch)
    if isinstance(length, int) and "int8" in names:
        raise InputError(f"--batch {length} for int8", found="its batch is dynamic", do="leave --batch or int8 out")

    from niwaki.cli.sources import ask
    from niwaki.opening import saved_run

    run = saved_run(model)
    folder = None if run is None else run.folder
    place = out or folder
    if place is None:
        raise InputError(
            f"export {model}", found="a model by its name, and no --out", do="say where the files go: --out DIR"
        )
    if place.exists() and not place.is_dir():
        raise InputError(f"export to {place}", found="a file", do="give a folder")
    there = in_the_way(names, place)
    if there and not force:
        raise RunExistsError(
            f"export to {place}", found=f"{there[0]} exists", do="choose another --out, or give --force"
        )
    need(names)
    refuse_unwritable(place / "file")

    asked = ask(model, factory=factory, checkpoint=checkpoint, shape=shape, seed=seed)
    network, example = asked.loaded.model, asked.example
    made = not place.exists()
    with making(place):
        place.mkdir(parents=True, exist_ok=True)
    work = Exporting(
        network,
        example,
        int8=lambda file: _int8(network, example, file, folder),
        batch=length,
        runs=runs,
        threads=threads,
        seed=seed,
    )
    try:
        told, failed = work(names, place)
    finally:
        if made and not any(place.iterdir()):
            place.rmdir()
    if run is not None and folder is not None and run.record and place.resolve() == folder.resolve():
        import niwaki.report
        from niwaki.methods.job import note_export

        for name, entry in told.items():
            note_export(folder, name, entry)
        say(f"page: {niwaki.report.write(folder)}")

    from niwaki.report.console import drawn
    from niwaki.report.tables import exports_table

    show(drawn(exports_table(told)), data={"folder": str(place), "exports": told}, as_json=as_json)
    if failed:
        raise typer.Exit(max(error.exit_code for error in failed))


def _batch(text: str | None) -> Any:
    if text is None or text == "dynamic":
        return text
    if not text.isdigit() or int(text) < 1:
        raise InputError(
            f"--batch {text}", found="neither dynamic nor a number from 1", do="--batch dynamic, --batch 8"
        )
    return int(text)


def _int8(network: Any, example: Any, file: Path, folder: Path | None) -> Any:
    """The INT8 file, with the codes that a run saved; ranges from batch norms, since there is no data here."""
    from niwaki.export import export_qdq
    from niwaki.methods.run import read_codes
    from niwaki.quantize import from_batch_norm

    codes = read_codes(folder / WEIGHTS) if folder is not None else {}
    return export_qdq(network, example, file, ranges=from_batch_norm(network, example), weights=codes or None)
