"""Where channels can be mixed: what makes them, what bends them, and which layers read them. From the trace alone."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
from torch import Tensor

from niwaki.graph import ChannelGraph
from niwaki.graph.recorder import Record
from niwaki.graph.values import Value

LINEAR = re.compile(r"_?(adaptive_)?avg_pool\dd|mean|_?upsample_.*|constant_pad_nd|native_dropout|dropout")
"""Calls that a sum of channels goes through as each channel does."""
LARGEST = re.compile(r"(adaptive_)?max_pool\dd(_with_indices)?")
"""Calls for which that is an estimate."""
BY_ITSELF = re.compile(r"clone|contiguous|alias|detach|_to_copy|copy")


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm in front of the activation, at the channels of a path."""

    gamma: str | None
    beta: str | None
    mean: str
    variance: str
    eps: float
    positions: np.ndarray
    """Of each channel of the path in the norm's tensors; int `[channels]`."""


@dataclass(frozen=True, eq=False)
class Depthwise:
    """A filter for each channel between what makes the channels and what reads them."""

    weight: str
    bias: str | None
    positions: np.ndarray
    """Rows of the weight; int `[channels]`."""


@dataclass(frozen=True, eq=False)
class Path:
    """From some rows of a layer's weight to a layer that reads them."""

    members: np.ndarray
    """Which rows of the producer are read here; int `[channels]`."""
    norms: tuple[Norm, ...]
    """In front of the first activation, or of the depthwise filter."""
    bend: Record | None
    """The activation: a call of one tensor and numbers; None where there is none."""
    depthwise: Depthwise | None
    after: tuple[Norm, ...]
    """Norms behind the depthwise filter."""
    bend_after: Record | None
    reader: str
    """Weight of the layer that reads them."""
    rows: tuple[int, int]
    """Rows of the reader that read them: all, or those of one group of a grouped layer."""
    positions: np.ndarray
    """Where each channel lies along axis 1 of the reader; int `[channels, positions each]`."""
    inexact: tuple[str, ...] = ()
    """Calls on the way that do not treat a sum of channels as the channels."""


@dataclass(frozen=True, eq=False)
class Site:
    """A layer whose output channels can be taken over by one another."""

    weight: str
    bias: str | None
    units: np.ndarray
    """Unit of each row of the weight; int `[rows]`."""
    paths: tuple[Path, ...]
    reason: str | None = None
    """Why its channels can't be taken over by others, where they can't."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight in the order of the forward, with what it is."""

    weight: str
    bias: str | None
    depthwise: bool
    module: str
    axis: int = 0
    """Axis of the weight along which outputs lie: 1 of transposed convolutions, and of a bare `x @ w`."""


@dataclass(frozen=True, eq=False)
class _Flow:
    """Channels of a producer on their way."""

    producer: str
    norms: tuple[Norm, ...] = ()
    bend: Record | None = None
    depthwise: Depthwise | None = None
    after: tuple[Norm, ...] = ()
    bend_after: Record | None = None
    inexact: tuple[str, ...] = ()


@dataclass(eq=False)
class _Walk:
    graph: ChannelGraph
    axes: dict[tuple[str, int], Any] = field(default_factory=dict)
    flows: dict[int, tuple[_Flow, ...]] = field(default_factory=dict)
    weights: dict[int, tuple[str, bool]] = field(default_factory=dict)
    """Values that are a matrix turned or turned back: its name, and whether it is turned."""
    elsewhere: dict[str, str] = field(default_factory=dict)
    """Tensors that are read by more than layers and norms, and by what."""
    made: set[int] = field(default_factory=set)
    """Values that calls so far put out."""
    stale: dict[int, tuple[_Flow, ...]] = field(default_factory=dict)
    """Values somebody wrote to through another view of their memory, with the channels that may lie there."""
    biases: dict[str, str | None] = field(default_factory=dict)
    paths: dict[str, list[Path]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)

    def refuse(self, flows: tuple[_Flow, ...], reason: str) -> None:
        for flow in flows:
            self.reasons.setdefault(flow.producer, reason)


@final
@dataclass(frozen=True, eq=False)
class Structure:
    """What a walk through the calls of a traced model finds."""

    layers: tuple[Layer, ...]
    """Convolutions and linear layers in the order in which the forward calls them, each once."""
    sites: tuple[Site, ...]
    """The same without depthwise ones, each with its readers or the reason why it has none."""


def structure_of(graph: ChannelGraph) -> Structure:
    """Every convolution and linear layer of a traced model, in the order of the forward.

    A site without a `reason` has all its channels read by layers along paths on which they can be mixed. Structure
    comes from the calls: names of layers and classes of modules do not count.

    Source: Bai et al. 2023, arXiv:2308.07209 (which channels can be repaired there is not published; the rules for
    residual sums, concatenations, depthwise filters and several readers are niwaki's own).
    """
    walk = _walked(graph)
    found = []
    for layer in walk.layers:
        if layer.depthwise:
            continue
        units = walk.axes[layer.weight, 0].units if (layer.weight, 0) in walk.axes else np.zeros(0, np.int32)
        paths = tuple(walk.paths.get(layer.weight, ()))
        reason = walk.reasons.get(layer.weight) or _unfit(walk, layer, units, paths)
        found.append(Site(layer.weight, layer.bias, units, paths, reason))
    return Structure(tuple(walk.layers), tuple(found))


def _walked(graph: ChannelGraph) -> _Walk:
    walk = _Walk(graph, {(axis.tensor, axis.axis): axis for axis in graph.axes})
    for record in graph.records:
        _step(walk, record)
    return walk


def _step(walk: _Walk, record: Record) -> None:
    """What one call does to the channels on their way."""
    for value in record.inputs:
        if id(value) in walk.stale:
            told = f"{record.name} in {_where(record)} reads them after a part of them was written over"
            walk.refuse(walk.stale[id(value)], told)
    flows = [(value, walk.flows[id(value)]) for value in record.inputs if walk.flows.get(id(value))]
    every = tuple(flow for _, each in flows for flow in each)
    filled = record.name == "constant_pad_nd" and len(record.args) > 2 and record.args[2] != 0
    if filled or LARGEST.fullmatch(record.name):
        every = tuple(replace(flow, inexact=(*flow.inexact, record.name)) for flow in every)
    weight = _weight(walk, record)
    _note_uses(walk, record, layer=weight is not None)
    if weight is not None:
        _layer(walk, record, *weight)
    elif not flows:
        if (turned := _turned(walk, record)) is not None:
            walk.weights[id(record.outputs[0])] = turned
    elif "batch_norm" in record.name:
        walk.flows[id(record.outputs[0])] = tuple(_normed(walk, record, every))
    elif record.moves or BY_ITSELF.fullmatch(record.name):
        for value in record.outputs:
            walk.flows[id(value)] = _here(walk, value, every)
    elif LINEAR.fullmatch(record.name) or LARGEST.fullmatch(record.name):
        kept = _here(walk, record.outputs[0], every)
        walk.refuse(tuple(f for f in every if f not in kept), f"{record.name} in {_where(record)} joins them")
        walk.flows[id(record.outputs[0])] = kept
    elif record.kind.endswith("pointwise") and len(record.inputs) == 1 and isinstance(record.args[0], Value):
        walk.flows[id(record.outputs[0])] = tuple(_bent(walk, record, every))
    else:
        walk.refuse(every, f"{record.name} in {_where(record)} reads them")
        for value in record.outputs:
            walk.flows.pop(id(value), None)
    for value in record.outputs:
        if any(value is given for given in record.inputs):  # written in place
            for view in value.family or ():
                if view is not value and id(view) in walk.made:  # a view made later sees what was written
                    walk.stale[id(view)] = (*walk.flows.get(id(view), ()), *walk.flows.get(id(value), ()), *every)
    walk.made.update(map(id, record.outputs))


def _turned(walk: _Walk, record: Record) -> tuple[str, bool] | None:
    """Of a call that turns a matrix: the name of the matrix, and whether it is turned now."""
    source = record.inputs[0] if record.inputs else None
    if source is None or not record.moves or len(source.shape) != 2 or not record.outputs:
        return None
    name, turned = (source.parameter.name, False) if source.parameter else walk.weights.get(id(source), (None, False))
    if name is None or record.name not in ("t", "transpose", "permute"):
        return None
    if record.name == "transpose" and record.args[1] % 2 == record.args[2] % 2:
        return name, turned
    if record.name == "permute" and record.args[1][0] % 2 == 0:
        return name, turned
    return name, not turned


def _note_uses(walk: _Walk, record: Record, *, layer: bool) -> None:
    """Remember tensors that a call reads in any way but as a layer, a norm or a turned matrix does."""
    if layer or _turned(walk, record) is not None:
        return
    known = list(record.args[1:5]) if "batch_norm" in record.name else []
    for value in record.inputs:
        if not any(value is one for one in known):
            name = value.parameter.name if value.parameter else walk.weights.get(id(value), (None,))[0]
            if name is not None:
                walk.elsewhere.setdefault(name, f"{record.name} in {_where(record)}")


def _weight(walk: _Walk, record: Record) -> tuple[Value, str, str | None, int] | None:
    """Of a call of a layer: what it reads, the name of its weight and of its bias, the axis of its outputs."""
    places = {"convolution": (0, 1, 2), "_convolution": (0, 1, 2), "addmm": (1, 2, 0), "mm": (0, 1, None)}
    if record.name not in places:
        return None
    data, weight, bias = (None if at is None else record.args[at] for at in places[record.name])
    if not isinstance(weight, Value):
        return None
    name, turned = (weight.parameter.name, False) if weight.parameter else walk.weights.get(id(weight), (None, False))
    convolves = "convolution" in record.name
    if name is None or (convolves and turned) or not isinstance(data, Value) or data.parameter is not None:
        return None
    known = bias.parameter.name if isinstance(bias, Value) and bias.parameter is not None else None
    if bias is not None and known is None:
        return None
    return data, name, known, int(bool(record.args[6]) if convolves else not turned)


def _layer(walk: _Walk, record: Record, data: Value, weight: str, bias: str | None, axis: int) -> None:
    flows = walk.flows.get(id(data), ())
    shape = walk.graph.shapes[weight]
    convolves = "convolution" in record.name
    groups = int(record.args[8]) if convolves else 1
    depthwise = convolves and groups == shape[0] and shape[1] == 1 and groups > 1 and axis == 0
    again = weight in walk.biases
    walk.biases[weight] = bias
    if again:
        walk.reasons.setdefault(weight, "it is called more than once")
        told = f"{weight} reads them and is called more than once"
        walk.refuse(flows, told)
        for producer, paths in walk.paths.items():
            if any(path.reader == weight for path in paths):
                walk.reasons.setdefault(producer, told)
        return
    walk.layers.append(Layer(weight, bias, depthwise, record.module, axis))
    if axis:
        what = "a transposed convolution" if convolves else "a product with a matrix of [inputs, outputs]"
        walk.reasons.setdefault(weight, what)
        walk.refuse(flows, f"{what} in {_where(record)} reads them")
        return
    if not depthwise:
        for flow in flows:
            _read(walk, record, flow, weight, groups, len([f for f in flows if f.producer == flow.producer]))
        walk.flows[id(record.outputs[0])] = (_Flow(weight),)
        return
    onward = []
    for flow in flows:
        positions = _positions(walk, flow.producer, (weight, 0))
        if flow.depthwise is not None or positions is None or positions[1].shape[1] != 1:
            walk.refuse((flow,), f"{weight} filters them once more")
            continue
        onward.append(replace(flow, depthwise=Depthwise(weight, bias, _scattered(walk, flow.producer, positions))))
    walk.flows[id(record.outputs[0])] = tuple(onward)


def _read(walk: _Walk, record: Record, flow: _Flow, weight: str, groups: int, times: int) -> None:
    if times > 1:
        walk.refuse((flow,), f"{weight} reads them twice")
        return
    found = _positions(walk, flow.producer, (weight, 1))
    if found is None:
        walk.refuse((flow,), f"{weight} reads them in no order that the trace could follow")
        return
    members, positions = found
    if flow.depthwise is not None and bool((flow.depthwise.positions[members] < 0).any()):
        walk.refuse((flow,), f"{weight} reads more than {flow.depthwise.weight} filters")
        return
    rows, width = walk.graph.shapes[weight][0] // groups, walk.graph.shapes[weight][1]
    block = positions[:, 0] // width  # of a grouped layer, whose positions are listed group by group
    if bool((positions // width != block[:, None]).any()):
        walk.refuse((flow,), f"groups of {weight} share a channel")
        return
    for group in np.unique(block):
        own = block == group
        walk.paths.setdefault(flow.producer, []).append(
            Path(
                members=members[own],
                norms=tuple(_chosen(flow.norms, members[own])),
                bend=flow.bend,
                depthwise=_narrowed(flow.depthwise, members[own]),
                after=tuple(_chosen(flow.after, members[own])),
                bend_after=flow.bend_after,
                reader=weight,
                rows=(int(group) * rows, (int(group) + 1) * rows),
                positions=positions[own] - int(group) * width,
                inexact=flow.inexact,
            )
        )


def _chosen(norms: tuple[Norm, ...], members: np.ndarray) -> Iterator[Norm]:
    for norm in norms:
        yield replace(norm, positions=norm.positions[members])


def _narrowed(depthwise: Depthwise | None, members: np.ndarray) -> Depthwise | None:
    return None if depthwise is None else replace(depthwise, positions=depthwise.positions[members])


def _positions(walk: _Walk, producer: str, axis: tuple[str, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows of the producer that lie along an axis, and where: `[channels]`, `[channels, positions each]`."""
    if (producer, 0) not in walk.axes or axis not in walk.axes:
        return None
    mine, there = walk.axes[producer, 0].units, walk.axes[axis].units
    order = np.argsort(there, kind="stable")
    first, end = (np.searchsorted(there[order], mine, side=side) for side in ("left", "right"))
    counts = end - first
    members = np.flatnonzero(counts)
    if not members.size or np.unique(counts[members]).size != 1 or np.unique(mine).size != mine.size:
        return None
    each = int(counts[members[0]])
    return members, order[first[members][:, None] + np.arange(each)]


def _scattered(walk: _Walk, producer: str, found: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Positions of all rows of the producer, -1 of those that are not there; int `[rows]`."""
    places = np.full(walk.axes[producer, 0].units.size, -1)
    places[found[0]] = found[1][:, 0]
    return places


def _normed(walk: _Walk, record: Record, flows: tuple[_Flow, ...]) -> Iterator[_Flow]:
    names = [
        value.parameter.name if isinstance(value, Value) and value.parameter else None for value in record.args[1:5]
    ]
    gamma, beta, mean, variance = names
    eps = next(a for a in reversed(record.args) if isinstance(a, float))
    for flow in flows:
        if any(isinstance(value, Value) and not value.parameter for value in record.args[1:5]):
            walk.refuse((flow,), f"the batch norm in {_where(record)} takes tensors that the model computes")
            continue
        if mean is None or variance is None:
            walk.refuse((flow,), f"the batch norm in {_where(record)} keeps no statistics")
            continue
        if (flow.bend if flow.depthwise is None else flow.bend_after) is not None:
            walk.refuse((flow,), f"a batch norm behind the activation, in {_where(record)}")
            continue
        found = _positions(walk, flow.producer, (mean, 0))
        if found is None or found[1].shape[1] != 1:
            walk.refuse(
                (flow,), f"the batch norm in {_where(record)} holds them in no order that the trace could follow"
            )
            continue
        norm = Norm(gamma, beta, mean, variance, eps, _scattered(walk, flow.producer, found))
        yield (
            replace(flow, norms=(*flow.norms, norm))
            if flow.depthwise is None
            else replace(flow, after=(*flow.after, norm))
        )


def _bent(walk: _Walk, record: Record, flows: tuple[_Flow, ...]) -> Iterator[_Flow]:
    for flow in flows:
        now = flow.bend if flow.depthwise is None else flow.bend_after
        if now is not None:
            walk.refuse((flow,), f"{record.name} in {_where(record)} bends them once more")
        elif flow.depthwise is None:
            yield replace(flow, bend=record)
        else:
            yield replace(flow, bend_after=record)


def _here(walk: _Walk, value: Value, flows: tuple[_Flow, ...]) -> tuple[_Flow, ...]:
    """Those whose channels are labelled in `value`."""
    present = np.zeros(walk.graph.units.count + 1, bool)
    for labels in value.fields:
        present[walk.graph.units.unit_of[labels]] = True
    present[-1] = False  # of no unit
    axes = ((flow, walk.axes.get((flow.producer, 0))) for flow in flows)
    return tuple(flow for flow, axis in axes if axis is not None and bool(present[axis.units].any()))


def _unfit(walk: _Walk, layer: Layer, units: np.ndarray, paths: tuple[Path, ...]) -> str | None:
    """Why the channels of a layer with these paths can't be taken over by others, or None."""
    graph = walk.graph
    if not units.size:
        return "it has one channel"
    mine = np.zeros(graph.units.count + 1, bool)
    mine[units] = True
    fixed = next((g.fixed for g in graph.groups if g.fixed is not None and bool(mine[g.ids].any())), None)
    if fixed is not None:
        return fixed
    if not paths:
        return "no layer reads them"
    if np.unique(units).size != units.size:
        return "several channels are one unit"
    seen = {layer.weight, layer.bias}
    for path in paths:
        seen |= {path.reader}
        for norm in (*path.norms, *path.after):
            seen |= {norm.gamma, norm.beta, norm.mean, norm.variance}
        if path.depthwise is not None:
            seen |= {path.depthwise.weight, path.depthwise.bias}
    for (tensor, _), axis in walk.axes.items():
        if tensor not in seen and bool(mine[axis.units].any()):
            return f"{tensor} shares them"
    for name in sorted(name for name in seen if name in walk.elsewhere):
        return f"{walk.elsewhere[name]} reads {name} besides"
    read = np.zeros(units.size, bool)
    for path in paths:
        read[path.members] = True
    return None if read.all() else "some of them are read by no layer"


def bend_of(record: Record | None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Name and function of an activation, which is "identity" where there is none."""
    if record is None:
        return "identity", lambda x: x
    name = record.name.removesuffix("_")
    if name == "hardtanh" and tuple(record.args[1:3]) == (0.0, 6.0):
        name = "relu6"
    rest, kwargs, func = record.args[1:], record.kwargs, record.func

    def bend(x: Tensor) -> Tensor:
        bent: Tensor = func(x.clone(), *rest, **kwargs)
        return bent

    return name, bend


def _where(record: Record) -> str:
    return record.module or "the model"
