"""A network by its name: the folder of a run, cut or trained, or a source of models."""

import logging
import os
import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

from torch import nn

from niwaki import models
from niwaki.errors import FileDamagedError, InputError, Setting
from niwaki.files import REPORT, SURGERY, nearest, refuse_unended, resume_words, unended
from niwaki.measure.latency import at_batch
from niwaki.methods.run import load
from niwaki.methods.trained import is_training
from niwaki.models import Loaded
from niwaki.report.reading import read_run
from niwaki.sweep.results import is_sweep

log = logging.getLogger(__name__)
SHOWN = 4


@final
@dataclass(frozen=True)
class SavedRun:
    """A run that ended, by its folder."""

    folder: Path
    kind: Literal["cut", "trained"]
    record: dict[str, Any]
    """Its report; nothing where it wrote none (weights that stayed on disk)."""
    settings: dict[str, Any]
    """Everything that it was asked for."""

    @property
    def source(self) -> str:
        """What its network was made from, or nothing."""
        return str((self.record.get("model") or {}).get("source") or "")

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of its example, where that is a single tensor of floating numbers.

        Whole-number inputs (tokens) are left to the model's source: their shape says nothing of their range.
        """
        example = (self.record.get("digest") or {}).get("example")
        if not isinstance(example, dict) or "float" not in str(example.get("dtype")):
            return None
        lengths = example.get("tensor")
        if not isinstance(lengths, list) or not all(type(length) is int for length in lengths):
            return None
        return tuple(lengths)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """(mean, std) of the pictures that it saw."""
        seen = (self.record.get("splits") or {}).get("normalisation") or {}
        mean, std = seen.get("mean"), seen.get("std")
        return (tuple(mean), tuple(std)) if mean and std else None

    @property
    def split_seed(self) -> int | None:
        """Of the split of its data."""
        seed = (self.record.get("splits") or {}).get("seed")
        return seed if isinstance(seed, int) else None


@final
@dataclass(frozen=True, eq=False)
class Network:
    """A network in evaluation mode, and an input that it takes."""

    loaded: Loaded
    """Of a run: `source` is the run's own where it was trained, the folder where it was cut; `weights` is the folder,
    and `factory` makes the same shapes again."""
    example: Any
    run: SavedRun | None = None

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def weights(self) -> str:
        return self.loaded.weights


def saved_run(name: str | Path) -> SavedRun | None:
    """The run in the folder of this name; None for a source of models ("torchvision:resnet50").

    Raises:
        InputError: neither; a run that did not end; a folder that holds something else.
        FileDamagedError: a report that is damaged.
    """
    text, folder = str(name), Path(name)
    if text.partition(":")[0] in models.SOURCES and ":" in text:
        return None
    asked = f"the model {text}"
    if folder.is_dir():
        cut = (folder / SURGERY).is_file()
        if cut or is_training(folder):
            if unended(folder) is not None:
                log.warning(
                    "%s: a run that is to replace it did not end; %s goes on with it", text, resume_words(folder)
                )
            told = read_run(folder) if (folder / REPORT).is_file() else None
            kind: Literal["cut", "trained"] = "cut" if cut else "trained"
            return SavedRun(folder, kind, {} if told is None else told.data, {} if told is None else told.settings)
        refuse_unended(folder, asked)
        raise _no_run(folder, asked)
    refuse_unended(folder, asked)
    if ":" in text:
        return None  # an unknown kind of source, which has an error of its own
    known = ", ".join(f"{kind}:..." for kind in models.SOURCES)
    if folder.exists():
        found, do = "a file, neither a run's folder nor a source of models", f"give a run's folder, or one of {known}"
        raise InputError(asked, found=found, where=str(folder), do=do)
    near = nearest(folder)
    found = f"no such file or folder, and no source of models ({known})" + (
        f"; near: {', '.join(near)}" if near else ""
    )
    do = "give a run's folder, or name the source, too"
    if folder.name == text:
        do += f": torchvision:{text}, timm:{text}"
    raise InputError(asked, found=found, where=os.path.abspath(folder.parent), do=do)


def open_network(
    name: str | Path,
    *,
    factory: str | None = None,
    checkpoint: str | None = None,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    above: tuple[Path, ...] = (),
) -> Network:
    """The network of a run's folder, or the one that a source names ("torchvision:resnet50").

    Args:
        factory: what the run's network was made from; its own record unless given.
        shape: of the example, batch first; the run's or the source's own unless given.
        above: runs that are made from this one.

    Raises:
        InputError: nothing has this name, a run that did not end or does not say what it was made from, or a checkpoint
            beside a run's own weights; see `niwaki.models.load` and `niwaki.load` for the rest.
    """
    run = saved_run(name)
    if run is None:
        if factory is not None:
            do = "leave it out: it says what a run's network was made from"
            raise InputError(f"the model {name} with --model {factory}", found="no run's folder", do=do)
        loaded = models.load(str(name), checkpoint=checkpoint, seed=seed, shape=shape[1:] if shape else None)
        return Network(loaded, _batched(loaded.example, shape))
    if checkpoint is not None:
        raise InputError("--checkpoint with a run's folder", found=str(name), do="the run brings its own weights")
    source = factory or run.source
    if not source:
        raise InputError(
            f"the model of {run.folder}",
            found="the run does not name it",
            do=("give ", Setting("factory", "SOURCE", "what it was made from")),
        )
    places = (*above, run.folder.resolve())
    if len(set(places)) < len(places):
        found, do = "a run that is made from itself", "run again into another folder"
        raise FileDamagedError(f"the model of {run.folder}", found=found, where=str(run.folder / REPORT), do=do)
    wanted = shape or run.shape
    base = open_network(source, shape=wanted, seed=seed, above=places).loaded
    folder = str(run.folder)
    model = load(folder, base.factory).eval()
    modules = dict(model.named_modules())  # those of a network that `torch.export` wrote have other names
    made = replace(
        base,
        model=model,
        source=base.source if run.kind == "trained" else folder,
        factory=base.factory if run.kind == "trained" else partial(load, folder, base.factory),
        weights=folder,
        normalisation=run.normalisation or base.normalisation,
        protect=tuple(name for name in base.protect if name in modules),
    )
    return Network(made, _batched(made.example, wanted), run)


def _batched(example: Any, shape: tuple[int, ...] | None) -> Any:
    return example if not shape or shape[0] == 1 else at_batch(example, shape[0])


def _no_run(folder: Path, asked: str) -> InputError:
    """A folder that holds no run, with what it holds."""
    found, do = "a folder without a run", "give a run's folder, or a model"
    below = sorted(
        {path.parent for path in folder.glob(f"*/{REPORT}")} | {p.parent for p in folder.glob(f"*/{SURGERY}")}
    )
    if is_sweep(folder):
        found, do = "a sweep", f"give one of its runs, below {folder / 'trials'}"
    elif below:
        more = f" and {len(below) - SHOWN} more" if len(below) > SHOWN else ""
        found, do = f"runs below it: {', '.join(map(str, below[:SHOWN]))}{more}", "give one of them"
    elif (folder / "config.json").is_file():
        found, do = "a configuration of transformers", f"write hf:{shlex.quote(str(folder))}"
    return InputError(asked, found=found, where=str(folder), do=do)
