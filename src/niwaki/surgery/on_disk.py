"""`cut_stored`: the cut of weights that stay on disk; and such weights brought into a cut model."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from niwaki.errors import CannotCutError, InputError, NotFiniteError, PlanMismatchError, RunExistsError, Setting
from niwaki.evidence.evidence import finite
from niwaki.files import PLAN, SURGERY, write_folder
from niwaki.graph.skeleton import copy_with, identity, is_parameter, to_meta
from niwaki.plan import Plan, apply_cuts
from niwaki.stored import INDEX, SINGLE, Layout, Stored, write_index, write_safetensors
from niwaki.surgery.cut import cut
from niwaki.surgery.record import Surgery, surgery_of
from niwaki.surgery.verify import scale_slices

Progress = Callable[[str, int, int], None]
"""Hears of each file that is done: its name, how many are, how many there will be."""
SHOWN = 4


@final
@dataclass(frozen=True, eq=False)
class CutTensors:
    """What a cut makes of each stored tensor."""

    plan: Plan
    surgery: Surgery
    stored: Stored
    first: Mapping[str, str]
    """Every name of a tensor -> its first name in the model."""
    parameters: frozenset[str]

    def layout(self, names: list[str]) -> Layout:
        """Types and shapes after the cut."""
        cuts = self.plan.by_tensor()
        table = {}
        for name in names:
            place = self.stored.places[name]
            ghost = torch.empty(place.shape, dtype=place.dtype, device="meta")
            table[name] = place.dtype, tuple(apply_cuts(ghost, cuts.get(name, []), name).shape)
        return table

    def read(self, name: str) -> Tensor:
        """The cut tensor, from disk."""
        tensor = apply_cuts(self.stored[name], self.plan.by_tensor().get(name, []), name)
        if name in self.parameters and not finite(tensor):
            raise NotFiniteError(
                "cut stored weights", found="NaN or infinity", where=name, do="repair or fetch the checkpoint again"
            )
        for entry in self.surgery.scaled:
            if entry["tensor"] == self.first[name]:
                tensor = scale_slices(tensor.double(), entry).to(tensor.dtype)
        return tensor


def cut_stored(
    model: nn.Module,
    plan: Plan,
    stored: Stored | str | Path,
    folder: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Cut weights on disk into a new folder, tensor by tensor; returns the cut `model` without them.

    `model` says what the tensors are and may be on the meta device. The folder gets the same files as the checkpoint,
    the same tensor in the same file, beside plan.json and surgery.json; it is written aside and renamed. Every number
    is the one that `cut` gives of the loaded model. `fill_stored` and `load` read the folder.

    Raises:
        PlanMismatchError: the plan is for another model.
        InputError: tensors missing, unexpected, or of another shape or kind than the model's; no room on the disk.
        FileDamagedError: the index or a shard cannot be read.
        CannotCutError: the model does not cut through the eager door, whose result has the tensors of the checkpoint.
        RunExistsError: the folder exists and `force` is not given, or it is the checkpoint's own.
    """
    stored = stored if isinstance(stored, Stored) else Stored(stored)
    folder = Path(folder)
    first = fitted(model, stored)
    small = cut(copy_with(model, lambda tensor: to_meta(tensor) if is_parameter(tensor) else tensor.detach()), plan)
    surgery = surgery_of(small)
    if surgery.door != "eager":
        raise CannotCutError(
            f"cut a stored {type(model).__name__}",
            found="it only cuts by torch.export, whose result holds more than the checkpoint's tensors",
            do=(
                "load the model and cut it, or protect what its forward hard-codes: ",
                Setting("protect", written="protect=[...]"),
            ),
        )
    parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    made = CutTensors(plan, surgery, stored, first, parameters)
    kept = {file: [name for name in names if not plan.drops(name)] for file, names in stored.files.items()}
    files = {file: names for file, names in kept.items() if names}
    layouts = {file: made.layout(names) for file, names in files.items()}
    _as_promised(small, layouts)
    if folder.exists() and folder.resolve() == stored.folder.resolve():
        raise RunExistsError(f"write to {folder}", found="the checkpoint itself", do="choose another folder")
    need = sum(numbers_in(layout) for layout in layouts.values())
    _room(folder, need)

    def write(aside: Path) -> None:
        for number, (file, layout) in enumerate(layouts.items(), 1):
            name = SINGLE if stored.index is None else file
            write_safetensors(aside / name, layout, made.read, stored.notes[file])
            if progress is not None:
                progress(name, number, len(layouts))
        if stored.index is not None:
            sizes = {"total_size": need, "total_parameters": plan.promised["params"]}
            metadata = {**stored.metadata, **{key: sizes[key] for key in sizes if key in stored.metadata}}
            write_index(aside / INDEX, files, {**metadata, "total_size": need})
        done = plan.with_mends(surgery.mends, surgery.door)
        (aside / PLAN).write_text(done.to_json(), encoding="utf-8")
        record = {**surgery.to_json(), "stored": True}
        (aside / SURGERY).write_text(json.dumps(record), encoding="utf-8")

    try:
        write_folder(folder, write, force=force)
    except OSError as cause:
        if isinstance(cause, RunExistsError):
            raise
        raise InputError(
            f"write {need:,} bytes to {folder}",
            found=cause.strerror or type(cause).__name__,
            where=str(cause.filename or folder),
            do="make room, or choose another disk; nothing was left there",
        ) from cause
    return small


def fitted(model: nn.Module, stored: Stored) -> dict[str, str]:
    """Every name of the model's tensors with the first name of the same tensor, where what is stored fits them.

    Raises:
        InputError: tensors missing, unexpected, of another shape or kind, or stored twice with different numbers.
    """
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    key: dict[Any, str] = {}
    first = {name: key.setdefault(identity(tensor), name) for name, tensor in own.items()}
    held = {first[name] for name in stored if name in first}
    wrong = {
        "missing": [
            name
            for name in model.state_dict()
            if first.get(name, name) not in held and not name.endswith("num_batches_tracked")
        ],
        "unexpected": [name for name in stored if name not in own],
        "of another shape": [
            f"{name} {place.shape}, in the model {tuple(own[name].shape)}"
            for name, place in stored.places.items()
            if name in own and place.shape != tuple(own[name].shape)
        ],
        "of another kind": [
            f"{name} {_named(place.dtype)}, in the model {_named(own[name].dtype)}"
            for name, place in stored.places.items()
            if name in own and _kind(place.dtype) != _kind(own[name].dtype)
        ],
    }
    listed = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in wrong.items() if names)
    where = str(stored.index or stored.folder)
    if listed:
        raise InputError(
            "fit stored weights to the model", found=listed, where=where, do="name the checkpoint of this very model"
        )
    seen: dict[str, str] = {}
    for name in stored:
        other = seen.setdefault(first[name], name)
        if other != name and not torch.equal(stored[other], stored[name]):
            raise InputError(
                "fit stored weights to the model",
                found=f"{other} and {name} differ",
                where=where,
                do="build the model so that it does not share the two (for transformers: tie_word_embeddings=false)",
            )
    return first


def fill_stored(small: nn.Module, stored: Stored | str | Path) -> nn.Module:
    """Put stored weights into a cut model in place of its own, tied ones under all their names; returns it.

    The tensors are those of the files, in their types, read from disk when they are first used.

    Raises:
        InputError: what is stored does not fit, or a buffer that it does not hold is on the meta device.
    """
    stored = stored if isinstance(stored, Stored) else Stored(stored)
    first = fitted(small, stored)
    made: dict[str, Tensor] = {}
    for name in stored:
        made.setdefault(first[name], stored[name])
    for path, module in small.named_modules():
        for table in (module._parameters, module._buffers):
            for leaf, old in table.items():
                name = first.get(f"{path}.{leaf}" if path else leaf, "")
                if old is None or name not in made:
                    continue
                new = made[name]
                if isinstance(old, nn.Parameter) and not isinstance(new, nn.Parameter):
                    new = made[name] = nn.Parameter(new, requires_grad=old.requires_grad)
                table[leaf] = new
    for name, tensor in (*small.named_parameters(), *small.named_buffers()):
        if tensor.is_meta:
            raise InputError(
                "fill a cut model with stored weights",
                found="a buffer on the meta device, which no file holds",
                where=name,
                do="build the model with niwaki.models.outline, which leaves only parameters out",
            )
    return small


def _as_promised(small: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Refuse a plan whose tensors are not those of the cut model."""
    shapes = {
        name: tuple(tensor.shape)
        for listing in (small.named_parameters(remove_duplicate=False), small.named_buffers(remove_duplicate=False))
        for name, tensor in listing
    }
    for layout in layouts.values():
        for name, (_, shape) in layout.items():
            if shapes[name] != shape:
                raise PlanMismatchError(
                    f"cut {name}", found=f"{shape}, in the cut model {shapes[name]}", do="make the plan again"
                )


def numbers_in(layout: Layout) -> int:
    """Bytes of the numbers of a file."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())


def _room(folder: Path, need: int) -> None:
    there = next(place for place in folder.absolute().parents if place.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise InputError(
            f"write {need:,} bytes to {folder}",
            found=f"{free:,} bytes free",
            where=str(there),
            do="make room, or choose another disk",
        )


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating" if dtype.is_floating_point else "bool" if dtype == torch.bool else "whole"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
