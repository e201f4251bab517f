"""Labels: one small integer for every index of every axis of every parameter, and what ties them together.

Three kinds of ties. *Strict*: both live or both die. *Row* and *column* ties join a slab with the elements it
spans, where an axis was viewed as a grid (heads x head size): the slab lives as long as one of its elements does.
Removing whole rows follows strict and row ties, removing columns follows strict and column ties.
"""

from bisect import bisect_right
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

Direction = Literal["row", "column", "outer"]


class Mark(NamedTuple):
    """A fact about labels, with its reason. For inexactness, `along` says which removals it concerns."""

    labels: np.ndarray
    reason: str
    along: frozenset[str]
    columns: int = 0
    """Length of a row of the grid the fact is about: shorter rows of another grid are parts of this one's rows."""


class LabelSpace:
    """Hands out labels and collects ties and marks as arrays; nothing is resolved until `groups` asks."""

    def __init__(self, start: int = 0) -> None:
        self.count = start
        self.strict: list[tuple[np.ndarray, np.ndarray]] = []
        self.slabs: dict[Direction, list[tuple[np.ndarray, np.ndarray]]] = {"row": [], "column": [], "outer": []}
        self.fixed: list[tuple[np.ndarray, str]] = []
        self.held: list[tuple[np.ndarray, str]] = []
        """Fixed as well, with reasons that say less: told where there is no other."""
        self.inexact: list[Mark] = []
        self.grids: list[np.ndarray] = []
        self.stacks: list[np.ndarray] = []
        self.multiples: list[tuple[np.ndarray, int]] = []
        self.needed: list[np.ndarray] = []
        """Labels of which some must stay, since a kernel takes no empty tensor."""
        self.roles: dict[int, str] = {}
        self._free: dict[int, tuple[int, bool]] = {}
        self._starts: list[int] = []
        self._met: dict[int, int] = {}
        """First labels of free positions -> those of others that they met, or a label that is not free."""
        self._markers: dict[tuple[int, tuple[int, ...]], tuple[np.ndarray, np.ndarray]] = {}

    def new(self, size: int) -> np.ndarray:
        """`size` fresh labels."""
        labels = np.arange(self.count, self.count + size, dtype=np.int32)
        self.count += size
        return labels

    def free(self, size: int, *, zero: bool = False) -> np.ndarray:
        """Fresh labels of positions that all hold the same value (`zero`: nothing): any number of them will do."""
        self._free[self.count] = self.count + size, zero
        self._starts.append(self.count)
        return self.new(size)

    @property
    def any_free(self) -> bool:
        """Whether there are free positions at all."""
        return bool(self._starts)

    def is_free(self, labels: np.ndarray, *, zero: bool = False) -> bool:
        """Whether any number of these positions will do: they all hold the same value, and met nothing that is not free
        (a view of the same memory may have). With `zero`, whether that same value was something else than nothing.
        """
        if not labels.size:
            return True
        if not self._starts:
            return False
        start = self._free_start(labels)
        if start is None:
            return False
        return not self._free[start][1] if zero else self._end(start) in self._free

    def loose(self) -> np.ndarray:
        """Whether any number of a label's positions will do, whatever is cut; bool `[labels]`."""
        found = np.zeros(self.count, bool)
        for start, (stop, _) in self._free.items():
            found[start:stop] = self._end(start) in self._free
        for labels, _ in (*self.fixed, *self.held):
            found[labels] = False
        return found

    def _free_start(self, labels: np.ndarray) -> int | None:
        """First label of the free positions that these are of."""
        least = int(labels.min())
        at = bisect_right(self._starts, least) - 1
        return self._starts[at] if at >= 0 and least < self._free[self._starts[at]][0] else None

    def _end(self, start: int) -> int:
        """The last that these positions met."""
        while start in self._met:
            start = self._met[start]
        return start

    def _meet(self, a: np.ndarray, b: np.ndarray) -> None:
        """Note that what was free is what it met."""
        starts = self._free_start(a), self._free_start(b)
        if starts == (None, None):
            return
        ends = [self._end(s) if s is not None else int(x.min()) for s, x in zip(starts, (a, b), strict=True)]
        if ends[0] != ends[1]:
            first = 0 if ends[0] in self._free else 1
            if ends[first] in self._free:
                self._met[ends[first]] = ends[1 - first]

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Strictly tie `a` and `b` element by element (broadcast against each other)."""
        if a is b:
            return
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        a, b = a.ravel(), b.ravel()
        if not a.size:
            return
        differ = a != b
        if not differ.all():
            if not differ.any():
                return
            a, b = a[differ], b[differ]
        if self._starts:
            self._meet(a, b)
        self.strict.append((a, b))

    def unite_new(self, a: np.ndarray, b: np.ndarray, before: int) -> None:
        """`unite` of flat arrays. Quicker where `b` are labels made one after the other since there were `before`, when
        those of `a` were there already.
        """
        if not self._starts and a.shape == b.shape and a.size and b.item(0) >= before:
            self.strict.append((a, b))
        else:
            self.unite(a, b)

    def tie(self, labels: np.ndarray, axis: int) -> None:
        """Strictly tie all labels along `axis`."""
        first = np.take(labels, [0], axis=axis)
        self.unite(np.broadcast_to(first, labels.shape), labels)

    def slab(self, small: np.ndarray, large: np.ndarray, inner: int | None = None) -> None:
        """Tie slabs to the elements they span: `small` broadcasts to `large`. `inner` is its column axis, if known."""
        axes = varying(small)
        direction: Direction = "column" if (column_axis(large) if inner is None else inner) in axes else "row"
        if direction == "row" and len(varying(large)) > 2 and row_axis(large) not in axes:
            direction = "outer"  # thirds of heads of channels: the thirds stay
        a, b = np.broadcast_arrays(small, large)
        self.slabs[direction].append((a.ravel(), b.ravel()))
        if direction == "column" and len(axes) > 1:  # a row of what was summed over the outer axis: it goes with all
            self.slabs["row"].append((a.ravel(), b.ravel()))

    def marker(self, labels: np.ndarray, axes: tuple[int, ...], inner: int | None = None) -> np.ndarray:
        """Labels for the slabs of `labels` along `axes` (shape 1 elsewhere); the same array gives the same slabs."""
        axes = tuple(axis for axis in axes if labels.shape[axis] > 1)
        if axes == varying(labels):
            return labels
        key = (id(labels), axes)
        if key not in self._markers:
            shape = [labels.shape[axis] if axis in axes else 1 for axis in range(labels.ndim)]
            rest = tuple(axis for axis in range(labels.ndim) if axis not in axes)
            rows = labels.transpose(axes + rest).reshape(int(np.prod(shape, dtype=np.int64)), -1)
            _, first, same = np.unique(rows[:, 0], return_index=True, return_inverse=True)
            if first.size < rows.shape[0] and bool((rows[first][same] == rows).all()):
                slabs = self.new(first.size)[same].reshape(shape)  # a slab that occurs twice (batch copies) is one slab
            else:
                slabs = self.new(rows.shape[0]).reshape(shape)
            self.slab(slabs, labels, inner)
            self._markers[key] = (slabs, labels)  # holding `labels` keeps its id from being used again
        return self._markers[key][0]

    def fix(self, labels: np.ndarray, reason: str) -> None:
        """These can't be removed."""
        self.fixed.append((labels.ravel(), reason))

    def multiple(self, labels: np.ndarray, count: int) -> None:
        """A multiple of `count` of these stay, or none: a kernel takes no other widths."""
        self.multiples.append((labels.ravel(), count))

    def mark_inexact(self, labels: np.ndarray, axes: tuple[int, ...], reason: str) -> None:
        """A value is computed across `axes` of `labels`: removing along them changes more than zeroing does."""
        others = [axis for axis in varying(labels) if axis not in axes]
        if not others:
            along = frozenset({"row", "column"})
        else:
            along = frozenset({"column" if column_axis(labels) in axes else "row"})
        length = 1
        for axis in axes:
            length *= labels.shape[axis]
        self.inexact.append(Mark(labels.ravel(), reason, along, length if others else 0))

    def role(self, labels: np.ndarray, role: str) -> None:
        """Note how a run of labels is used, under its first label; the first use counts."""
        self.roles.setdefault(int(labels.item(0)), role)

    def grid(self, labels: np.ndarray, inner: int | None = None) -> None:
        """An axis is viewed as this grid: what stays must be a grid again. Rows are all varying axes but the inner one,
        which is told from the labels where the caller does not know it."""
        if len(varying(labels)) > 1:
            column = column_axis(labels) if inner is None else inner
            self.grids.append(np.moveaxis(labels, column, -1).reshape(-1, labels.shape[column]))
            firsts = np.take(labels, [0], axis=column)
            while len(varying(firsts)) > 1:  # thirds of heads of channels: equally many heads stay in every third
                row = column_axis(firsts)
                self.stacks.append(np.moveaxis(firsts, row, -1).reshape(-1, labels.shape[row]))
                firsts = np.take(firsts, [0], axis=row)


def varying(labels: np.ndarray) -> tuple[int, ...]:
    """Axes along which the labels vary: those that are not of size 1."""
    return _long(labels.shape)


@lru_cache(maxsize=4096)
def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([axis for axis, size in enumerate(shape) if size > 1])


def column_axis(labels: np.ndarray) -> int:
    """The innermost axis of the grid: the one with the smallest step between neighbouring labels."""
    axes = varying(labels)
    if len(axes) == 1:
        return axes[0]
    steps = []
    corner = labels[(slice(0, 4),) * labels.ndim].astype(np.int64)  # more than one run: the first may be padding
    for axis in axes:
        delta = np.abs(np.diff(corner, axis=axis))
        delta = delta[delta > 0]
        steps.append(int(delta.min()) if delta.size else np.iinfo(np.int64).max)
    best = min(steps)
    return max(axis for axis, step in zip(axes, steps, strict=True) if step == best)


def row_axis(labels: np.ndarray) -> int:
    """The second innermost axis of a grid of three axes or more."""
    column = column_axis(labels)
    first = np.take(labels, [0], axis=column)
    return column_axis(first) if len(varying(first)) else column


def compress(labels: np.ndarray, axes: tuple[int, ...] | None = None) -> np.ndarray:
    """Bring axes along which nothing changes down to size 1."""
    for axis in axes if axes is not None else range(labels.ndim):
        size = labels.shape[axis]
        if size > 1:
            first = labels[(slice(None),) * axis + (slice(0, 1),)]
            second = labels[(slice(None),) * axis + (slice(1, 2),)]
            if np.array_equal(first, second) and bool((labels == first).all()):
                labels = first
    return labels
