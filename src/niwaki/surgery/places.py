"""Positions that a call picks or fills by number, and where they must lie once an axis is cut.

Where one position is left of an axis, it carries no label, and labels alone do not show that it was put in the wrong
place; the numbers of the call do.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from niwaki.graph.recorder import Record
from niwaki.graph.rules.registry import argument
from niwaki.graph.values import Value

if TYPE_CHECKING:
    from niwaki.surgery.evidence import Sizes

STAYING = frozenset({"constant_pad_nd", "select", "select_scatter", "slice_scatter"})
"""Calls that are made whatever the sizes are; a slice of all there is, or a view to the shape there is, may vanish."""


def along(value: Value, axis: int) -> np.ndarray | None:
    """Labels of `value` along `axis`, `[size, rest]`."""
    for labels in value.fields if value.parameter is None else ():
        if labels.ndim > axis and labels.shape[axis] > 1:
            return np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
    if value.parameter is not None and axis in value.parameter.seeds and value.parameter.blocks[axis] == 1:
        return value.parameter.seeds[axis].reshape(-1, 1)
    return None


def moved(labels: np.ndarray, positions: np.ndarray, sizes: "Sizes", left: int) -> np.ndarray:
    """Where those of the positions that stay lie after the cut, which leaves so many; `labels` are those along the
    axis, `[positions, rest]`. Rows of a grid may keep other columns each: then all have to lie in the same places, or
    nothing lies where it should (-1).
    """
    often = _often(labels, left, sizes)
    if int(often.max(initial=0)) > 1:
        asked = np.zeros(len(often), bool)
        asked[positions] = True
        return np.flatnonzero(np.repeat(asked, often.max(1)))
    places = (np.cumsum(often, 0) - 1)[positions]  # [asked, rows]
    stay = often[positions] > 0
    counts = stay.sum(0)
    listed = places.T[stay.T].reshape(often.shape[1], -1) if (counts == counts[0]).all() else None
    return listed[0] if listed is not None and (listed == listed[0]).all() else np.array([-1])


def _often(labels: np.ndarray, left: int, sizes: "Sizes") -> np.ndarray:
    """How often each position of an axis is there, of which `left` are left; `[positions, 1]`, or `[positions, rows]`
    where rows keep others each."""
    often = sizes.times[labels].astype(np.int64)
    together = often.max(1, keepdims=True)
    if int(together.sum()) == left:
        return together
    found: np.ndarray = np.unique(often[:, often.any(0)], axis=1)
    return found if found.size else together


def numbers(record: Record, sizes: "Sizes") -> list[tuple[int, int]]:
    """Numbers of padded, skipped and picked positions that a call gives, each with what it becomes."""
    found = []
    for value, axis, positions in positions_of(record):
        labels = along(value, axis)
        if labels is None or not positions.size:
            continue
        often = _often(labels, sizes.of(value)[axis], sizes)[:, 0]
        stays = np.concatenate([[0], np.cumsum(often)])  # what becomes of the first n
        first, end = int(positions[0]), int(positions[-1]) + 1
        found += [(first, int(stays[first])), (end, int(stays[end])), (end - first, int(stays[end] - stays[first]))]
        found.append((len(labels) - end, int(stays[-1] - stays[end])))
    return [(old, new) for old, new in found if old]


def misplaced(was: Record, now: Record, sizes: "Sizes") -> bool:
    """Whether the call of the cut model picks or fills other positions than those that stay of the traced one's."""
    before, after = positions_of(was), positions_of(now)
    for (value, axis, positions), (_, _, found) in zip(before, after, strict=False):
        labels = along(value, axis)
        if labels is not None and not np.array_equal(moved(labels, positions, sizes, sizes.of(value)[axis]), found):
            return True
    return len(before) != len(after)


def positions_of(record: Record) -> list[tuple[Value, int, np.ndarray]]:
    """Tensor, axis and positions that a call of movement names by number."""
    if record.name == "constant_pad_nd":
        return _padded(record)
    if record.name not in ("slice", "narrow", "select", "slice_scatter", "select_scatter"):
        return []
    source: Value = _argument(record, "self")
    axis = int(_argument(record, "dim")) % len(source.shape)
    every = np.arange(source.shape[axis])
    if record.name.startswith("select"):
        picked = every[[int(_argument(record, "index"))]]
    elif record.name == "narrow":
        start = int(_argument(record, "start"))
        picked = every[start:][: int(_argument(record, "length"))]
    else:
        picked = every[_argument(record, "start") : _argument(record, "end") : _argument(record, "step")]
    return [(source, axis, picked)]


def _padded(record: Record) -> list[tuple[Value, int, np.ndarray]]:
    """Positions of the result that are not padding, and positions of the source that padding by less than nothing
    leaves."""
    source, result, amounts = _argument(record, "self"), record.outputs[0], list(_argument(record, "pad"))
    found = []
    for i in range(0, len(amounts), 2):
        axis, (front, back) = len(source.shape) - 1 - i // 2, amounts[i : i + 2]
        size, padded = source.shape[axis], result.shape[axis]
        found.append((result, axis, np.arange(max(front, 0), padded - max(back, 0))))
        found.append((source, axis, np.arange(max(-front, 0), size - max(-back, 0))))
    return found


def _argument(record: Record, name: str) -> Any:
    return argument(record.func, record.args, record.kwargs, name)
