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


def moved(labels: np.ndarray, positions: np.ndarray, sizes: "Sizes") -> np.ndarray:
    """Where those of the positions that stay lie after the cut; `labels` are those along the axis, `[size, rest]`."""
    often = sizes.times[labels].max(1)
    if int(often.max(initial=0)) > 1:
        asked = np.zeros(often.size, bool)
        asked[positions] = True
        return np.flatnonzero(np.repeat(asked, often))
    stays = often > 0
    places: np.ndarray = (np.cumsum(stays) - 1)[positions[stays[positions]]]
    return places


def numbers(record: Record, sizes: "Sizes") -> list[tuple[int, int]]:
    """Numbers of padded, skipped and picked positions that a call gives, each with what it becomes."""
    found = []
    for value, axis, positions in positions_of(record):
        labels = along(value, axis)
        if labels is None or not positions.size:
            continue
        stays = np.concatenate([[0], np.cumsum(sizes.times[labels].max(1))])  # what becomes of the first n
        first, end = int(positions[0]), int(positions[-1]) + 1
        found += [(first, int(stays[first])), (end, int(stays[end])), (end - first, int(stays[end] - stays[first]))]
        found.append((len(labels) - end, int(stays[-1] - stays[end])))
    return [(old, new) for old, new in found if old]


def misplaced(was: Record, now: Record, sizes: "Sizes") -> bool:
    """Whether the call of the cut model picks or fills other positions than those that stay of the traced one's."""
    before, after = positions_of(was), positions_of(now)
    for (value, axis, positions), (_, _, found) in zip(before, after, strict=False):
        labels = along(value, axis)
        if labels is not None and not np.array_equal(moved(labels, positions, sizes), found):
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
