"""Checkpoints on disk: written aside, fsynced and renamed; digests tell the whole from the damaged. No pickles."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from niwaki.errors import FileDamagedError
from niwaki.files import synced
from niwaki.train.state import whole_state

log = logging.getLogger(__name__)

PREFIX, ASIDE = "step-", ".aside-"
STATE = "state.json"
FORMAT = 1
PARTS = ("model", "training")
"""Files of tensors: the weights by the model's own names, and everything else."""


@final
@dataclass(frozen=True, eq=False)
class Saved:
    """A checkpoint that was read and found whole."""

    path: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    training: dict[str, Tensor]


def write_checkpoint(folder: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` (of the optimiser) into `folder`; it is there whole or not at all, also where
    power fails in between.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear_asides(folder)
    place = folder / f"{PREFIX}{step:09d}"
    aside = folder / f"{ASIDE}{place.name}"
    aside.mkdir()
    digests = {}
    for name in PARTS:
        file = aside / f"{name}.safetensors"
        safetensors.torch.save_file({key: _plain(tensor) for key, tensor in parts[name].items()}, str(file))
        synced(file)
        digests[name] = _digest(file)
    content = {"format": FORMAT, "digests": digests, "state": state}
    text = json.dumps({**content, "digest": _text_digest(content)}, indent=1) + "\n"
    (aside / STATE).write_text(text, encoding="utf-8")
    synced(aside / STATE)
    synced(aside)
    if place.exists():  # of a training that went on from an earlier one, and came here again
        shutil.rmtree(place)
    os.rename(aside, place)
    synced(folder)
    return place


def read_checkpoint(path: Path) -> Saved:
    """The checkpoint in `path`, its digests checked before anything of it is used.

    Raises:
        FileDamagedError: a file is missing, truncated or changed.
    """
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        told = content.pop("digest")
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, not {FORMAT}")
        if told != _text_digest(content):
            raise ValueError(f"{STATE} is not as it was written")
        for name in PARTS:
            if _digest(path / f"{name}.safetensors") != content["digests"][name]:
                raise ValueError(f"{name}.safetensors is not as it was written")
        model, training = (safetensors.torch.load_file(path / f"{name}.safetensors") for name in PARTS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as cause:
        found = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        do = "remove it, to go on from the one before"
        raise FileDamagedError("read a checkpoint", found=found, where=str(path), do=do) from cause
    return Saved(path, content["state"], model, training)


def newest(folder: Path) -> Saved | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a warning in the log.

    Raises:
        FileDamagedError: there are some, and none is whole.
    """
    there = listed(folder)
    for path in reversed(there):
        try:
            return read_checkpoint(path)
        except FileDamagedError as error:
            log.warning("%s is damaged (%s): the checkpoint before it is used", path, error.found)
    if there:
        found, do = f"{len(there)}, none of them whole", "start again in another folder"
        raise FileDamagedError("go on from a checkpoint", found=found, where=str(folder), do=do)
    return None


def listed(folder: Path) -> list[Path]:
    """Folders of checkpoints, the oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit())


def prune(folder: Path, *, last: int, best: Collection[int]) -> None:
    """Keep the `last` newest checkpoints and those of the steps in `best`.

    What goes is renamed first: a kill in between leaves nothing that looks like a damaged checkpoint.
    """
    for path in listed(folder)[:-last]:
        if int(path.name.removeprefix(PREFIX)) not in best:
            aside = folder / f"{ASIDE}gone-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.rename(path, aside)
            shutil.rmtree(aside, ignore_errors=True)


def clear_asides(folder: Path) -> None:
    """Remove what a kill left half-written."""
    for path in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(path, ignore_errors=True)


def save_weights(model: nn.Module, file: Path) -> None:
    """The model's state as safetensors, whole or not at all; what has several names is written under the first."""
    partial = file.with_name(file.name + ".partial")
    tensors = {name: _plain(tensor) for name, tensor in whole_state(model).items()}
    safetensors.torch.save_file(tensors, str(partial))
    synced(partial)
    os.replace(partial, file)


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, dense, and alone in its memory."""
    tensor = tensor.detach().to("cpu").contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _text_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
