"""The plan: which units stay, as a readable file that cuts a fresh copy of the model."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from niwaki.errors import FileDamagedError, InputError, PlanMismatchError

FORMAT = "niwaki plan 1"
GROWING = "niwaki plan 2"
"""The same with groups that grow: numbers of units and positions that are listed more than once."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What stays of every group that is cut, who decided it, and what it will cost.

    `cuts` is enough to apply the plan without niwaki: for every cut axis of every parameter and buffer, the positions
    that stay. With `"blocks": g` (grouped convolutions) `keep` is one list per block of axis 0, empty for a block that
    goes as a whole. `"mask": false` marks slices whose length cancels (the direction of a weight norm): masking leaves
    them.
    `"values"` (lists of positions, say a fixed permutation) are the numbers left after the selection, renumbered.

    Where a group grows, a new unit is a copy of one that there is, and its number is listed again right behind it. Of a
    cut axis, `"new"` are the places in the result that new units take; where `"zero"` is true, what is there is to be
    zero: it weighs what they put out, and without it the network computes what it did.
    """

    fingerprint: str
    model: str
    kept: Mapping[str, tuple[int, ...]]
    """Group -> numbers of the units that stay, those with copies more than once; groups that stay as they are are not
    listed."""
    units: Mapping[str, int]
    """Group -> how many units it had."""
    cuts: tuple[Mapping[str, Any], ...]
    promised: Mapping[str, float]
    """"macs", "params", "units", what else a budget was about, and the same with "_before"."""
    budget: tuple[Mapping[str, Any], ...] = ()
    decided_by: Mapping[str, Any] = field(default_factory=dict)
    grids: str = "rows"
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Modules that are left out, their input taking the place of their output -> "tensor", or "tuple" where the
    output is wrapped in a tuple of one. Nothing stays of their own parameters."""
    inexact: Mapping[str, str] = field(default_factory=dict)
    """Cut groups whose removal changes more than zeroing does, with the reason."""
    example: Any = None
    """Shapes and types of the example, enough to trace again without data."""
    mends: tuple[Mapping[str, Any], ...] | None = None
    """Integers of modules that were mended by a cut with this plan; None until one was made."""
    door: str | None = None
    graph: Any = None
    """The graph the plan was made from, when it was made in this process; never written to the file."""

    def __repr__(self) -> str:
        stay = sum(len(keep) for keep in self.kept.values())
        units = sum(self.units[name] for name in self.kept)
        totals = [
            f"{name} {self.promised[f'{name}_before']:.0f} -> {amount:.0f}"
            for name, amount in self.promised.items()
            if f"{name}_before" in self.promised
        ]
        return (
            f"Plan({self.model}: {len(self.kept)} groups cut, {stay} of their {units} units stay; {', '.join(totals)})"
        )

    @property
    def grows(self) -> dict[str, int]:
        """Groups with new units, and how many these are."""
        found = {name: len(keep) - len(set(keep)) for name, keep in self.kept.items()}
        return {name: count for name, count in found.items() if count}

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(
            {
                "format": GROWING if self.grows else FORMAT,
                "model": {"class": self.model, "fingerprint": self.fingerprint},
                "groups": {name: {"units": self.units[name], "keep": list(keep)} for name, keep in self.kept.items()},
                "cuts": [dict(cut) for cut in self.cuts],
                "promised": dict(self.promised),
                "budget": [dict(b) for b in self.budget],
                "decided_by": dict(self.decided_by),
                "grids": self.grids,
                "dropped": dict(self.dropped),
                "inexact": dict(self.inexact),
                "example": self.example,
                "mends": None if self.mends is None else [dict(m) for m in self.mends],
                "door": self.door,
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, *, file: str = "") -> "Plan":
        """Read what `to_json` wrote; `file` is where it lay, for the message.

        Raises:
            FileDamagedError: not a plan, truncated, or inconsistent in itself.
        """
        try:
            data = json.loads(text)
            if data["format"] not in (FORMAT, GROWING):
                raise FileDamagedError(
                    "read a plan",
                    found=f"format {data['format']!r}",
                    do=f"this version reads {FORMAT!r} and {GROWING!r}",
                )
            groups = data["groups"]
            plan = cls(
                fingerprint=str(data["model"]["fingerprint"]),
                model=str(data["model"]["class"]),
                kept={name: tuple(g["keep"]) for name, g in groups.items()},
                units={name: int(g["units"]) for name, g in groups.items()},
                cuts=tuple(data["cuts"]),
                promised=data["promised"],
                budget=tuple(data["budget"]),
                decided_by=data["decided_by"],
                grids=data["grids"],
                dropped=data["dropped"],
                inexact=data["inexact"],
                example=data["example"],
                mends=None if data["mends"] is None else tuple(data["mends"]),
                door=data["door"],
            )
            plan._check(growing=data["format"] == GROWING)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            if isinstance(error, FileDamagedError):
                raise
            raise FileDamagedError(
                "read a plan", found=f"{type(error).__name__}: {error}", where=file, do="make the plan again"
            ) from error
        return plan

    def _check(self, *, growing: bool) -> None:
        for part in (self.promised, self.decided_by, self.inexact, self.dropped):
            if not isinstance(part, dict):
                raise FileDamagedError("read a plan", found=f"{part!r} where a table is expected", do="make it again")
        for name, keep in self.kept.items():
            if (
                not keep
                or any(type(i) is not int for i in keep)
                or list(keep) != sorted(keep if growing else set(keep))
                or keep[0] < 0
                or keep[-1] >= self.units[name]
            ):
                raise FileDamagedError(
                    "read a plan", found="kept units out of range or order", where=f"group {name}", do="make it again"
                )
        if not all(kind in ("tensor", "tuple") for kind in self.dropped.values()):
            raise FileDamagedError("read a plan", found=f"dropped: {dict(self.dropped)}", do="make it again")
        for cut in self.cuts:
            lists = cut["keep"] if cut.get("blocks", 1) > 1 else [cut["keep"]]
            if not isinstance(cut["tensor"], str) or type(cut["axis"]) is not int or cut["axis"] < 0:
                raise FileDamagedError("read a plan", found="a cut without tensor or axis", do="make it again")
            if "new" in cut:
                lists = [_without_new(cut)] if growing else [[-1]]
            for keep in lists:
                if (
                    any(not isinstance(i, int) for i in keep)
                    or list(keep) != sorted(set(keep))
                    or (keep and keep[0] < 0)
                ):
                    raise FileDamagedError(
                        "read a plan", found="kept positions out of order", where=cut["tensor"], do="make it again"
                    )

    def bound(self, model: torch.nn.Module, found: str) -> None:
        """Refuse a model whose fingerprint is not the plan's."""
        if found != self.fingerprint:
            raise PlanMismatchError(
                f"apply a plan made for {self.model} ({self.fingerprint})",
                found=f"{type(model).__qualname__} ({found})",
                do="use the model the plan was made for, uncut and with the same sizes, or make a new plan",
            )

    def drops(self, tensor: str) -> bool:
        """Whether a tensor of this name goes with a module that is left out."""
        return any(tensor.startswith(f"{path}.") for path in self.dropped)

    def with_mends(self, mends: tuple[Mapping[str, Any], ...], door: str) -> "Plan":
        return replace(self, mends=mends, door=door)

    def by_tensor(self) -> dict[str, list[Mapping[str, Any]]]:
        """Cuts of each tensor; those with blocks first, as they count on the uncut axis 0."""
        table: dict[str, list[Mapping[str, Any]]] = {}
        for cut in sorted(self.cuts, key=lambda cut: cut.get("blocks", 1) == 1):
            table.setdefault(cut["tensor"], []).append(cut)
        return table


def _without_new(cut: Mapping[str, Any]) -> list[int]:
    """The positions that stay of a cut with copies.

    Raises:
        ValueError: places of copies that are none.
    """
    keep, new = cut["keep"], set(cut["new"])
    old = [position for place, position in enumerate(keep) if place not in new]
    if not new <= set(range(len(keep))) or not set(keep) <= set(old) or cut.get("blocks", 1) > 1:
        raise ValueError(f"new places of {cut['tensor']} that copy nothing")
    return old


LARGE = 1 << 22
"""From so many elements on, tensors are cut on two axes at once."""


def apply_cuts(tensor: Tensor, cuts: list[Mapping[str, Any]], name: str, *, zero: str = "reads") -> Tensor:
    """`tensor` with only the positions that stay, by index_select, and with new ones.

    Args:
        zero: which new slices are zero: those that read what new units put out ("reads"), or "all" of them.
    """
    rows = next((cut["keep"] for cut in cuts if cut["axis"] == 0 and cut.get("blocks", 1) == 1), None)
    for cut in cuts:
        axis, keep, blocks = int(cut["axis"]), cut["keep"], int(cut.get("blocks", 1))
        _, picked, largest = _positions_read(keep, tensor) if blocks == 1 else (keep, None, -1)
        if (
            axis >= tensor.dim()
            or tensor.shape[0] % blocks
            or (blocks > 1 and len(keep) != blocks)
            or largest >= tensor.shape[axis]
        ):
            raise PlanMismatchError(
                f"cut axis {axis} of {name}", found=f"shape {tuple(tensor.shape)}", do="use the model of the plan"
            )
        if "values" in cut:
            tensor = torch.tensor(cut["values"], dtype=tensor.dtype, device=tensor.device)
            continue
        if picked is not None:
            if axis == 0 and keep and tensor.numel() >= LARGE and (other := _other_axis(tensor, cuts)) is not None:
                return _rows_and_columns(tensor, keep, *other)
            tensor = tensor.index_select(axis, picked)
            if cut.get("new") and (zero == "all" or cut.get("zero")):
                tensor.index_fill_(axis, _positions(cut["new"], tensor), 0)
            continue
        columns = _of_rows(keep, np.arange(tensor.shape[0]) if rows is None else np.array(rows), tensor.shape[0])
        if columns is None or int(columns[1].max(initial=-1)) >= tensor.shape[axis]:
            raise PlanMismatchError(
                f"cut axis {axis} of {name}",
                found=f"blocks that do not fit shape {tuple(tensor.shape)}",
                do="use the model of the plan",
            )
        tensor = _each_its_own(tensor, axis, *columns)
        cuts = [c for c in cuts if c is not cut and not (c["axis"] == 0 and c.get("blocks", 1) == 1)]
        return apply_cuts(tensor, cuts, name, zero=zero) if cuts else tensor
    return tensor


def _of_rows(keep: list[list[int]], rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Those of `rows` (of `length`, in as many blocks as there are lists) whose block keeps anything, and the positions
    that each of them keeps, `[rows, positions]`; None where blocks keep differently many, or a row is in none.
    """
    if int(rows.max(initial=-1)) >= length:
        return None
    block = rows // (length // len(keep))
    held = [number for number in np.unique(block).tolist() if keep[number]]
    if not held or len({len(keep[number]) for number in held}) > 1:
        return None
    rows, block = rows[np.isin(block, held)], block[np.isin(block, held)]
    return rows, np.array([keep[number] for number in held], dtype=np.int64)[np.searchsorted(held, block)]


def _each_its_own(tensor: Tensor, axis: int, rows: np.ndarray, positions: np.ndarray) -> Tensor:
    """`rows` of a tensor, of each its own positions along `axis`: one list of places in rows laid end to end."""
    places = torch.from_numpy((rows[:, None] * tensor.shape[axis] + positions).ravel()).to(tensor.device)
    picked = tensor.movedim(axis, 1).flatten(0, 1).index_select(0, places)
    return picked.reshape(*positions.shape, *picked.shape[1:]).movedim(1, axis)


def _other_axis(tensor: Tensor, cuts: list[Mapping[str, Any]]) -> tuple[int, list[int]] | None:
    """Axis and positions of the second of two plain cuts, where rows are the first."""
    if len(cuts) != 2 or any("new" in cut for cut in cuts) or tensor.is_meta or not tensor.is_contiguous():
        return None
    axis, keep = int(cuts[1]["axis"]), cuts[1]["keep"]
    plain = 0 < axis < tensor.dim() and cuts[1].get("blocks", 1) == 1 and "values" not in cuts[1]
    return (axis, keep) if plain and keep and keep[-1] < tensor.shape[axis] else None


def _rows_and_columns(tensor: Tensor, rows: list[int], axis: int, keep: list[int]) -> Tensor:
    """What stays on two axes of a large tensor, a few rows at a time: nothing large is made on the way, which takes
    longer than all else. Positions that stay in runs of equal length (what flattening makes of channels) are moved as
    such.
    """
    shape = (len(rows), *tensor.shape[1:axis], len(keep), *tensor.shape[axis + 1 :])
    at = np.array(keep, dtype=np.int64)
    breaks = np.flatnonzero(np.diff(at) != 1)
    run = int(np.gcd.reduce(np.concatenate([at[[0, *(breaks + 1)]], at[[*breaks, -1]] + 1, [tensor.shape[axis]]])))
    if run > 1:
        tensor, at = tensor.unflatten(axis, (-1, run)), at[::run] // run
    columns = torch.from_numpy(at).to(tensor.device)
    small = tensor.new_empty((len(rows), *tensor.shape[1:axis], at.size, *tensor.shape[axis + 1 :]))
    step, picked = max(1, LARGE * len(tensor) // (16 * tensor.numel())), _positions(rows, tensor)
    for start in range(0, len(rows), step):
        part = tensor.index_select(0, picked[start : start + step])
        torch.index_select(part, axis, columns, out=small[start : start + step])
    return small.reshape(shape)


Read = tuple[list[int], Tensor, int]
_read: ContextVar[dict[tuple[int, torch.device], Read] | None] = ContextVar("read", default=None)


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, a list of positions that several cuts share is read once."""
    token = _read.set({})
    try:
        yield
    finally:
        _read.reset(token)


def _positions(keep: list[int], tensor: Tensor) -> Tensor:
    """The positions as a tensor; a list read by torch takes twice as long."""
    return _positions_read(keep, tensor)[1]


def _positions_read(keep: list[int], tensor: Tensor) -> Read:
    known = _read.get()
    key = id(keep), tensor.device
    if known is not None and key in known:
        return known[key]
    array = np.array(keep, dtype=np.int64)
    read = keep, torch.from_numpy(array).to(tensor.device), int(array.max(initial=-1))
    if known is not None:
        known[key] = read
    return read


def encode_example(example: Any) -> Any:
    """Shapes and types of an example as plain data, or None where it holds something else."""
    if isinstance(example, Tensor):
        return {"tensor": list(example.shape), "dtype": str(example.dtype).removeprefix("torch.")}
    if isinstance(example, (tuple, list)):
        return {"tuple" if isinstance(example, tuple) else "list": [encode_example(item) for item in example]}
    if isinstance(example, dict):
        return {"dict": {str(key): encode_example(item) for key, item in example.items()}}
    if isinstance(example, (int, float, str, bool, type(None))):
        return {"value": example}
    return None


def decode_example(spec: Any, device: str = "meta") -> Any:
    """What `encode_example` described, with empty tensors (zeros off the meta device)."""
    try:
        return _decoded(spec, device)
    except (KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise FileDamagedError(
            "rebuild the example of a plan", found=f"{type(error).__name__}: {error}", do="make the plan again"
        ) from error


def _decoded(spec: Any, device: str) -> Any:
    if spec is None:
        raise InputError(
            "rebuild the example of a plan", found="none was recorded", do="make the plan with tensors as example"
        )
    if "tensor" in spec:
        dtype = getattr(torch, spec["dtype"])
        if not isinstance(dtype, torch.dtype) or any(type(n) is not int or n < 0 for n in spec["tensor"]):
            raise TypeError(f"no shape or type: {spec}")
        return torch.zeros(spec["tensor"], dtype=dtype, device=device)
    if "tuple" in spec:
        return tuple(_decoded(item, device) for item in spec["tuple"])
    if "list" in spec:
        return [_decoded(item, device) for item in spec["list"]]
    if "dict" in spec:
        return {key: _decoded(item, device) for key, item in spec["dict"].items()}
    return spec["value"]
