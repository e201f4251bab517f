"""What the recorder knows about a tensor: its labels per axis, and how its unlabelled axes came to be."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from niwaki.graph.labels import LabelSpace, varying

Labels = tuple[np.ndarray, ...]


@dataclass(eq=False)
class Parameter:
    """A parameter or buffer with its labels, made axis by axis when an operation first asks for them."""

    name: str
    shape: tuple[int, ...]
    buffer: bool
    itemsize: int = 4
    """Bytes of an element."""
    seeds: dict[int, np.ndarray] = field(default_factory=dict)
    """Labels per axis; with blocks, one per block and position."""
    blocks: dict[int, int] = field(default_factory=dict)
    """Axis -> number of blocks of axis 0 with their own labels (grouped convolutions)."""

    def axis(self, space: LabelSpace, axis: int, blocks: int = 1) -> np.ndarray:
        """Labels along `axis`, shaped to broadcast against the parameter."""
        size = self.shape[axis]
        if axis not in self.seeds:
            self.blocks[axis] = blocks
            self.seeds[axis] = space.new(blocks * size)
        seeds, count = self.seeds[axis], self.blocks[axis]
        shape = [1] * len(self.shape)
        shape[axis] = size
        if count == 1:
            return seeds.reshape(shape)
        shape[0] = self.shape[0]
        return np.repeat(seeds.reshape(count, size), self.shape[0] // count, axis=0).reshape(shape)


@dataclass(eq=False, slots=True)
class Memory:
    """What a call took for its result, until nothing needed it any more."""

    owner: "Value"
    """The tensor that it was taken for."""
    itemsize: int
    """Bytes of an element."""
    born: int
    """The number of the call."""
    died: int | None = None
    """How many calls were done when it was freed; None for what outlived the forward."""


@dataclass(eq=False, slots=True)
class Value:
    """A tensor during the trace."""

    shape: tuple[int, ...]
    fields: Labels = ()
    """Label arrays, each with the tensor's number of axes, of size 1 where the label does not vary."""
    why: str = "an axis that no parameter spans"
    """What an unlabelled axis is, for the reason given when a labelled axis meets it."""
    zero: bool = False
    """Whether elements of removed units are zero when the units' parameters are zeroed."""
    parameter: Parameter | None = None
    direct: bool = False
    """A parameter, or one that was only moved (transposed, sliced)."""
    constant: Tensor | None = None
    table: str | None = None
    """Name of the registered integer buffer this is."""
    """The value, where it is known (integer tables, positions)."""
    picked: Labels = ()
    """Labels of single positions that this was taken from, where it was only moved since."""
    family: "list[Value] | None" = None
    """Values that share this one's memory, itself included, where there are any others."""
    memory: "Memory | None" = None
    """Where it lies, if a call of this forward took that memory."""

    def shares(self, other: "Value") -> None:
        """This is a view of `other`."""
        if other.family is None:
            other.family = [other]
        self.family = other.family
        self.family.append(self)

    def written(self) -> None:
        """Somebody wrote to the memory: what was known of the numbers of its views holds no longer."""
        for value in self.family or ():
            if value is not self:
                value.constant = None
                value.zero = value.zero and self.zero

    def get(self, space: LabelSpace, axes: tuple[int, ...] | None = None) -> Labels:
        """Labels, of the given axes only where this is a parameter that has none yet."""
        if self.parameter is None:
            return self.fields
        wanted = range(len(self.shape)) if axes is None else axes
        return tuple(self.parameter.axis(space, axis) for axis in wanted if self.shape[axis] > 1)


def rigid_axes(shape: tuple[int, ...], fields: Labels) -> set[int]:
    """Axes of size above 1 that carry no label."""
    covered = {axis for labels in fields for axis in varying(labels)}
    return {axis for axis, size in enumerate(shape) if size > 1 and axis not in covered}


def pad_axes(labels: np.ndarray, ndim: int) -> np.ndarray:
    """Prepend axes of size 1, as broadcasting does."""
    return labels.reshape((1,) * (ndim - labels.ndim) + labels.shape)


def join(space: LabelSpace, operands: list[tuple[tuple[int, ...], Labels, str]], shape: tuple[int, ...]) -> Labels:
    """Labels of a result whose operands meet index by index: what meets is tied, what meets a bare axis is fixed.

    `operands` are (shape, labels, why) already in the result's coordinates up to broadcasting.
    """
    ndim = len(shape)
    lone = alike(operands, ndim)
    if lone is not None:
        kept = lone[:1]
        for array in lone[1:]:
            merge(space, kept, array)
        return tuple(kept)
    incoming: list[np.ndarray] = []
    bare: dict[int, str] = {}
    for size, labels, why in operands:
        size = (1,) * (ndim - len(size)) + tuple(size)
        padded = tuple(pad_axes(array, ndim) for array in labels)
        for axis in rigid_axes(size, padded):
            bare.setdefault(axis, why)
        incoming.extend(padded)
    kept = []
    for array in incoming:
        axes = varying(array)
        if not axes:
            continue
        stuck = tuple(axis for axis in axes if axis in bare)
        if stuck:
            space.fix(space.marker(array, stuck), f"meets {bare[stuck[0]]}")
            if len(stuck) == len(axes):
                continue
        merge(space, kept, array)
    return tuple(kept)


def alike(operands: list[tuple[tuple[int, ...], Labels, str]], ndim: int) -> list[np.ndarray] | None:
    """The labels of operands of full rank, each with labels along one axis alone, the same for all; else None."""
    axes, found = None, []
    for size, labels, _ in operands:
        if len(labels) != 1 or len(size) != ndim or labels[0].ndim != ndim:
            return None
        mine = varying(labels[0])
        if len(mine) != 1 or (axes is not None and mine != axes):
            return None
        axes = mine
        found.append(labels[0])
    return found or None


def covers(space: LabelSpace, labels: Labels, result: Labels) -> bool:
    """Whether an operand with these labels has some of its own wherever the result of a call has labels.

    An operand is zero where its own units are removed; where a unit of the others is, it holds what it held.
    """
    owned = [set(varying(mine)) for mine in labels if varying(mine) and not space.is_free(mine, zero=True)]
    ndim = max((array.ndim for array in result), default=0)
    shift = ndim - max((array.ndim for array in labels), default=ndim)
    owned = [{axis + shift for axis in axes} for axes in owned]
    return all(any(set(varying(theirs)) <= mine for mine in owned) for theirs in result if varying(theirs))


def merge(space: LabelSpace, kept: list[np.ndarray], labels: np.ndarray) -> None:
    """Add `labels` to the list of a value's labels, tying it to those that share an axis."""
    axes = set(varying(labels))
    for i, other in enumerate(kept):
        mine = set(varying(other))
        if not axes & mine:
            continue
        if axes == mine:
            space.unite(other, labels)
            if space.is_free(other):  # what it met is not free any more
                kept[i] = labels
            return
        if axes < mine:
            space.slab(labels, other)
            return
        if mine < axes:
            space.slab(other, labels)
            del kept[i]
            merge(space, kept, labels)
            return
        # two grids with common rows (keys and values of a head): the rows are the same, the columns their own
        shared = tuple(sorted(axes & mine))
        space.unite(space.marker(other, shared), space.marker(labels, shared))
    kept.append(labels)
