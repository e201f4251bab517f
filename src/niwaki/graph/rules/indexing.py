"""Reads and writes at positions: constant tables are movement, positions that depend on data fix the axis."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from niwaki.graph.labels import compress, varying
from niwaki.graph.rules.movement import normal, separate
from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.values import Labels, Value, covers, join, pad_axes


@rule("index_select")
def index_select(call: Call) -> Labels:
    return gather(call, {normal(call["dim"], call["self"].dim()): call["index"]})


@rule("index", "_unsafe_index")
def index(call: Call) -> Labels:
    return gather(call, picks_of(call["indices"]))


def picks_of(indices: Sequence[Tensor | None]) -> dict[int, Tensor]:
    """Which axis is picked from by what: a mask covers as many axes as it has."""
    picks: dict[int, Tensor] = {}
    axis = 0
    for item in indices:
        span = max(item.dim(), 1) if item is not None and item.dtype in MASKS else 1
        if item is not None:
            picks |= dict.fromkeys(range(axis, axis + span), item)
        axis += span
    return picks


MASKS = (torch.bool, torch.uint8)


def picked_axes(picks: dict[int, Tensor]) -> tuple[int, int]:
    """Where the axes that an index makes stand in the result, and how many there are."""
    axes = sorted(picks)
    adjacent = axes == list(range(axes[0], axes[-1] + 1))
    return axes[0] if adjacent else 0, max(1 if item.dtype in MASKS else item.dim() for item in picks.values())


def gather(call: Call, picks: dict[int, Tensor]) -> Labels:
    """Advanced indexing. Tables of constants are movement; an index that depends on data fixes what it touches."""
    source = call.value(call["self"])
    call.zero = source.zero
    constants = {axis: call.value(item).constant for axis, item in picks.items()}
    masks = {axis for axis, item in picks.items() if item.dtype in MASKS and item.dim() != 1}
    odd = any(item.dtype in MASKS and item.dim() == 0 for item in picks.values())
    axes = sorted(picks)
    moved = []
    for labels in source.get(call.space):
        touched = [axis for axis in axes if labels.shape[axis] > 1]
        if odd or any(axis in masks or constants[axis] is None for axis in touched):
            call.fix(labels, "indexed by data")
            continue
        for axis in touched:
            _note_table(call, labels, axis, call.value(picks[axis]))
        moved.append((labels, touched))
    if not moved:
        return ()
    out_ndim = len(call.shape)
    at, wide = picked_axes(picks)
    adjacent = at == axes[0]
    arrays = []
    for labels, touched in moved:
        rest = [axis for axis in range(labels.ndim) if axis not in axes]
        if touched:
            key: list[Any] = [slice(None)] * labels.ndim
            for axis in axes:
                item = constants[axis] if axis in touched else torch.zeros(1, dtype=torch.long)
                assert item is not None
                array = item.detach().cpu().numpy()
                key[axis] = np.flatnonzero(array) if array.dtype == np.bool_ else array
            shape = np.broadcast_shapes(*[key[axis].shape for axis in axes])
            for axis in axes:
                key[axis] = np.broadcast_to(key[axis], shape)
            picked = labels[tuple(key)]
            picked = picked.reshape(
                picked.shape[:at] + (1,) * (wide - len(shape)) + picked.shape[at:]
                if adjacent
                else (1,) * (wide - len(shape)) + picked.shape
            )
            arrays.append(compress(picked, tuple(range(at, at + wide))))
        else:
            sizes = [labels.shape[axis] for axis in rest]
            where = len([axis for axis in rest if axis < at])
            arrays.append(labels.reshape([*sizes[:where], *[1] * wide, *sizes[where:]]))
        assert arrays[-1].ndim == out_ndim, (call.name, arrays[-1].shape, call.shape)
    return separate(call, arrays)


def _note_table(call: Call, labels: np.ndarray, axis: int, index: Value) -> None:
    """A registered list of positions can be renumbered by a cut; other constants hold the axis."""
    if index.table is None or index.constant is None or index.constant.dim() != 1 or varying(labels) != (axis,):
        call.fix(call.space.marker(labels, (axis,)), "picked by a constant that can't be renumbered")
        return
    call.recorder.tables.append((index.table, labels.ravel(), index.constant.numpy()))


@rule(
    "gather",
    "take_along_dim",
    "scatter",
    "scatter_add",
    "index_add",
    "index_copy",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "scatter_",
    "scatter_add_",
    "index_add_",
    "index_copy_",
    "index_fill",
    "index_fill_",
    "scatter_reduce",
    "masked_scatter",
)
def by_position(call: Call) -> Labels | None:
    """Reads or writes at positions given by data: the addressed axis is fixed, other axes meet index by index."""
    value = call.value(call["self"])
    picks: dict[int, Tensor] = {}
    if call.name.startswith(("index_put", "_index_put")):
        picks = picks_of(call["indices"])
        axes = set(picks)
        parts = [call["values"]]
    else:
        if not call.has("dim") or isinstance(call["dim"], str):
            return None
        axes = {normal(call["dim"], call["self"].dim())}
        names = ("src", "source", "tensor")
        parts = [call[name] for name in names if call.has(name) and isinstance(call[name], Tensor)]
    kept = []
    for labels in value.get(call.space):
        touched = tuple(axis for axis in varying(labels) if axis in axes)
        if touched:
            call.fix(call.space.marker(labels, touched), "indexed by data")
        if len(touched) < len(varying(labels)):
            if call.name == "gather":  # the index may be shorter than its source on the other axes
                part = tuple(
                    slice(0, n) if labels.shape[a] > 1 and a not in axes else slice(None)
                    for a, n in enumerate(call.shape)
                )
                labels = labels[part]
            kept.append(labels)
    rest: list[tuple[tuple[int, ...], Labels, str]] = []
    for part in parts:
        other = call.value(part)
        fields = other.get(call.space)
        if picks:
            rest.append(_spread(call, other, picks))
            continue
        if len(other.shape) != len(call.shape):
            for labels in fields:
                call.fix(labels, "written at positions given by data")
            continue
        shape = tuple(1 if axis in axes else n for axis, n in enumerate(other.shape))
        side = []
        for labels in fields:
            if axes & set(varying(labels)):
                call.fix(labels, "indexed by data")
            else:
                side.append(labels)
        rest.append((shape, tuple(side), other.why))
    call.zero = value.zero and all(call.value(part).zero for part in parts)
    item = call.value(call["index"]) if call.has("index") else None
    if item is not None and len(item.shape) == len(call.shape):  # one index for every place: it has these axes too
        left = [call.drop(labels, tuple(axes)) for labels in item.get(call.space)]
        fields = tuple(labels for labels in left if labels is not None)
        spread = {axis for labels in fields for axis in varying(labels)}  # a bare axis may be cut to fit by forward
        shape = tuple(n if axis in spread else 1 for axis, n in enumerate(item.shape))
        rest.append((shape, fields, item.why))
    call.zero = call.zero and all(covers(call.space, fields, tuple(kept)) for _, fields, _ in rest)
    if call.name in ("gather", "take_along_dim"):
        source = tuple(1 if a in axes else n for a, n in enumerate(call.shape))
        return join(call.space, [(source, tuple(kept), value.why), *rest], call.shape)
    return join(call.space, [(value.shape, tuple(kept), value.why), *rest], call.shape)


def _spread(call: Call, part: Value, picks: dict[int, Tensor]) -> tuple[tuple[int, ...], Labels, str]:
    """What is written at picked positions, laid along the axes of what it is written to: all positions get it."""
    at, wide = picked_axes(picks)
    others = [axis for axis in range(len(call.shape)) if axis not in picks]
    if at:
        at = len([axis for axis in others if axis < at])
    ndim = len(others) + wide

    def lay(sizes: tuple[int, ...]) -> list[int]:
        sizes = (1,) * (ndim - len(sizes)) + sizes
        sizes = sizes[:at] + sizes[at + wide :]
        return [sizes[others.index(axis)] if axis in others else 1 for axis in range(len(call.shape))]

    fields = []
    for labels in part.get(call.space):
        padded = pad_axes(labels, ndim)
        if any(at <= axis < at + wide for axis in varying(padded)):
            call.fix(labels, "indexed by data")
        else:
            fields.append(labels.reshape(lay(labels.shape)))
    return tuple(lay(part.shape)), tuple(fields), part.why
