"""The calls of a forward that take time, and the widths that their time depends on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np

from niwaki.graph.labels import varying
from niwaki.graph.recorder import Record
from niwaki.graph.rules.contraction import term
from niwaki.graph.trace import ChannelGraph
from niwaki.graph.values import Value

HEAVY = ("convolution", "linear", "product")
"""Kinds whose work is a product over a contracted axis."""
LINEAR = ("addmm", "mm", "linear")
PRODUCT = ("bmm", "baddbmm", "matmul")
FREE = ("empty", "zeros", "ones", "full", "arange", "scalar_tensor", "_local_scalar_dense", "detach", "lift_fresh")
ACTIVATIONS = ("relu", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "sigmoid", "tanh", "silu", "clamp")
"""Calls that runtimes compute in the layer before them."""
Units = tuple[np.ndarray, ...]


@final
@dataclass(frozen=True, eq=False)
class Layer:
    """One call that takes time."""

    kind: str
    """"convolution", "linear", "product", "copy", or the operator's name."""
    record: Record = field(repr=False)
    full: tuple[int, int]
    """Width that it puts out and width that it takes in, uncut; 1 where there is none. All but a convolution and a
    linear layer have one width, of as many positions as go with the units."""
    widths: tuple[Units, Units] = field(repr=False)
    """Arrays of units whose counts, multiplied, are those widths."""
    then: tuple[Record, ...] = field(default=(), repr=False)
    """Calls that a compiling runtime computes with it."""
    block: np.ndarray | None = field(default=None, repr=False)
    """Unit of the block that it is gone with."""

    @property
    def groups(self) -> int:
        """Of a convolution."""
        return int(self.record.args[8]) if self.kind == "convolution" else 1

    @property
    def key(self) -> str:
        """Layers of one key take the same time at the same widths."""
        shapes = [list(value.shape) for value in self.record.inputs]
        plain = [_plain(argument) for argument in self.record.args]
        then = [(record.name, [_plain(a) for a in record.args]) for record in self.then]
        return json.dumps([self.kind, self.record.name, shapes, plain, then], separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__


def layers_of(graph: ChannelGraph, *, fused: bool) -> tuple[Layer, ...]:
    """The layers of the traced forward in their order.

    With `fused`, as runtimes run them that compile: normalisation by constants and activations behind a convolution
    are part of it, and so is the sum that its result goes into.
    """
    found: list[Layer] = []
    maker: dict[int, int] = {}  # tensor -> layer that made it
    blocks = [(block.records, graph.group(name).ids) for name, block in graph.inside.items()]
    for at, record in enumerate(graph.records):
        name = record.name.removesuffix("_") if record.name != "_" else record.name
        if not record.outputs or name in FREE or not any(record.outputs[0].shape):
            continue
        before = [maker[id(value)] for value in record.inputs if id(value) in maker]
        kind = _kind(record, name)
        if kind is None:
            for value in record.outputs:
                if before:
                    maker[id(value)] = before[0]
            continue
        joins = [i for i in before if found[i].kind in ("convolution", "linear")]
        if fused and joins and _joins(name, found[joins[-1]].kind):
            place = joins[-1]
            if name in ACTIVATIONS:
                found[place] = replace(found[place], then=(*found[place].then, record))
        else:
            place = len(found)
            block = next((ids for records, ids in blocks if at in records), None)
            full, widths = _widths(graph, record, kind)
            found.append(Layer(kind, record, full, widths, block=block))
        for value in record.outputs:
            maker[id(value)] = place
    return tuple(found)


def _joins(name: str, kind: str) -> bool:
    if kind == "linear":
        return name == "relu"
    return name in (*ACTIVATIONS, "add", "native_batch_norm", "_native_batch_norm_legit_no_training", "batch_norm")


def _kind(record: Record, name: str) -> str | None:
    """The kind of layer that a call is, or None where it takes no time worth the name."""
    if name in ("convolution", "_convolution"):
        return "convolution"
    if name in LINEAR:
        return "linear"
    if name in PRODUCT:
        return "product"
    if not record.moves:
        return name
    made = record.outputs[0]
    return "copy" if made.memory is not None and made.memory.owner is made else None


def _widths(graph: ChannelGraph, record: Record, kind: str) -> tuple[tuple[int, int], tuple[Units, Units]]:
    """Widths uncut, and the units that they count."""
    out = record.outputs[0]
    tensors = [value for value in record.inputs if value.shape]
    if kind == "convolution" and int(record.args[8]) == 1:
        given, axes = tensors[0], (1, 1)
    elif kind == "linear":
        given = next(value for value in tensors[::-1][1:] if len(value.shape) > 1)
        axes = (len(out.shape) - 1, len(given.shape) - 1)
    else:
        widest = max(([*tensors, out] if kind != "convolution" else [out]), key=lambda value: _positions(value))
        units = _all_units(graph, widest)
        return (int(np.prod([u.size for u in units], dtype=np.int64)), 1), (units, ())
    mine, theirs = _along(graph, out, axes[0]), _along(graph, given, axes[1])
    return (out.shape[axes[0]], given.shape[axes[1]]), (mine, theirs)


def _positions(value: Value) -> int:
    return int(sum(np.prod(labels.shape, dtype=np.int64) for labels in value.fields))


def _all_units(graph: ChannelGraph, value: Value) -> Units:
    """Arrays of units whose counts, multiplied, are a tensor's labelled positions."""
    return tuple(graph.units.unit_of[factor[0]] for factor in term(value.shape, value.fields).factors)


def _along(graph: ChannelGraph, value: Value, axis: int) -> Units:
    """The units along one axis, as far as something is known of it; the width is a constant where not."""
    for labels in value.fields:
        if axis in varying(labels):
            corner = tuple(slice(None) if i == axis else 0 for i in range(labels.ndim))
            return (graph.units.unit_of[labels[corner]],)
    return (np.full(value.shape[axis], -1, dtype=np.int32),)


def shape_at(value: Value, share: float) -> tuple[int, ...]:
    """A tensor's shape when this share of its units stays: of rows, where they lie in a grid."""
    labelled = sorted({axis for labels in value.fields for axis in varying(labels)})
    shape: list[int] = list(value.shape)
    if labelled:
        shape[labelled[0]] = max(1, round(shape[labelled[0]] * share))
    return tuple(shape)


def kinds_of(layers: Sequence[Layer]) -> dict[str, int]:
    """How many layers there are of each kind."""
    found: dict[str, int] = {}
    for layer in layers:
        found[layer.kind] = found.get(layer.kind, 0) + 1
    return found
