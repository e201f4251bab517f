"""`niwaki compress`: a smaller model, judged, repaired, measured and saved."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli.exporting import Exporting, need, wanted
from niwaki.cli.low_memory import compress_on_disk, drawn
from niwaki.cli.methods import Method, method_named
from niwaki.cli.options import (
    EXPORTS,
    AsJson,
    Augment,
    Batch,
    Checkpoint,
    Data,
    Device,
    Distill,
    Input,
    Model,
    Normalisation,
    Protect,
    Seed,
    SplitSeed,
    TableFile,
    TargetBatch,
    TargetName,
    Threads,
    budgets_of,
    losses_of,
    pairs_of,
    target_of,
    training_of,
    value_of,
)
from niwaki.cli.runs import (
    begin,
    clear,
    cleared_unless_begun,
    keep_recovery,
    refuse_itself,
    refuse_under_way,
    resumed,
    same_place,
)
from niwaki.cli.talk import say, show, stages
from niwaki.errors import InputError, NiwakiError, RunExistsError, UnknownNameError, making
from niwaki.files import REPORT, SURGERY, first_process, partial_of

CALIBRATE = 16
"""Batches to re-estimate batch norm with, unless said."""
ADAMW_RATE = 0.001
"""Of networks that know something already; sgd has the recovery's own."""


def compress(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the run goes; must not exist.")],
    checkpoint: Checkpoint = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Random weights are meant: refuse any that come from a file.")
    ] = False,
    shape: Input = None,
    data: Data = None,
    normalisation: Normalisation = None,
    split_seed: SplitSeed = None,
    method: Annotated[str, typer.Option(help="See `niwaki methods`.")] = "magnitude",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A setting of the method (repeat).")
    ] = None,
    keep: Annotated[str | None, typer.Option(help="What stays: a share, or a count; 0.5 unless said.")] = None,
    of: Annotated[
        str | None, typer.Option(help="Of what: macs (unless said), params, units, bytes, memory, latency, energy.")
    ] = None,
    floor: Annotated[str | None, typer.Option(help="What every group keeps at least: a count or a share.")] = None,
    multiple: Annotated[int | None, typer.Option(help="Every cut group keeps a multiple of this.")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help='Several budgets at once: --budget "keep=0.5,of=macs" (repeat).'),
    ] = None,
    target: TargetName = None,
    target_batch: TargetBatch = 1,
    table: TableFile = None,
    rule: Annotated[str | None, typer.Option(help="global_rank or uniform; the method's own unless said.")] = None,
    grids: Annotated[str | None, typer.Option(help="Where an axis is a grid: rows or columns.")] = None,
    exact_only: Annotated[bool, typer.Option("--exact-only", help="Leave inexact groups whole.")] = False,
    bits: Annotated[
        int | None, typer.Option(help="Of weights, for methods that round them: 2 to 8; 32 leaves them floats.")
    ] = None,
    protect: Protect = None,
    recover: Annotated[
        int, typer.Option(min=0, metavar="EPOCHS", help="Train for some epochs after the cut, on --device.")
    ] = 0,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate of the recovery; 0.01 (adamw: 0.001) unless said.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="Of the recovery: sgd (unless said) or adamw.")] = None,
    recovery_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--recovery-set",
            metavar="FIELD=VALUE",
            help="Another setting of the recovery (repeat): speed.precision=bf16, mix.mixup=0.2, ema=true, "
            "schedule=step, checkpoints.every_steps=500; see docs/cards/train.",
        ),
    ] = None,
    distill: Distill = None,
    batch: Batch = None,
    augment: Augment = None,
    label_smoothing: Annotated[
        float | None,
        typer.Option(
            help="Share of the target spread over all classes, in the recovery, and in scores by gradients before it."
        ),
    ] = None,
    calibrate: Annotated[
        int | None,
        typer.Option(min=0, metavar="BATCHES", help="To re-estimate batch norm with; 16 unless said, 0 leaves it out."),
    ] = None,
    runs: Annotated[int, typer.Option(min=0, help="Timed passes before and after; 0 leaves latency out.")] = 10,
    limit_test: Annotated[int | None, typer.Option(min=1, help="Test on at most this many samples.")] = None,
    export: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET...",
            help=f"Write files for other runtimes into DIR, too: {', '.join(EXPORTS)} (see `niwaki export`).",
        ),
    ] = None,
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            help="Leave the weights on disk: read and write safetensors tensor by tensor; nothing is run or judged.",
        ),
    ] = False,
    seed: Seed = 0,
    threads: Threads = None,
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at DIR.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a model smaller. Scores, cuts, verifies, repairs, recovers, measures, and saves the run to DIR."""
    partial = partial_of(out)
    same_place(partial)
    refuse_itself(model, out)
    refuse_under_way(out, force=force)
    force = force or resumed.get() is not None
    _refuse_place(out, force=force)
    listed = method_named(method)
    shortcuts = {"rule": rule, "grids": grids, "exact_only": exact_only or None, "bits": bits}
    fields = fields_of(listed, settings, {name: value for name, value in shortcuts.items() if value is not None})
    exports = wanted(export)
    training = {name: value for name, value in (("lr", lr), ("optimizer", optimizer)) if value is not None}
    if untrained and checkpoint is not None:
        raise InputError(f"--checkpoint {checkpoint}", found="--untrained as well", do="give one of them")
    if distill and not recover:
        raise InputError(f"--distill {distill[0]}", found="no recovery to teach in", do="give --recover EPOCHS")
    if training and not recover:
        raise InputError(f"--{next(iter(training))}", found="no recovery to set it for", do="give --recover EPOCHS")
    if recovery_settings and not recover:
        found, do = "no recovery to set it for", "give --recover EPOCHS"
        raise InputError(f"--recovery-set {recovery_settings[0]}", found=found, do=do)
    given = training_of(recovery_settings, "--recovery-set", {"epochs": recover or None, "seed": seed, **training})
    if given.get("optimizer") == "adamw":
        given.setdefault("lr", ADAMW_RATE)
    taught = {"--augment": None if augment == "none" else augment, "--label-smoothing": label_smoothing}
    of_data = {"--recover": recover, "--limit-test": limit_test, "--batch": batch, "--calibrate": calibrate, **taught}
    for name, value in of_data.items():
        if value and data is None:
            raise InputError(f"{name} {value}", found="no data", do="give --data")
    for name, value in taught.items():
        if value and not recover:
            raise InputError(f"{name} {value}", found="no recovery to set it for", do="give --recover EPOCHS")
    estimated = None if "int8" in exports else calibrate  # whose ranges come from these batches, too
    calibrate = CALIBRATE if calibrate is None else calibrate

    if low_memory:
        asked_for = {
            "--data": data, "--recover": recover, "--export": export, "--device": device, "--target": target
        }  # fmt: skip
        if needs := [name for name, value in asked_for.items() if value]:
            do = "leave it out, or leave --low-memory out"
            raise InputError(f"{needs[0]} with --low-memory", found="it needs the network in memory", do=do)
        budgets = budgets_of(budget, keep=keep, of=of, floor=floor, multiple=multiple)
        made = method_made(listed, fields)
        stored = compress_on_disk(
            model, checkpoint, out, shape=shape, method=made, budget=budgets, protect=protect, seed=seed,
            threads=threads, force=force,
        )  # fmt: skip
        show(drawn(stored, model), data=stored, as_json=as_json)
        return

    import niwaki
    import niwaki.report
    from niwaki.cli.sources import ask_as_typed, refuse_task, task_of
    from niwaki.measure import Latency
    from niwaki.methods.job import Request
    from niwaki.methods.steps import refuse
    from niwaki.train import Recovery

    if exports:
        need(exports)
    budgets = budgets_of(budget, keep=keep, of=of, floor=floor, multiple=multiple)
    made = method_made(listed, fields)
    recovery = Recovery.from_json({"checkpoints": {}, **given}) if recover else None
    losses = losses_of(distill)
    place, kept = target_of(target, batch=target_batch, threads=threads, table=table, budgets=budgets)
    refuse_task(data, augment=augment, label_smoothing=label_smoothing or 0.0)
    given_to = {"data": data is not None, "recovery": recovery is not None, "distill": bool(losses)}
    refuse(made, Request(budgets, **given_to, calibration=estimated, target=place, table=kept))
    asked = ask_as_typed(context)
    if untrained and asked.loaded.weights != "random":
        do = "name a configuration without weights, or leave --untrained out"
        raise InputError(f"{model} --untrained", found=f"weights {asked.loaded.weights}", do=do)
    lasting = recovery is not None or made.searches or made.trains
    if lasting and resumed.get() is None and first_process():
        clear(partial)
    with cleared_unless_begun(partial), stages() as (hear, step):
        if lasting:
            begin(partial, context.obj)
        outcome = niwaki.compress(
            asked.loaded.model,
            asked.example,
            method=made,
            budget=budgets,
            task=task_of(asked, batch=batch, augment=augment, label_smoothing=label_smoothing or 0.0),
            recovery=recovery,
            distill=losses,
            repair=calibrate > 0,
            calibration=max(calibrate, 1),
            protect=(*asked.loaded.protect, *(protect or ())),
            seed=seed,
            limit=limit_test,
            target=place,
            table=kept,
            meters=(Latency(runs=runs, warm_up=3, threads=threads),) if runs else (),
            progress=hear,
            steps=step,
            partial=partial if lasting else None,
            source=asked.loaded.source,
            weights=asked.loaded.weights,
            drawn=asked.loaded.drawn,
            command=context.obj,
        )
    if not first_process():
        return
    outcome.save(out, force=force)
    if lasting:  # else what lies there is of a run that --force replaces
        keep_recovery(partial, out)
    result: dict[str, Any] = {"folder": str(out)}
    failed: list[NiwakiError] = []
    if exports:
        from niwaki.methods.job import note_export

        work = Exporting(
            outcome.model,
            asked.example,
            int8=lambda file: _int8(outcome, file, calibrate if data is not None else 0),
            runs=runs,
            threads=threads,
            seed=seed,
        )
        told, failed = work(exports, out)
        for name, entry in told.items():
            note_export(out, name, entry)
        result |= told
    result["page"] = str(niwaki.report.write(out))
    say(f"saved: {out}; page: {result['page']}")
    clear(partial)
    result["report"] = json.loads((out / REPORT).read_text(encoding="utf-8"))
    show(niwaki.report.terminal(out), data=result, as_json=as_json)
    if failed:
        raise typer.Exit(max(error.exit_code for error in failed))


def _int8(outcome: Any, path: Path, batches: int) -> Any:
    """The outcome's model on whole numbers; ranges from some batches, or from its batch norms where there are none."""
    from niwaki.export.qdq import export_qdq
    from niwaki.quantize import from_batch_norm, from_inputs

    model, job = outcome.model, outcome.job
    if batches and job.task is not None:
        ranges = from_inputs(model, (job.task.inputs(batch) for batch in job.task.calibration(batches, job.seed)))
    else:
        ranges = from_batch_norm(model, job.example)
    return export_qdq(model, job.example, path, ranges=ranges, weights=outcome.quantised or None)


def _refuse_place(out: Path, *, force: bool) -> None:
    """Refuse a place that a run can't go to, before anything is worked out; nothing is left there.

    Raises:
        RunExistsError: something is there, and may not be replaced.
        InputError: no folder can be made there.
    """
    with making(out):
        if out.exists() and not force:
            raise RunExistsError(f"write a run to {out}", found="it exists", do="choose another --out, or give --force")
        runs = any((out / name).is_file() for name in (REPORT, SURGERY))
        if out.exists() and not runs and not (out.is_dir() and not any(out.iterdir())):
            raise RunExistsError(
                f"replace {out}", found="it holds no run", do="--force replaces runs only; choose another --out"
            )
        there = next(folder for folder in out.absolute().parents if folder.exists())
        Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=there)).rmdir()


def fields_of(method: Method, settings: list[str] | None, shortcuts: dict[str, Any]) -> dict[str, Any]:
    """Settings by field, from --set and from the options that stand for one.

    Raises:
        UnknownNameError: the method has no such setting; the message lists what it has.
        InputError: a setting is given twice.
    """
    given = pairs_of(settings, "--set")
    known = [field.name for field in method.fields]
    for name in given:
        if name not in known:
            raise UnknownNameError.of(f"setting of {method.name}", name, known)
    for name, value in shortcuts.items():
        if name not in known:
            flag = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            do = f"leave {flag.split()[0]} out; `niwaki methods {method.name}` lists what it has"
            raise UnknownNameError(f"{flag} with --method {method.name}", found=f"it has no setting {name}", do=do)
    twice = sorted(set(given) & set(shortcuts))
    if twice:
        raise InputError(
            f"--set {twice[0]}=...", found=f"--{twice[0].replace('_', '-')} as well", do="give one of them"
        )
    return {**given, **shortcuts}


def method_made(method: Method, fields: dict[str, Any]) -> Any:
    """The method itself, its settings checked against their types."""
    from importlib import import_module
    from typing import Literal, get_args, get_origin, get_type_hints

    made = getattr(import_module(f"niwaki.methods.{method.name}"), method.class_name)
    hints = get_type_hints(made)
    for name, value in fields.items():
        hint = hints[name]
        if get_origin(hint) is tuple:
            kind = get_args(hint)[0]
            split = str(value).split(",")
            parts = value if isinstance(value, list) else split if kind is str else [value_of(part) for part in split]
            fits = all(isinstance(part, (int, float) if kind is float else kind) for part in parts)
            fields = {**fields, name: tuple(parts)}
            wanted = f"{'texts' if kind is str else 'numbers'} with commas between"
        elif get_origin(hint) is Literal:
            fits, wanted = value in get_args(hint), ", ".join(map(str, get_args(hint)))
        else:
            kinds = {float: (int, float)}.get(hint, hint)
            fits, wanted = isinstance(value, kinds) and (hint is bool or not isinstance(value, bool)), hint.__name__
        if not fits:
            raise InputError(
                f"{method.name} with {name}={value!r}", found=f"known: {wanted}", do="see `niwaki methods NAME`"
            )
    return made(**fields)
