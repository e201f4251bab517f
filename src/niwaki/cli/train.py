"""`niwaki train`: a network trained from scratch, or on from a checkpoint, with the loop that recovers cut ones."""

from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli.options import (
    DETECTORS,
    AsJson,
    Augment,
    Batch,
    Checkpoint,
    Data,
    Device,
    Input,
    Model,
    Normalisation,
    Seed,
    SplitSeed,
    Threads,
    training_of,
)
from niwaki.cli.runs import (
    begin,
    clear,
    cleared_unless_begun,
    refuse_itself,
    refuse_under_way,
    resumed,
    same_place,
)
from niwaki.cli.talk import say, show, stages
from niwaki.errors import InputError, RunExistsError, making
from niwaki.files import REPORT, SETTINGS, first_process, partial_of, take_place

RATES = {"sgd": 0.1, "adamw": 0.001}
"""Of networks that know nothing yet."""
DETECTING = {"sgd": 0.01, "adamw": 0.001}
"""The same of detectors, whose losses are sums of several."""


def train(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the run goes; must not exist.")],
    data: Data = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training split.")] = 10,
    checkpoint: Checkpoint = None,
    shape: Input = None,
    normalisation: Normalisation = None,
    split_seed: SplitSeed = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Highest learning rate; 0.1, of detectors 0.01, with adamw 0.001 unless said."),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    batch: Batch = None,
    augment: Augment = None,
    label_smoothing: Annotated[
        float, typer.Option(help="Share of the target spread over all classes; 0.1 is usual.")
    ] = 0.0,
    keep_best: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="How many checkpoints of the best validation stay; 1 unless said."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Another setting of the training (repeat): schedule=step, ema=true, mix.mixup=0.2, "
            "speed.precision=bf16, speed.compile=inductor, validation.patience=5, checkpoints.every_steps=500; "
            "see docs/cards/train.",
        ),
    ] = None,
    limit_test: Annotated[int | None, typer.Option(min=1, help="Test on at most this many samples.")] = None,
    seed: Seed = 0,
    threads: Threads = None,
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run at DIR.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model. Writes history, checkpoints, weights and a report to DIR; `niwaki resume DIR` after a kill.

    After each epoch the validation split is looked at, and a checkpoint is written; DIR/model.safetensors, at the end,
    is a --checkpoint of other commands. With --force the old run stays until the new one is whole, which until then is
    in DIR.partial.
    """
    place = _place(out, force=force)
    same_place(place)
    refuse_itself(model, out)
    refuse_under_way(out, force=force)
    _refuse_place(out, force=force)
    if data is None:
        raise InputError("train", found="no data", do="give --data")
    own = {"epochs": epochs, "optimizer": optimizer, "seed": seed, "lr": lr, "checkpoints.keep_best": keep_best}
    fields = training_of(settings, "--set", own)
    rates = DETECTING if data.partition(":")[0] in DETECTORS else RATES
    fields = {
        "lr": rates.get(optimizer, rates["sgd"]),
        "validation": {},
        "checkpoints": {},
        **fields,
        "folder": str(place),
    }

    import niwaki.report
    from niwaki.cli.sources import ask_as_typed, refuse_task, task_of
    from niwaki.methods.trained import Training
    from niwaki.train import Recovery

    how = Recovery.from_json(fields)
    if keep_best and how.validation is None:
        raise InputError(
            f"--keep-best {keep_best}", found="no validation to be best by", do="leave --set validation out"
        )
    refuse_task(data, augment=augment, label_smoothing=label_smoothing)
    asked = ask_as_typed(context)
    task = task_of(asked, batch=batch, augment=augment, label_smoothing=label_smoothing)
    assert task is not None
    work = Training(
        asked.loaded.model,
        asked.example,
        task,
        how,
        limit=limit_test,
        source=asked.loaded.source,
        weights=asked.loaded.weights,
        command=context.obj,
        home=out,
    )
    if resumed.get() is None and first_process():
        clear(partial_of(out))
    with cleared_unless_begun(place), stages() as (hear, step):
        begin(place, context.obj, **work.settings())
        report = work(progress=hear, steps=step, resume=resumed.get() is not None, write=first_process())
    if first_process():
        if place != out:
            take_place(place, out)
        page = niwaki.report.write(out)
        say(f"saved: {out}; page: {page}")
        show(_drawn(report), data={"folder": str(out), "report": report, "page": str(page)}, as_json=as_json)


def _place(out: Path, *, force: bool) -> Path:
    """Where the run is under way: beside a run that it replaces."""
    aside, record = partial_of(out), resumed.get()
    if record is not None:
        return aside if record.folder == aside.resolve() else out
    with making(out):
        return aside if force and out.exists() else out


def _refuse_place(out: Path, *, force: bool) -> None:
    with making(out):
        there = out.exists()
    if not there or resumed.get() is not None or not first_process():
        return
    known = (out / SETTINGS).is_file()
    empty = out.is_dir() and not any(out.iterdir())
    if not force or not (known or empty):
        ended = (out / REPORT).is_file()
        do = "choose another --out" + (", or give --force" if known or empty else "; --force replaces runs only")
        if known and not ended:
            do = f"niwaki resume {out} goes on with it; or choose another --out, or give --force"
        found = "a run that did not end" if known and not ended else "it exists"
        raise RunExistsError(f"write a run to {out}", found=found, where=str(out), do=do)


def _drawn(report: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from niwaki.report.numbers import title, with_spread

    table = Table("", "before", "after", "definition")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, record in report["after"].items():
        before = report["before"].get(name)
        row = (title(name), with_spread(before) if before else "-", with_spread(record), record["definition"])
        table.add_row(*map(escape, row))
    return table
