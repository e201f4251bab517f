"""`niwaki verify`: the judge, on a saved plan."""

from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli.options import AsJson, Checkpoint, Device, Input, Model, Seed
from niwaki.cli.talk import show
from niwaki.errors import InputError
from niwaki.files import PLAN, WEIGHTS


def verify(
    model: Model,
    plan: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER_OR_PLAN",
            help="A run's folder, or its plan.json. Alone, a run's folder is judged by the model that it names.",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    shape: Input = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Judge a saved plan. Cuts MODEL by it, compares with the masked original in float64; exit 1 if they differ.

    The weights are MODEL's. Of a run's folder it is said how many tensors of its file are MODEL's, cut, and how many
    are not (repaired, rounded or trained since, or of another checkpoint); `niwaki load-check` tries that file.
    """
    if plan is None:
        plan = Path(model)
        model, checkpoint, seed = _made_from(plan, checkpoint, seed)
    file = plan / PLAN if plan.is_dir() else plan
    if not file.is_file():
        raise _no_plan(plan, file)
    import niwaki
    from niwaki.cli.sources import ask, shape_text

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"verify {plan}", found=str(error), where=str(file), do="give a readable plan") from error
    made = niwaki.Plan.from_json(text, file=str(file))
    asked = ask(model, checkpoint=checkpoint, shape=shape or shape_text(made.example), seed=seed, device=device)
    small = niwaki.cut(asked.loaded.model, made)
    receipt = niwaki.verify(asked.loaded.model, small, made, asked.example, seed=seed)
    data: dict[str, Any] = receipt.to_json()
    weights = _weights(small, plan / WEIGHTS) if plan.is_dir() else None

    from rich.table import Table

    table = Table("judge", "")
    for name, value in data.items():
        table.add_row(name, ", ".join(value) or "-" if isinstance(value, (list, tuple)) else str(value))
    if weights is not None:
        data["run"] = weights
        same = weights["tensors"] - weights["rewritten"]
        table.add_row("weights judged", f"MODEL's ({asked.loaded.weights or 'as made'}), not those of the run's file")
        table.add_row("run's tensors", f"{same} of {weights['tensors']} are MODEL's, cut")
        if weights["rewritten"]:
            table.add_row("", f"{weights['rewritten']} are not: repaired, rounded, trained, or of another checkpoint")
    show(table, data=data, as_json=as_json)
    if not receipt.passed:
        raise typer.Exit(1)


def _made_from(folder: Path, checkpoint: str | None, seed: int) -> tuple[str, str | None, int]:
    """Model, weights and seed that the run in a folder says it was made from."""
    from niwaki.opening import saved_run

    if folder.is_file() or (run := saved_run(folder)) is None:
        raise InputError(f"verify {folder}", found="no run's folder", do="niwaki verify MODEL FOLDER_OR_PLAN")
    if run.kind != "cut":
        raise _no_plan(folder, folder / PLAN)
    if not run.source:
        do = "niwaki verify MODEL FOLDER"
        raise InputError(f"the model of {folder}", found="the run does not name it", do=do)
    weights = str(run.settings.get("weights") or "")
    own = run.settings.get("seed")
    if (weights == "random" or run.settings.get("drawn")) and isinstance(own, int):
        seed = own
    if checkpoint is not None or weights in ("", "stored with the model"):
        return run.source, checkpoint, seed
    if weights == "random":
        return run.source, None, seed
    return (weights, None, seed) if Path(weights).is_dir() else (run.source, weights, seed)


def _no_plan(plan: Path, file: Path) -> InputError:
    from niwaki.files import nearest, refuse_unended
    from niwaki.methods.trained import is_training

    refuse_unended(plan, f"verify {plan}")
    found, do = "no plan there", "give a run's folder or a plan.json"
    if plan.is_dir() and is_training(plan):
        found, do = "a training, which cuts nothing", f"niwaki load-check {plan} tries its weights"
    elif not plan.exists() and (near := nearest(plan)):
        found += f"; near: {', '.join(near)}"
    return InputError(f"verify {plan}", found=found, where=str(file), do=do)


def _weights(small: Any, file: Path) -> dict[str, int] | None:
    """How many tensors a run's file holds, and how many are not what the cut of the model gives; None of no file."""
    if not file.is_file():
        return None
    import torch

    from niwaki.methods.run import read_tensors

    own = small.state_dict()
    tensors = {name: tensor for name, tensor in read_tensors(file).items() if name in own}
    same = sum(
        tensor.dtype == own[name].dtype and torch.equal(tensor, own[name].detach().cpu())
        for name, tensor in tensors.items()
    )
    return {"tensors": len(tensors), "rewritten": len(tensors) - same}
