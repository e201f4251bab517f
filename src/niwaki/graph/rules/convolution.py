"""Convolutions of any rank: plain, grouped, depthwise, transposed."""

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from niwaki.graph.cost import Term
from niwaki.graph.labels import varying
from niwaki.graph.rules.contraction import NOT_ZERO
from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.values import Labels, Value, join


def channel_labels(call: Call, value: Value, axis: int, what: str) -> np.ndarray | None:
    """Labels of `value` along the channel axis as a flat array; those that run along space are tied."""
    parameter = value.parameter
    if parameter is not None:
        if value.shape[axis] == 1:
            return None
        if axis not in parameter.seeds:
            parameter.axis(call.space, axis)
        if parameter.blocks[axis] == 1:
            return parameter.seeds[axis]
    elif len(value.fields) == 1 and varying(value.fields[0]) == (axis,):
        return value.fields[0].ravel()
    found = None
    for labels in value.get(call.space, (axis,)) if parameter is not None else value.fields:
        for other in varying(labels):
            if other != axis and other != 0:
                call.space.tie(labels, other)
        if labels.shape[axis] == 1:
            if varying(labels) and varying(labels) != (0,):
                call.fix(labels, f"runs along {what}")
            continue
        if 0 in varying(labels) and axis != 0:
            call.fix(labels, "runs along the batch")
        flat = np.moveaxis(labels, axis, 0).reshape(value.shape[axis], -1)[:, 0]
        if found is None:
            found = flat
        else:
            call.space.unite(found, flat)
    return found


@rule(
    "convolution",
    "_convolution",
    "cudnn_convolution",
    "cudnn_convolution_transpose",
    "mkldnn_convolution",
    "convolution_overrideable",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "miopen_convolution",
    "miopen_depthwise_convolution",
    "_conv_depthwise2d",
    "conv_depthwise3d",
    "slow_conv3d",
    "thnn_conv2d",
    "slow_conv_dilated2d",
    "_slow_conv2d_forward",
    "mps_convolution",
)
def convolution(call: Call) -> Labels:
    if call.name == "convolution" and len(call.args) == 9:
        given, weight, bias, *_, transposed, _, groups = call.args
        x, w = call.value(given), call.value(weight)
    else:
        x, w = call.value(call["input" if call.has("input") else "self"]), call.value(call["weight"])
        bias = call["bias"] if call.has("bias") else None
        groups = int(call["groups"]) if call.has("groups") else 1
        transposed = bool(call["transposed"]) if call.has("transposed") else "transpose" in call.name
    if call.name == "_conv_depthwise2d":
        groups = x.shape[1]
    rank = len(w.shape) - 2
    batched = len(x.shape) == rank + 2
    c_axis = 1 if batched else 0
    in_axis, out_axis = (0, 1) if transposed else (1, 0)
    c_in, c_out = x.shape[c_axis], call.shape[c_axis]
    if w.parameter is None:
        w = without_taps(call, w)
    x, passing = beside(call, x, w, c_axis)
    spatial = list(call.shape[c_axis + 1 :] if not transposed else x.shape[c_axis + 1 :])
    for labels in passing:
        for axis in varying(labels):
            spatial[axis - c_axis - 1] = 1
    counted = [labels.reshape(1, -1) for labels in passing]
    constant = prod(spatial) * prod(w.shape[2:]) * (call.shape[0] if batched else 1)

    inputs = channel_labels(call, x, c_axis, "space")
    if inputs is not None and not (x.zero or w.zero):
        call.space.mark_inexact(inputs, (0,), NOT_ZERO)
    if groups == 1:
        before = call.space.count
        weight_in, weight_out = axis_labels(call, w, in_axis), axis_labels(call, w, out_axis)
        if weight_in is not None:
            if inputs is None:
                call.fix(weight_in, f"meets {x.why}")
            else:
                call.space.unite_new(inputs, weight_in, before)
        elif inputs is not None:
            call.fix(inputs, "meets a kernel without labels")
        factors = [f.reshape(1, -1) for f in (inputs if weight_in is not None else None, weight_out) if f is not None]
        missing = (1 if inputs is not None and weight_in is not None else c_in) * (
            1 if weight_out is not None else c_out
        )
        call.terms.append(Term(constant * missing, (*factors, *counted)))
        out = weight_out
    else:
        out = grouped(call, w, inputs, groups, transposed, c_in, c_out, constant, x.why)
        call.terms[-1] = Term(call.terms[-1].constant, (*call.terms[-1].factors, *counted))
    shape = [1] * len(call.shape)
    shape[c_axis] = c_out
    result: Labels = () if out is None else (out.reshape(shape),)
    call.zero = w.zero and (x.zero or not passing)
    if w.direct:
        for axis, role in ((in_axis, "in"), (out_axis, "out")):
            seeds = w.parameter.seeds.get(axis) if w.parameter is not None else None
            if seeds is not None:
                call.space.role(seeds, role)
    if bias is not None:
        value = call.value(bias)
        call.zero = call.zero and value.zero and not passing
        fields = tuple(f.reshape(shape) for f in value.get(call.space) if f.size > 1)
        for labels_of_bias in fields:
            call.space.role(labels_of_bias, "out")
        if c_out > 1:
            result = join(call.space, [(tuple(shape), result, w.why), (tuple(shape), fields, value.why)], tuple(shape))
    return (*result, *passing)


def beside(call: Call, x: Value, w: Value, c_axis: int) -> tuple[Value, Labels]:
    """Labels along spatial axes on which the kernel has one tap and moves by one: they pass. The input without them."""
    if not any(axes and axes[0] > c_axis for axes in map(varying, x.fields)):
        return x, ()
    rank = len(w.shape) - 2

    def each(name: str, usual: int) -> list[int]:
        given = call[name] if call.has(name) else usual
        listed = [given] if isinstance(given, int) else given if isinstance(given, (list, tuple)) else [-1]
        return [int(n) for n in listed] * (rank if len(listed) == 1 else 1)

    settings = zip(w.shape[2:], each("stride", 1), each("padding", 0), each("output_padding", 0), strict=True)
    alone = {c_axis + 1 + i for i, setting in enumerate(settings) if setting == (1, 1, 0, 0)}
    passing = tuple(labels for labels in x.fields if varying(labels) and set(varying(labels)) <= alone)
    if not passing:
        return x, ()
    return replace(x, fields=tuple(f for f in x.fields if not any(f is other for other in passing))), passing


def without_taps(call: Call, weight: Value) -> Value:
    """A computed kernel without labels on its spatial axes: the taps of a channel are one with it."""
    kept = []
    for labels in weight.fields:
        taps = tuple(axis for axis in varying(labels) if axis >= 2)
        if taps == varying(labels) and taps:
            call.fix(labels, "positions in a kernel")
            continue
        for axis in taps:
            call.space.tie(labels, axis)
            labels = np.take(labels, [0], axis=axis)
        kept.append(labels)
    return replace(weight, fields=tuple(kept))


def axis_labels(call: Call, weight: Value, axis: int) -> np.ndarray | None:
    return channel_labels(call, weight_view(call, weight, axis), axis, "a kernel")


def weight_view(call: Call, weight: Value, axis: int) -> Value:
    """The weight with only the labels of one axis (a computed weight keeps a grid's others as slabs)."""
    if weight.parameter is not None:
        return weight
    picked: list[np.ndarray] = []
    for labels in weight.fields:
        if labels.shape[axis] > 1:
            picked.append(call.space.marker(labels, (axis,)))
    return Value(weight.shape, tuple(picked), why=weight.why)


def grouped(
    call: Call,
    w: Value,
    inputs: np.ndarray | None,
    groups: int,
    transposed: bool,
    c_in: int,
    c_out: int,
    constant: int,
    why: str,
) -> np.ndarray | None:
    """Channels as a grid of groups x channels per group; rows of the input's and the output's grid go together."""
    space = call.space
    per_in, per_out = c_in // groups, c_out // groups
    if inputs is None:
        inputs = space.new(c_in)
        space.fix(inputs, f"meets {why}")
    if transposed:  # weight [c_in, c_out / groups, ...]
        rows = axis_labels(call, w, 0)
        space.unite(inputs, rows) if rows is not None else None
        out = block_labels(call, w, 1, groups, per_out)
    else:  # weight [c_out, c_in / groups, ...]
        own = axis_labels(call, w, 0)
        out = (own if own is not None else space.new(c_out)).reshape(groups, per_out)
        if per_in > 1:
            space.unite(inputs.reshape(groups, per_in), block_labels(call, w, 1, groups, per_in))
    grid_in = inputs.reshape(groups, per_in)
    if per_in == 1:
        # depthwise: each input channel and its outputs are one
        space.unite(np.broadcast_to(grid_in, out.shape), out)
        call.terms.append(Term(constant, (out.reshape(1, -1),)))
    elif per_out == 1:
        space.unite(np.broadcast_to(out, grid_in.shape), grid_in)
        call.terms.append(Term(constant, (grid_in.reshape(1, -1),)))
    else:
        space.grid(grid_in, inner=1)
        space.grid(out, inner=1)
        space.unite(space.marker(grid_in, (0,), inner=1), space.marker(out, (0,), inner=1))
        call.terms.append(Term(constant, (grid_in, out)))
    return out.reshape(-1)


def block_labels(call: Call, w: Value, axis: int, groups: int, size: int) -> np.ndarray:
    """Labels `[groups, size]` of a weight axis that counts channels within a group, per group where possible."""
    parameter: Any = w.parameter
    if (
        parameter is None
        or (axis in parameter.seeds and parameter.blocks[axis] != groups)
        or parameter.shape[0] % groups
    ):
        shared = axis_labels(call, w, axis)
        return np.broadcast_to(shared if shared is not None else call.space.new(size), (groups, size))
    if size == 1:
        return call.space.new(groups).reshape(groups, 1)
    parameter.axis(call.space, axis, groups)
    return parameter.seeds[axis].reshape(groups, size)
