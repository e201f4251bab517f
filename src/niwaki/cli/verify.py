"""`niwaki verify`: the judge, on a saved plan."""

from pathlib import Path
from typing import Annotated

import typer

from niwaki.cli.options import AsJson, Checkpoint, Device, Input, Model, Seed
from niwaki.cli.talk import show
from niwaki.errors import InputError


def verify(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="FOLDER_OR_PLAN", help="A run's folder, or its plan.json.")],
    checkpoint: Checkpoint = None,
    shape: Input = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Judge a saved plan. Cuts MODEL by it, compares with the masked original in float64; exit 1 if they differ."""
    file = plan / "plan.json" if plan.is_dir() else plan
    if not file.is_file():
        raise InputError(
            f"verify {plan}", found="no plan there", where=str(file), do="give a run's folder or a plan.json"
        )
    import niwaki
    from niwaki.cli.sources import ask, shape_text

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"verify {plan}", found=str(error), where=str(file), do="give a readable plan") from error
    made = niwaki.Plan.from_json(text)
    asked = ask(model, checkpoint=checkpoint, shape=shape or shape_text(made.example), seed=seed, device=device)
    small = niwaki.cut(asked.loaded.model, made)
    receipt = niwaki.verify(asked.loaded.model, small, made, asked.example, seed=seed)
    data = receipt.to_json()

    from rich.table import Table

    table = Table("judge", "")
    for name, value in data.items():
        table.add_row(name, ", ".join(value) or "-" if isinstance(value, (list, tuple)) else str(value))
    show(table, data=data, as_json=as_json)
    if not receipt.passed:
        raise typer.Exit(1)
