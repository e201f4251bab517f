"""`niwaki load-check`: a saved run loads in a fresh process and computes what it computed when it was saved."""

from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli.options import AsJson, CheckDevice, Input
from niwaki.cli.talk import show
from niwaki.errors import FileDamagedError, InputError


def load_check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder.")],
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="What the run was made from; its own record unless said.")
    ] = None,
    shape: Input = None,
    device: CheckDevice = None,
    as_json: AsJson = False,
) -> None:
    """Load a saved run and compare its outputs. Bit by bit with those recorded when saved; exit 1 if they differ.

    Another device computes other bits: on one they are not compared.
    """
    from niwaki.opening import saved_run

    saved = saved_run(folder)
    if saved is None:
        raise InputError(f"load-check {folder}", found="no folder", do="give the folder that a run was saved to")
    if not saved.record:
        missing, do = "no report.json, which has the digest", "save the run again"
        raise FileDamagedError(f"load-check {folder}", found=missing, where=str(folder), do=do)
    record = saved.record.get("digest")
    if record is not None and not (isinstance(record, dict) and isinstance(record.get("sha256"), str)):
        raise FileDamagedError(
            "read report.json", found="a digest without sha256", where=str(folder), do="save the run again"
        )

    import torch

    from niwaki.cli.sources import ask, device_here
    from niwaki.methods.job import digest
    from niwaki.plan import encode_example
    from niwaki.units import device_of, run, tensors_in

    record = record or {}
    recorded = record.get("example")
    there = record.get("device")
    asked = ask(
        str(folder),
        factory=model,
        shape=shape,
        threads=record.get("threads"),
        device=device or device_here(there),
    )
    small = asked.loaded.model
    here = str(device_of(small))
    with torch.no_grad():
        outputs = tensors_in(run(small, asked.example))
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in outputs)
    known = bool(record) and recorded == encode_example(asked.example)
    comparable = known and there in (None, here)
    found = digest(small, asked.example)
    same = found["sha256"] == record.get("sha256") if comparable else None
    versions = {"saved": record.get("torch"), "here": str(torch.__version__)}
    data: dict[str, Any] = {
        "loaded": True,
        "finite": finite,
        "equal": same,
        "torch": versions,
        "device": {"saved": there, "here": here},
        "sha256": {"saved": record.get("sha256"), "here": found["sha256"]},
    }

    from rich.table import Table

    table = Table("check", "")
    table.add_row("loaded", "yes")
    table.add_row("outputs finite", "yes" if finite else "NO")
    table.add_row("device", here)
    why = f"saved on {there}, loaded on {here}" if known else "no digest of this input was recorded"
    words = {True: "bit for bit", False: "NO", None: f"not compared: {why}"}
    if same is False and versions["saved"] != versions["here"]:
        words[False] = f"no, but saved with torch {versions['saved']} and loaded with {versions['here']}"
        same = None
    table.add_row("outputs equal", words[data["equal"]])
    show(table, data=data, as_json=as_json)
    if not finite or same is False:
        raise typer.Exit(1)
