"""Data movement: the same call applied to the label arrays, axis by axis, never along an axis without labels."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from niwaki.graph.labels import column_axis, compress, varying
from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.values import Labels, Value, covers, join, rigid_axes

EMPTY = "an empty tensor is laid out anew"
PICKED = "picked by a constant index"


def separate(call: Call, arrays: list[np.ndarray]) -> Labels:
    """Labels of a moved tensor: those that fell on one axis together, or onto no axis at all, are fixed."""
    kept: list[np.ndarray] = []
    alone: list[np.ndarray] = []
    call.picked.append(alone)
    for labels in arrays:
        axes = set(varying(labels))
        if not axes:
            call.fix(labels, PICKED)
            alone.append(labels)
            continue
        clash = [other for other in kept if axes & set(varying(other)) and not crossing(labels, other)]
        if clash:
            for other in (labels, *clash):
                call.fix(other, "two labelled axes are viewed as one")
            kept = [other for other in kept if not any(other is c for c in clash)]
            continue
        kept.append(labels)
    return tuple(kept)


def crossing(labels: np.ndarray, other: np.ndarray) -> bool:
    """Whether these are two grids that share their rows and have columns of their own."""
    mine, theirs = set(varying(labels)), set(varying(other))
    return bool(mine & theirs) and not mine <= theirs and not theirs <= mine


def move(call: Call, change: Callable[[np.ndarray], np.ndarray], *, source: str = "self") -> Labels:
    """Apply `change` to each label array of the argument `source`."""
    value = call.value(call[source])
    call.zero = value.zero
    return separate(call, [change(labels) for labels in value.get(call.space)])


def normal(axis: int, ndim: int) -> int:
    return axis % max(ndim, 1)


@rule(
    "clone",
    "contiguous",
    "_to_copy",
    "detach",
    "detach_",
    "alias",
    "lift_fresh",
    "lift_fresh_copy",
    "lift",
    "view_of",
    "positive",
    "_conj",
    "resolve_conj",
    "resolve_neg",
    "_reshape_copy",
    "alias_copy",
    "to",
    "pin_memory",
    "native_dropout",
    "dropout",
    "alpha_dropout",
    "feature_dropout",
    "dropout_",
    "_to_dense",
    "_pin_memory",
)
def same(call: Call) -> Labels:
    return unchanged(call)


def unchanged(call: Call) -> Labels:
    """Labels of the first argument, as they are."""
    source = call.args[0]
    value = call.value(source)
    call.zero = value.zero
    return value.get(call.space)


@lru_cache(maxsize=4096)
def factor(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Smallest runs of axes with equal products: how a view regroups axes."""
    runs = []
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        a = b = 1
        if i < len(before):
            left, a, i = [i], before[i], i + 1
        if j < len(after):
            right, b, j = [j], after[j], j + 1
        while a != b:
            if a < b:
                left.append(i)
                a, i = a * before[i], i + 1
            else:
                right.append(j)
                b, j = b * after[j], j + 1
        while i < len(before) and before[i] == 1 and j >= len(after):
            left.append(i)
            i += 1
        while j < len(after) and after[j] == 1 and i >= len(before):
            right.append(j)
            j += 1
        runs.append((tuple(left), tuple(right)))
    return tuple(runs)


def view(call: Call, labels: np.ndarray, before: tuple[int, ...], after: tuple[int, ...]) -> np.ndarray:
    """`labels` of a tensor of shape `before` when it is viewed as `after`."""
    if before == after:
        return labels
    for left, right in factor(before, after):  # merges in the old coordinates first: they may tie labels
        big = [axis for axis in left if before[axis] > 1]
        spread = [axis for axis in big if labels.shape[axis] > 1]
        if len(big) > 1 and len(spread) > 1 and len([a for a in right if after[a] > 1]) < len(big):
            column = column_axis(labels)
            inside = spread[spread.index(column) + 1 :] if column in spread else []
            if inside:  # rows interleaved inside columns: columns go together
                call.space.marker(labels, tuple(axis for axis in varying(labels) if axis not in inside))
    sizes: list[int] = []
    target: list[int] = []
    split: list[int] = []
    for left, right in factor(before, after):
        if all(labels.shape[axis] == 1 for axis in left):
            sizes += [1] * len(left)
            target += [1] * len(right)
            continue
        sizes += [before[axis] for axis in left]
        target += [after[axis] for axis in right]
        split += [axis for axis in right if after[axis] > 1]
    moved = np.broadcast_to(labels, sizes).reshape(target)
    return compress(moved, tuple(split))


def prepare(call: Call, value: Value, after: tuple[int, ...]) -> Labels:
    """Labels made ready for axes that are about to become one.

    Where two labelled axes become one, each position belongs to both: it gets a label of its own, with the old ones as
    the slabs it lies in. A free axis laid together with another keeps its count: its labels go.
    """
    fields, before = value.get(call.space), value.shape
    if before == after:
        return fields
    kept = list(fields)
    bare = rigid_axes(before, fields)
    for left, right in factor(before, after):
        big = [axis for axis in left if before[axis] > 1]
        if len(big) < 2 or len([axis for axis in right if after[axis] > 1]) >= len(big):
            continue
        inside = [f for f in kept if set(varying(f)) & set(big)]
        free = [f for f in inside if call.space.is_free(f)]
        if free and len(free) == len(inside) and not any(axis in bare for axis in big):
            size = int(np.prod([before[axis] for axis in big]))
            whole = call.space.free(size).reshape([n if axis in big else 1 for axis, n in enumerate(before)])
            kept = [f for f in kept if not any(f is other for other in free)] + [whole]
            continue
        kept = [f for f in kept if not any(f is other for other in free)]
        inside = [f for f in inside if not any(f is other for other in free)]
        if len({tuple(axis for axis in varying(f) if axis in big) for f in inside}) > 1:
            shape = np.broadcast_shapes(*(f.shape for f in inside))
            order = list(range(len(shape)))
            if value.direct:  # a parameter's own order of axes, however it has been turned since: outer ones come first
                first = {axis: int(f.min()) for f in inside for axis in varying(f)}
                order.sort(key=lambda axis: first.get(axis, -1))
            sizes = [shape[axis] for axis in order]
            product = call.space.new(int(np.prod(shape))).reshape(sizes).transpose(np.argsort(order))
            for f in inside:
                call.space.slab(f, product)
            call.space.grid(product)
            kept = [f for f in kept if not any(f is other for other in inside)] + [product]
    return tuple(kept)


@rule(
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "flatten",
    "unflatten",
    "view_copy",
    "squeeze",
    "unsqueeze",
    "squeeze_",
    "unsqueeze_",
    "squeeze_copy",
    "unsqueeze_copy",
    "resize_",
)
def reshape(call: Call) -> Labels:
    value = call.value(call["self"])
    call.zero = value.zero
    if call.name == "view" and call.has("dtype"):
        return unchanged(call)
    before, after = value.shape, call.shape
    if 0 in before:  # nothing was found: labels move as they would for a finding or two
        before, after = found(before, after)
        if prod(before) != prod(after):
            for labels in value.get(call.space):
                call.fix(labels, EMPTY)
            return ()
        value = replace(value, shape=before)
    arrays = []
    for labels in prepare(call, value, after):
        grid_before = len(varying(labels))
        moved = view(call, labels, before, after)
        if len(varying(moved)) > grid_before:
            call.space.grid(moved)
        if any(size == 0 and moved.shape[axis] > 1 for axis, size in enumerate(call.shape)):
            call.fix(moved, EMPTY)
        else:
            arrays.append(moved)
    return separate(call, arrays)


def found(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of an empty tensor and of its view, with as many positions along the empty axes as make them fit."""
    whole = [[max(size, 1) for size in shape] for shape in (before, after)]
    sizes = [prod(shape) for shape in whole]
    for shape, sized, mine, other in zip((before, after), whole, sizes, sizes[::-1], strict=True):
        if other % mine == 0:
            sized[shape.index(0)] = other // mine
            break
    return tuple(whole[0]), tuple(whole[1])


@rule(
    "permute",
    "transpose",
    "t",
    "transpose_",
    "t_",
    "permute_copy",
    "transpose_copy",
    "t_copy",
    "movedim",
    "mT",
    "numpy_T",
    "swapaxes",
)
def permute(call: Call) -> Labels:
    ndim = call[("self")].dim()
    if call.name.startswith("permute"):
        order = [normal(axis, ndim) for axis in call["dims"]]
    else:
        order = list(range(ndim))
        if ndim >= 2:
            two = (call["dim0"], call["dim1"]) if call.has("dim0") else (0, 1)
            a, b = normal(two[0], ndim), normal(two[1], ndim)
            order[a], order[b] = order[b], order[a]
    return move(call, lambda labels: labels.transpose(order))


@rule("expand", "expand_copy", "broadcast_to", "expand_as")
def expand(call: Call) -> Labels:
    value = call.value(call["self"])
    call.zero = value.zero
    shape = call.shape
    old = (1,) * (len(shape) - len(value.shape)) + tuple(value.shape)
    arrays = [labels.reshape((1,) * (len(shape) - labels.ndim) + labels.shape) for labels in value.get(call.space)]
    for axis, (before, after) in enumerate(zip(old, shape, strict=True)):
        if before != after:  # repeated values: any number of them will do, so these positions are free
            arrays.append(call.space.free(after).reshape([after if a == axis else 1 for a in range(len(shape))]))
    return separate(call, arrays)


@rule("repeat", "tile")
def repeat(call: Call) -> Labels:
    value = call.value(call["self"])
    call.zero = value.zero
    repeats = list(call["repeats" if call.has("repeats") else "dims"])
    ndim = len(call.shape)
    repeats = [1] * (ndim - len(repeats)) + repeats
    old = (1,) * (ndim - len(value.shape)) + tuple(value.shape)
    arrays = []
    for labels in value.get(call.space):
        labels = labels.reshape((1,) * (ndim - labels.ndim) + labels.shape)
        arrays.append(np.tile(labels, [n if labels.shape[a] > 1 else 1 for a, n in enumerate(repeats)]))
    for axis, (before, n) in enumerate(zip(old, repeats, strict=True)):
        if before == 1 and n > 1:
            arrays.append(call.space.free(n).reshape([n if a == axis else 1 for a in range(ndim)]))
    return separate(call, arrays)


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Labels | None:
    if not call.has("self") or not call.has("repeats") or not isinstance(call["repeats"], int) or call["dim"] is None:
        return None
    axis, n = normal(call["dim"], call["self"].dim()), call["repeats"]
    return move(call, lambda labels: np.repeat(labels, n, axis) if labels.shape[axis] > 1 else labels)


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


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(call: Call) -> Labels:
    value = call.value(call["self"])
    call.zero = value.zero
    *lead, c, h, w = value.shape
    n = len(lead)
    inner: tuple[int, ...]
    order: tuple[int, ...]
    if call.name == "pixel_shuffle":
        r = int(call["upscale_factor"])
        inner, order = (c // (r * r), r, r, h, w), (0, 3, 1, 4, 2)
    elif call.name == "pixel_unshuffle":
        r = int(call["downscale_factor"])
        inner, order = (c, h // r, r, w // r, r), (0, 2, 4, 1, 3)
    else:
        g = int(call["groups"])
        inner, order = (g, c // g, h, w), (1, 0, 2, 3)
    middle = (*lead, *inner)
    places = (*range(n), *(n + axis for axis in order))
    arrays = []
    for labels in value.get(call.space):
        labels = view(call, labels, value.shape, middle)
        call.space.grid(labels)
        if call.name == "pixel_shuffle":  # phases of a channel laid out in space go with their channel
            for axis in (n + 1, n + 2):
                call.space.tie(labels, axis)
                labels = np.take(labels, [0], axis=axis)
        labels = labels.transpose(places)
        arrays.append(view(call, labels, tuple(middle[a] for a in places), call.shape))
    return separate(call, arrays)


@rule("unfold", "unfold_copy")
def unfold(call: Call) -> Labels:
    """Sliding windows along one axis, the window appended as the last axis."""
    value = call.value(call["self"])
    axis = normal(call["dimension"], call["self"].dim())
    call.zero = value.zero
    size, step = int(call["size"]), int(call["step"])

    def change(labels: np.ndarray) -> np.ndarray:
        if labels.shape[axis] == 1:
            return labels[..., None]
        windows = np.lib.stride_tricks.sliding_window_view(labels, size, axis)
        return windows[(slice(None),) * axis + (slice(None, None, step),)]

    return move(call, change)


@rule("im2col")
def im2col(call: Call) -> Labels:
    """Windows of a picture laid out as channels x kernel: a grid of rows (channels) and kernel positions."""
    value = call.value(call["self"])
    call.zero = value.zero
    kernel = int(np.prod(call["kernel_size"]))
    arrays = []
    for labels in value.get(call.space):
        if varying(labels) and any(axis >= labels.ndim - 2 for axis in varying(labels)):
            call.fix(labels, "space")
            continue
        if labels.shape[-3] > 1:
            labels = np.repeat(labels, kernel, axis=-3)
        arrays.append(labels.reshape(*labels.shape[:-2], 1))
    return separate(call, arrays)


@rule("col2im")
def col2im(call: Call) -> Labels:
    """The way back: the positions of a channel's windows are added up in space, so they go with their channel."""
    value = call.value(call["self"])
    call.zero = value.zero
    kernel = int(np.prod(call["kernel_size"]))
    arrays = []
    for labels in value.get(call.space):
        if labels.shape[-1] > 1:
            call.fix(labels, "space")
            continue
        *lead, channels, _ = labels.shape
        if channels > 1:
            grid = labels.reshape(*lead, channels // kernel, kernel)
            call.space.tie(grid, grid.ndim - 1)
            labels = grid[..., :1]
        arrays.append(labels[..., None])
    return separate(call, arrays)


@rule("diagonal", "diagonal_copy")
def diagonal(call: Call) -> Labels:
    value = call.value(call["self"])
    a, b = normal(call["dim1"], len(value.shape)), normal(call["dim2"], len(value.shape))
    arrays = []
    for labels in value.get(call.space):
        if {a, b} & set(varying(labels)):
            call.fix(labels, "a diagonal is taken")
        else:
            rest = [labels.shape[axis] for axis in range(labels.ndim) if axis not in (a, b)]
            arrays.append(labels.reshape([*rest, 1]))
    return separate(call, arrays)


@rule("view_as_real", "view_as_complex", "real", "imag")
def complex_view(call: Call) -> Labels:
    value = call.value(call["self"])
    call.zero = value.zero
    if call.name == "view_as_real":
        return move(call, lambda labels: labels[..., None])
    if call.name == "view_as_complex":
        for labels in value.get(call.space):
            if labels.shape[-1] > 1:
                call.space.tie(labels, labels.ndim - 1)
        return move(call, lambda labels: labels[..., 0])
    return unchanged(call)


@rule("set_", "resize_as_", "record_stream")
def forget(call: Call) -> Labels:
    return ()


@rule("as_strided", "as_strided_", "as_strided_copy")
def as_strided(call: Call) -> Labels | None:
    """Only where the shape stays (a change of memory layout)."""
    return unchanged(call) if tuple(call["size"]) == call.value(call["self"]).shape else None
