"""`niwaki compress --low-memory`: the weights stay on disk."""

from pathlib import Path
from typing import Any

from niwaki.cli.options import shape_of
from niwaki.cli.talk import say
from niwaki.errors import InputError


def compress_on_disk(
    model: str,
    checkpoint: str | None,
    out: Path,
    *,
    shape: str | None,
    method: Any,
    budget: tuple[Any, ...],
    protect: list[str] | None,
    seed: int,
    threads: int | None,
    force: bool,
) -> dict[str, Any]:
    """Cut the checkpoint into `out`; what came of it as plain data.

    Raises:
        InputError: no weights are named, or they are no safetensors.
    """
    import torch

    import niwaki
    from niwaki.cli.sources import assumption
    from niwaki.measure.latency import at_batch

    if threads is not None:
        torch.set_num_threads(threads)
    wanted = shape_of(shape)
    kind, _, rest = model.partition(":")
    place = checkpoint or (rest.partition("?")[0] if kind == "hf" else None)
    if place is None:
        do = "give --checkpoint: a folder of safetensors, an index of shards, or one such file"
        raise InputError(f"{model} with --low-memory", found="no weights on disk", do=do)
    stored = niwaki.Stored(place)
    say(f"{stored.folder}: {len(stored)} tensors, {stored.bytes / 1e9:.2f} GB in {len(stored.files)} files")
    outline = niwaki.models.outline(model, seed=seed, shape=wanted[1:] if wanted else None)
    if outline.assumed:
        say(assumption(outline.assumed, outline.example))
    example = outline.example if not wanted or wanted[0] == 1 else at_batch(outline.example, wanted[0])
    done = niwaki.compress_stored(
        outline.model,
        example,
        stored,
        out,
        method=method,
        budget=budget,
        protect=(*outline.protect, *(protect or ())),
        seed=seed,
        force=force,
        progress=lambda stage, seconds: say(f"{stage}: {seconds:.2f} s"),
    )
    say(f"saved: {out}; not judged, as nothing ran: niwaki verify {model} {out} does where the model fits into memory")
    return {"source": model, "weights": str(place), **done.to_json()}


def drawn(result: dict[str, Any], name: str) -> Any:
    """The result as a table."""
    from rich.table import Table

    table = Table(name, "before", "after", "stays")
    for column in table.columns[1:]:
        column.justify = "right"
    for what, before in result["before"].items():
        after = result["after"][what]
        table.add_row(what, f"{before:,}", f"{after:,}", f"{100 * after / max(before, 1):.1f} %")
    return table
