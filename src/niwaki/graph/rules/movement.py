"""Data movement: the same call applied to the label arrays, axis by axis, never along an axis without labels."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from math import prod

import numpy as np
from torch import Tensor

from niwaki.graph.labels import column_axis, compress, varying
from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.values import Labels, Value, rigid_axes

EMPTY = "an empty tensor is laid out anew"
PICKED = "picked by a constant index"
MOST_PLACES = 1 << 18
"""Positions of two labelled axes laid together that are followed one by one (attention maps of video have more)."""


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
            if prod(shape) > MOST_PLACES:
                call.recorder.why = f"spread over {prod(shape)} places by {call.name}"
                for f in inside:
                    call.fix(f, call.recorder.why)
                kept = [f for f in kept if not any(f is other for other in inside)]
                continue
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
    """Any walk through the memory of a tensor without gaps or overlaps: windows, diagonals, changes of layout."""
    value = call.value(call["self"])
    strides = [int(step) for step in call["stride"]]
    if tuple(call["size"]) == value.shape and tuple(strides) == tuple(call["self"].stride()):
        return unchanged(call)
    start = call["storage_offset"]
    first = 0 if start is None else int(start) - call["self"].storage_offset()
    if not _dense(call["self"]) or first < 0 or prod(call.shape) > WALK_LIMIT:
        return None
    places = np.full((1,) * len(call.shape), first, dtype=np.int64)
    for axis, (size, step) in enumerate(zip(call.shape, strides, strict=True)):
        places = places + (np.arange(size) * step).reshape([size if a == axis else 1 for a in range(len(call.shape))])
    if places.size and int(places.max()) >= prod(value.shape):
        return None  # memory beyond the tensor
    coordinates = [places // step % size for size, step in zip(value.shape, call["self"].stride(), strict=True)]

    def walk(labels: np.ndarray) -> np.ndarray:
        axes = varying(labels)
        key = tuple(coordinates[a] if a in axes else 0 for a in range(labels.ndim))
        return compress(labels[key]) if axes else labels.reshape((1,) * len(call.shape))

    return move(call, walk)


WALK_LIMIT = 1 << 22
"""Positions that are walked one by one."""


def _dense(tensor: Tensor) -> bool:
    """Whether every place in the tensor's stretch of memory is one of its positions."""
    expected = 1
    for step, size in sorted(
        (step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    ):
        if step != expected:
            return False
        expected *= size
    return True
