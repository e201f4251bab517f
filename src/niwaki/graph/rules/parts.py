"""Parts of axes taken, turned, and laid end to end: the same on label arrays, never along an axis without labels."""

from collections.abc import Callable
from typing import Any

import numpy as np

from niwaki.graph.labels import varying
from niwaki.graph.rules.movement import move, normal, separate
from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.values import Labels, Value, covers, join, rigid_axes


def cut_axis(axis: int, part: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda labels: labels[(slice(None),) * axis + (part,)] if labels.shape[axis] > 1 else labels


@rule("slice", "slice_copy", "narrow", "narrow_copy")
def slice_(call: Call) -> Labels:
    axis = normal(call["dim"], call["self"].dim())
    if call.name.startswith("narrow"):
        part = slice(int(call["start"]), int(call["start"]) + int(call["length"]))
    else:
        part = slice(call["start"], call["end"], call["step"])
        phases(call, axis, int(call["step"]))
    by_number(call, axis, part.start or -1, part.stop)
    return move(call, cut_axis(axis, part))


def phases(call: Call, axis: int, step: int) -> None:
    """Every n-th position is picked again from what stays when n neighbours go together."""
    for labels in call.value(call["self"]).get(call.space, (axis,)) if step > 1 else ():
        if labels.shape[axis] > 1:
            line = np.moveaxis(call.space.marker(labels, (axis,)), axis, -1)
            call.space.unite(line, line[..., np.arange(line.shape[-1]) // step * step])


@rule("select", "select_copy")
def select(call: Call) -> Labels:
    axis, index = normal(call["dim"], call["self"].dim()), int(call["index"])
    by_number(call, axis, index)
    return move(call, lambda labels: np.take(labels, index if labels.shape[axis] > 1 else 0, axis))


def by_number(call: Call, axis: int, *ends: int | None) -> None:
    """A position that may be a number read out of data can be another one next time: the axis is fixed."""
    if not call.recorder.data_numbers().isdisjoint(ends):
        for labels in call.value(call["self"]).get(call.space, (axis,)):
            if labels.shape[axis] > 1:
                call.fix(call.space.marker(labels, (axis,)), "picked by a number read out of data")


def take_at(axis: int, index: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda labels: np.take(labels, index if labels.shape[axis] > 1 else 0, axis)


@rule("unbind", "unbind_copy")
def unbind(call: Call) -> list[Labels]:
    axis = normal(call["dim"], call["self"].dim())
    parts = []
    for i in range(len(call.result)):
        parts.append(move(call, take_at(axis, i)))
    return parts


@rule(
    "split",
    "split_with_sizes",
    "chunk",
    "split_copy",
    "split_with_sizes_copy",
    "tensor_split",
    "unsafe_split",
    "unsafe_chunk",
    "unsafe_split_with_sizes",
)
def split(call: Call) -> list[Labels]:
    axis = normal(call["dim"], call["self"].dim())
    parts, start = [], 0
    for piece in call.result:
        stop = start + piece.shape[axis]
        parts.append(move(call, cut_axis(axis, slice(start, stop))))
        start = stop
    return parts


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Labels:
    tensors = [t for t in call["tensors"] if not (t.dim() == 1 and t.numel() == 0 and len(call.shape) != 1)]
    axis = normal(call["dim"], len(call.shape))
    return cat_values(call, [call.value(t) for t in tensors], axis)


def cat_values(call: Call, values: list[Value], axis: int) -> Labels:
    """Labels of tensors laid end to end along `axis`; on the other axes they meet index by index."""
    listed = [list(value.get(call.space)) for value in values]
    others: list[tuple[tuple[int, ...], Labels, str]] = []
    spans: list[list[np.ndarray]] = []
    for value, arrays in zip(values, listed, strict=True):
        spans.append([labels for labels in arrays if axis in varying(labels)])
        shape = tuple(1 if a == axis else size for a, size in enumerate(value.shape))
        side = [labels for labels in arrays if axis not in varying(labels)]
        # a grid that also runs along the joined axis covers its other axes through its slabs
        for labels in spans[-1]:
            rest = tuple(a for a in varying(labels) if a != axis)
            if rest:
                side.append(call.space.marker(labels, rest))
        others.append((shape, tuple(side), value.why))
    beside = join(call.space, others, tuple(1 if a == axis else n for a, n in enumerate(call.shape)))
    call.zero = all(
        value.zero and covers(call.space, fields, beside) for value, (_, fields, _) in zip(values, others, strict=True)
    )
    result = list(beside)
    if any(spans):
        pieces = []
        full = [1] * len(call.shape)
        for arrays in spans:
            for labels in arrays:
                full = [max(a, b) if i != axis else 1 for i, (a, b) in enumerate(zip(full, labels.shape, strict=True))]
        for value, arrays in zip(values, spans, strict=True):
            size = value.shape[axis]
            span = [size if a == axis else n for a, n in enumerate(full)]
            if len(arrays) == 1:
                pieces.append(np.broadcast_to(arrays[0], span))
                continue
            fresh = call.space.new(size).reshape([size if a == axis else 1 for a in range(len(full))])
            call.fix(fresh, f"is joined to {value.why}" if not arrays else "two grids cross on one axis")
            for labels in arrays:
                call.fix(labels, "two grids cross on one axis")
            pieces.append(np.broadcast_to(fresh, span))
        joined = np.concatenate(pieces, axis=axis)
        result = [labels for labels in result if not set(varying(labels)) <= set(varying(joined))]
        result.append(joined)
    return tuple(result)


@rule("stack")
def stack(call: Call) -> Labels:
    axis = normal(call["dim"], len(call.shape))
    values = []
    for tensor in call["tensors"]:
        value = call.value(tensor)
        fields = tuple(np.expand_dims(labels, axis) for labels in value.get(call.space))
        shape = (*value.shape[:axis], 1, *value.shape[axis:])
        values.append(Value(shape, fields, why=value.why, zero=value.zero))
    shape = tuple(1 if a == axis else n for a, n in enumerate(call.shape))
    result = join(call.space, [(v.shape, v.fields, v.why) for v in values], shape)
    call.zero = all(v.zero and covers(call.space, v.fields, result) for v in values)
    return result


@rule("flip", "fliplr", "flipud")
def flip(call: Call) -> Labels:
    axes = [normal(axis, call["self"].dim()) for axis in call["dims"]]
    return move(call, lambda labels: np.flip(labels, tuple(a for a in axes if labels.shape[a] > 1)))


@rule("roll")
def roll(call: Call) -> Labels | None:
    if not call["dims"]:
        return None
    shifts = call["shifts"] if isinstance(call["shifts"], (list, tuple)) else [call["shifts"]]
    axes = [normal(axis, call["self"].dim()) for axis in call["dims"]]

    def change(labels: np.ndarray) -> np.ndarray:
        for shift, axis in zip(shifts, axes, strict=True):
            if labels.shape[axis] > 1:
                labels = np.roll(labels, shift, axis)
        return labels

    return move(call, change)


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> Labels:
    value = call.value(call["self"])
    amounts, ndim = list(call["pad"]), len(call.shape)
    fill = call["value"] or 0
    call.zero = value.zero and fill == 0
    arrays = list(value.get(call.space))
    bare = rigid_axes(value.shape, tuple(arrays))
    for i in range(0, len(amounts), 2):
        axis = ndim - 1 - i // 2
        before, after = int(amounts[i]), int(amounts[i + 1])
        if before == 0 and after == 0:
            continue
        if axis in bare:
            continue  # padding an axis without labels: the axis stays bare
        found = [k for k, labels in enumerate(arrays) if axis in varying(labels)]
        if not found:  # one position becomes several
            continue
        labels = arrays[found[0]]
        if before < 0 or after < 0:
            size = labels.shape[axis]
            labels = cut_axis(axis, slice(max(0, -before), size - max(0, -after)))(labels)
            before, after = max(0, before), max(0, after)
        side = [n if a != axis else before + after for a, n in enumerate(labels.shape)]
        fresh = call.space.new(before + after).reshape([n if a == axis else 1 for a, n in enumerate(side)])
        if fill:
            call.fix(fresh, "padded with a constant that is not zero")
        fresh = np.broadcast_to(fresh, side)
        front, back = np.split(fresh, [before], axis=axis)
        arrays[found[0]] = np.concatenate([front, labels, back], axis=axis)
    return separate(call, arrays)


@rule("slice_scatter", "select_scatter")
def scatter_part(call: Call) -> Labels:
    value, part = call.value(call["self"]), call.value(call["src"])
    axis = normal(call["dim"], call["self"].dim())
    fields, added = value.get(call.space), part.get(call.space)
    call.zero = value.zero and part.zero and (call.name == "select_scatter" or covers(call.space, added, fields))
    if call.name == "slice_scatter":
        window = [cut_axis(axis, slice(call["start"], call["end"], call["step"]))(labels) for labels in fields]
        join(
            call.space,
            [(part.shape, tuple(window), value.why), (part.shape, added, part.why)],
            part.shape,
        )
    else:
        window = [np.take(labels, int(call["index"]) if labels.shape[axis] > 1 else 0, axis) for labels in fields]
        join(
            call.space,
            [(part.shape, separate(call, window), value.why), (part.shape, added, part.why)],
            part.shape,
        )
    return fields
