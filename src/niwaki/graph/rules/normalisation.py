"""Normalisation: tied to its parameters; inexact where the statistic runs across a labelled axis."""

from torch import Tensor

from niwaki.graph.labels import varying
from niwaki.graph.rules.movement import view
from niwaki.graph.rules.registry import Call, rule
from niwaki.graph.values import Labels, Parameter, Value, join

ROLES = {"weight": "scale", "bias": "shift", "running_mean": "stat", "running_var": "stat"}


def affine_zero(call: Call, axes: tuple[int, ...], fields: Labels) -> bool:
    """Zero at removed units: with weight and bias zeroed, which lie along `axes`, anything becomes zero."""
    has_weight = isinstance(call["weight"], Tensor)
    bias = call["bias"] if call.has("bias") else None
    return (
        has_weight
        and (bias is None or isinstance(bias, Tensor))
        and all(set(varying(labels)) & set(axes) for labels in fields)
    )


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "batch_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "_batch_norm_impl_index",
    "miopen_batch_norm",
    "_native_batch_norm_legit_functional",
)
def batch_norm(call: Call) -> Labels:
    x = call.value(call["input"])
    axis = 1 if len(x.shape) > 1 else 0
    if channels_alone(call, x, axis):
        return x.fields
    operands = [(x.shape, x.get(call.space), x.why)]
    for name, role in ROLES.items():
        tensor = call[name] if call.has(name) else None
        if isinstance(tensor, Tensor):
            value = call.value(tensor)
            for labels in value.get(call.space):
                call.space.role(labels, role)
            shape = tuple(n if a == axis else 1 for a, n in enumerate(x.shape))
            fields = tuple(f.reshape(shape) for f in value.get(call.space) if f.size > 1)
            operands.append((shape, fields, value.why))
    fields = join(call.space, operands, x.shape)
    fresh = any(bool(call[name]) for name in ("training", "train") if call.has(name))
    call.zero = affine_zero(call, (axis,), fields) or (fresh and x.zero and not isinstance(call["bias"], Tensor))
    if fresh:  # the statistic is that of what comes in, of a computed kernel for one
        for labels in fields:
            across = tuple(a for a in varying(labels) if a != axis)
            if across:
                call.space.mark_inexact(labels, across, "batch norm takes its statistic across it")
    return fields


def channels_alone(call: Call, x: Value, axis: int) -> bool:
    """The usual case, sooner done: an activation with labels along its channels alone meets parameters, one by one.

    False, and nothing done, where it is another one.
    """
    space = call.space
    if x.parameter is not None or len(x.fields) != 1 or varying(x.fields[0]) != (axis,) or space.any_free:
        return False
    met: list[tuple[Parameter, str]] = []
    for name, role in ROLES.items():
        tensor = call[name] if call.has(name) else None
        if isinstance(tensor, Tensor):
            parameter = call.value(tensor).parameter
            if parameter is None or parameter.shape != x.shape[axis : axis + 1] or parameter.blocks.get(0, 1) > 1:
                return False
            met.append((parameter, role))
    before = space.count
    for parameter, role in met:
        if 0 not in parameter.seeds:
            parameter.axis(space, 0)
        space.role(parameter.seeds[0], role)
    channels = x.fields[0].ravel()
    for parameter, _ in met:
        space.unite_new(channels, parameter.seeds[0], before)
    call.zero = affine_zero(call, (axis,), x.fields)
    if not call.zero and x.zero and not isinstance(call["bias"], Tensor):
        call.zero = any(bool(call[name]) for name in ("training", "train") if call.has(name))
    return True


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(call: Call) -> Labels:
    x = call.value(call["input"])
    size = len(call["normalized_shape"])
    across = tuple(range(len(x.shape) - size, len(x.shape)))
    operands = [(x.shape, x.get(call.space), x.why)]
    for name in ("weight", "bias"):
        tensor = call[name] if call.has(name) else None
        if isinstance(tensor, Tensor):
            value = call.value(tensor)
            for labels in value.get(call.space):
                call.space.role(labels, ROLES[name])
            operands.append((value.shape, value.get(call.space), value.why))
    fields = join(call.space, operands, x.shape)
    for labels in fields:
        axes = tuple(axis for axis in varying(labels) if axis in across)
        if axes:
            call.space.mark_inexact(labels, axes, f"{call.name.replace('native_', '')} takes its statistic across it")
    call.zero = affine_zero(call, across, fields)
    return fields


@rule("native_group_norm", "group_norm")
def group_norm(call: Call) -> Labels:
    """Channels are a grid of norm groups x channels: whole groups leave exactly, channels change the statistic."""
    x = call.value(call["input"])
    groups = int(call["group"] if call.has("group") else call["num_groups"])
    c = x.shape[1]
    operands = [(x.shape, x.get(call.space), x.why)]
    for name in ("weight", "bias"):
        tensor = call[name]
        if isinstance(tensor, Tensor):
            value = call.value(tensor)
            for labels in value.get(call.space):
                call.space.role(labels, ROLES[name])
            shape = tuple(n if a == 1 else 1 for a, n in enumerate(x.shape))
            operands.append((shape, tuple(f.reshape(shape) for f in value.get(call.space) if f.size > 1), value.why))
    fields = join(call.space, operands, x.shape)
    inner = (x.shape[0], groups, c // groups, *x.shape[2:])
    for labels in fields:
        grid = view(call, labels, x.shape, inner)
        if len(varying(grid)) > len(varying(labels)):
            call.space.grid(grid)
        axes = tuple(axis for axis in varying(grid) if axis >= 2)
        if axes:
            call.space.mark_inexact(grid, axes, "group norm takes its statistic across it")
    call.zero = affine_zero(call, (1,), fields)
    return fields


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(call: Call) -> list[Labels]:
    """`g * v / |v|`, the norm taken over all axes but one."""
    v, g = call.value(call["v"]), call.value(call["g"])
    axis = int(call["dim"]) % len(v.shape)
    fields = v.get(call.space)
    for labels in fields:
        if varying(labels) == (axis,):
            call.space.role(labels, "direction")  # its length cancels, so zeroing it says nothing: g does
    ends = join(call.space, [(v.shape, fields, v.why), (g.shape, g.get(call.space), g.why)], v.shape)
    call.zero = v.zero
    inner = tuple(f for f in ends if varying(f) == (axis,))
    return [ends, inner]
