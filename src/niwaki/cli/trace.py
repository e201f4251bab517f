"""`niwaki trace`: the groups of a model, and who couples whom."""

from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli.options import AsJson, Checkpoint, Input, Model, Protect, Seed, TraceDevice
from niwaki.cli.talk import say, show
from niwaki.errors import InputError
from niwaki.files import refuse_unwritable


def trace(
    model: Model,
    checkpoint: Checkpoint = None,
    shape: Input = None,
    protect: Protect = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the groups into this SVG file.", metavar="FILE")] = None,
    seed: Seed = 0,
    device: TraceDevice = None,
    as_json: AsJson = False,
) -> None:
    """Show which channels live or die together. The others say why they stay; unknown operations are listed."""
    if picture is not None and picture.suffix != ".svg":
        raise InputError(f"--picture {picture}", found=f"ending {picture.suffix!r}", do="end it with .svg")
    if picture is not None:
        refuse_unwritable(picture)

    import niwaki
    from niwaki.cli.sources import ask, device_named
    from niwaki.report.picture import write_picture

    place = device_named(device, meta=True)
    asked = ask(model, checkpoint=checkpoint, shape=shape, seed=seed)
    graph = niwaki.trace(
        asked.loaded.model, asked.example, protect=(*asked.loaded.protect, *(protect or ())), device=place
    )
    data = graph.to_json()
    if picture is not None:
        write_picture(data, picture, title=model)
        say(f"picture: {picture}")
    show(_drawn(data, model), data=data, as_json=as_json)


def _drawn(data: dict[str, Any], name: str) -> Any:
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table("group", "units", "kind", "members", "exact", "fixed")
    table.columns[1].justify = table.columns[3].justify = "right"
    for group in data["groups"]:
        kind = group["kind"] if group["rows"] == 1 else f"{group['kind']}, {group['rows']} rows"
        exact = "yes" if group["exact"] else f"no: {group['inexact']}"
        row = (group["name"], str(group["units"]), kind, str(len(group["members"])), exact, group["fixed"] or "")
        table.add_row(*map(escape, row))
    free = sum(group["fixed"] is None for group in data["groups"])
    share = 100 * data["free_params"] / data["params"] if data["params"] else 0.0
    lines = [
        f"{name}: {len(data['groups'])} groups, {free} free; {data['params']:,} parameters, {share:.1f} % in free "
        f"groups; {data['macs']:,} MACs; {data['seconds']:.2f} s on {data.get('device', 'cpu')}"
    ]
    if data["blocks"]:
        shown = ", ".join(block["module"] for block in data["blocks"][:6])
        more = len(data["blocks"]) - 6
        lines.append(
            f"{len(data['blocks'])} blocks can be left out whole: {shown}{f' and {more} more' if more > 0 else ''}"
        )
    if data["unknown"]:
        lines.append("unknown operations (what they touch is fixed):")
        lines += [f"  {u['operation']} in {u['module'] or 'the model'}, {u['where']}" for u in data["unknown"]]
    if data["data_reads"]:
        lines.append("forward reads numbers out of data (only the path that the example takes is seen):")
        lines += [f"  {r['operation']} in {r['module'] or 'the model'}, {r['where']}" for r in data["data_reads"]]
    return Group(table, Text("\n".join(lines)))
