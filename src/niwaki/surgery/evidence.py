"""What the trace says about sizes after a cut: the shape of every tensor, and which numbers of a module change."""

from functools import cache
from typing import Any

import numpy as np

from niwaki.graph import ChannelGraph
from niwaki.graph.labels import column_axis, varying
from niwaki.graph.recorder import Record
from niwaki.graph.values import Value
from niwaki.surgery.places import numbers

Changes = dict[str, dict[int, set[int]]]
"""Module path -> a number seen there -> what it becomes (itself included where it stays somewhere)."""


class Sizes:
    """Sizes of traced tensors when only some labels stay, or some are there more than once."""

    def __init__(self, times: np.ndarray, tables: frozenset[str] = frozenset()) -> None:
        self.tables = tables
        """Integer buffers that the plan renumbers."""
        self.times = times
        """How often each label is there; bool or int `[labels]`."""
        self.stays = times > 0
        """Whether each label stays; bool `[labels]`."""
        self.grows = bool((times > 1).any())
        """Whether any label is there more than once."""
        self._before = np.concatenate([[0], np.cumsum(times, dtype=np.int64)])
        """How many there are of the first n labels together; `[labels + 1]`."""
        self._known: dict[int, dict[int, int]] = {}
        self._shapes: dict[int, tuple[Value, tuple[int, ...]]] = {}

    def of(self, value: Value) -> tuple[int, ...]:
        """Shape of `value` after the cut."""
        known = self._shapes.get(id(value))
        if known is None:
            known = self._shapes[id(value)] = value, self._shape(value)
        return known[1]

    def _shape(self, value: Value) -> tuple[int, ...]:
        shape = list(value.shape)
        if value.parameter is not None:
            for axis, seeds in value.parameter.seeds.items():
                if value.parameter.blocks[axis] == 1:  # labels of an axis follow one another
                    first = int(seeds[0])
                    shape[axis] = int(self._before[first + seeds.size] - self._before[first])
                    continue
                keep = self.times[seeds].reshape(value.parameter.blocks[axis], -1).sum(1)
                shape[axis] = int(keep.max())
            return tuple(shape)
        for labels in value.fields:
            for axis, size in self.along(labels).items():
                shape[axis] = size
        return tuple(shape)

    def along(self, labels: np.ndarray) -> dict[int, int]:
        """How many positions stay along each axis on which `labels` vary."""
        key = id(labels)
        if key not in self._known:
            axes = varying(labels)
            keep = self.times[labels]
            if len(axes) == 1:
                self._known[key] = {axes[0]: int(keep.sum())}
            else:
                found = {}
                while len(varying(labels)) > 1:  # columns of every row, rows of every grid, grids of a stack
                    axis = column_axis(labels)
                    found[axis] = int((keep > 0).sum(axis).max())  # grids do not grow
                    keep = keep.max(axis, keepdims=True)
                    labels = np.take(labels, [0], axis=axis)
                found[varying(labels)[0]] = int(keep.sum())
                self._known[key] = found
        return self._known[key]

    def rows(self, labels: np.ndarray, groups: int, axis: int) -> int:
        """How many of `groups` runs along `axis` keep anything."""
        flat = np.moveaxis(self.times[labels], axis, 0).reshape(groups, -1)
        return int(flat.max(1).sum())


def stays_of(graph: ChannelGraph, alive: np.ndarray) -> np.ndarray:
    """Whether each label of the graph's trace stays, or how often it is there; labels of no unit stay."""
    return np.append(alive, True)[graph.units.unit_of]


def regular(graph: ChannelGraph, alive: np.ndarray) -> bool:
    """Whether the units that stay are what a plan may keep: no block left out, nothing fixed gone, slabs with what they
    span, and every block of an axis as wide as the others that stay."""
    units = graph.units
    if not all(alive[block.ids].all() for block in graph.blocks) or not alive[units.reason >= 0].all():
        return False
    slab, element = units.slabs
    spans, lives = np.zeros(units.count, bool), np.zeros(units.count, bool)
    spans[slab] = True
    lives[slab[alive[element]]] = True
    if (lives != alive)[spans].any():
        return False
    padded = np.append(alive, True)
    if not all(padded[source].all() for _, source, _ in graph.tables):
        return False
    for axis in graph.axes:
        if axis.blocks > 1:
            counts = padded[axis.units].reshape(axis.blocks, -1).sum(1)
            if (counts[counts > 0] != counts.max()).any():
                return False
    return True


def changes(graph: ChannelGraph, sizes: Sizes) -> Changes:
    """Numbers seen in each module and what they become."""
    found: Changes = {}
    told: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for record in graph.records:
        module = record.module
        table, mine = found.setdefault(module, {}), told.setdefault(module, set())
        for value in (*record.outputs, *record.inputs):
            mine.add((value.shape, sizes.of(value)))
        groups = group_count(record)
        if groups is not None:
            table.setdefault(groups[0], set()).add(groups_after(record, sizes))
        for old, new in numbers(record, sizes):
            table.setdefault(old, set()).add(new)
    for module, shapes in told.items():
        for old, new in {pair for before, after in shapes for pair in zip(before, after, strict=True)}:
            if old > 1:
                found[module].setdefault(old, set()).add(new)
    return found


def group_count(record: Record) -> tuple[int, int] | None:
    """Number of groups of a grouped call, and where it stands among the arguments."""
    for at in _group_places(record.func):
        if at < len(record.args) and isinstance(record.args[at], int) and record.args[at] > 1:
            return record.args[at], at
    return None


@cache
def _group_places(func: Any) -> tuple[int, ...]:
    """Where an operator takes a number of groups."""
    names = [argument.name for argument in func._schema.arguments]
    return tuple(names.index(name) for name in ("groups", "group", "num_groups") if name in names)


def groups_after(record: Record, sizes: Sizes) -> int:
    """The number of groups of a grouped call after the cut."""
    counted = group_count(record)
    assert counted is not None
    groups = counted[0]
    value = (
        next(v for v in record.inputs if v.parameter is None)
        if any(v.parameter is None for v in record.inputs)
        else record.inputs[0]
    )
    for labels in value.fields:
        if labels.ndim > 1 and labels.shape[1] > 1:
            return sizes.rows(labels, groups, 1)
    return groups


def failure(error: Exception, where: str) -> str:
    """What is said of a forward that fails in the module `where`."""
    return f"forward fails in {where or 'the model'}: {type(error).__name__}: {str(error)[:200]}"
