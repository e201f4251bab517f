"""A network by its name: a run's folder, or a source of models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import nn

from niwaki import models
from niwaki.errors import InputError
from niwaki.measure.latency import at_batch
from niwaki.methods.run import load


@final
@dataclass(frozen=True, eq=False)
class Network:
    """A network in evaluation mode, and an input that it takes."""

    model: nn.Module
    example: Any
    weights: str
    """"random", "stored with the model", a checkpoint's name, or the run's folder."""
    record: dict[str, Any]
    """The run's report, or nothing."""


def open_network(
    name: str,
    *,
    factory: str | None = None,
    checkpoint: str | None = None,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Network:
    """The cut network of a run's folder, or the network that a source names ("torchvision:resnet50").

    Args:
        factory: the source that the run's network is built with; its own record unless given.
        shape: of the example, batch first; the run's or the source's own unless given.

    Raises:
        InputError: a folder that holds no run, or a run that does not name its network; see `niwaki.models.load` and
            `niwaki.load` for the rest.
    """
    folder = Path(name) if Path(name).is_dir() else None
    record: dict[str, Any] = {}
    source = factory or name
    if folder is not None:
        from niwaki.report.reading import read_run

        if not (folder / "surgery.json").is_file():
            raise InputError(f"open {folder}", found="a folder without a run", do="give a run's folder, or a model")
        record = read_run(folder).data if (folder / "report.json").is_file() else {}
        source = factory or record.get("model", {}).get("source") or ""
        if not source:
            raise InputError(f"the model of {folder}", found="the run does not name it", do="give --model SOURCE")
    wanted = shape or shape_recorded(record)
    loaded = models.load(source, checkpoint=checkpoint, seed=seed, shape=wanted[1:] if wanted else None)
    example = loaded.example if not wanted or wanted[0] == 1 else at_batch(loaded.example, wanted[0])
    if folder is None:
        return Network(loaded.model.eval(), example, loaded.weights, record)
    return Network(load(folder, loaded.factory).eval(), example, str(folder), record)


def shape_recorded(record: dict[str, Any]) -> tuple[int, ...] | None:
    """Shape of the example that a run recorded, where it is a single tensor of floating numbers.

    Whole-number inputs (tokens) are left to the model's source: their shape says nothing of their range.
    """
    example = (record.get("digest") or {}).get("example")
    if isinstance(example, dict) and "float" in str(example.get("dtype")) and isinstance(example.get("tensor"), list):
        return tuple(int(length) for length in example["tensor"])
    return None
