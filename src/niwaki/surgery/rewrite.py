"""Size constants of an exported graph, corrected where the labels prove them wrong."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from niwaki.graph.values import Value
from niwaki.surgery.evidence import Sizes
from niwaki.surgery.places import along, moved


class Refused(Exception):
    """A constant that depends on a width and has no rule here."""


Seen = dict[str, Any]
Handler = Callable[[fx.Node, Seen, Sizes], None]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(function: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = function
        return function

    return register


def rewrite(graph: fx.Graph, seen: Seen, sizes: Sizes) -> None:
    """Correct every call in place. Raises Refused where a size changes that no rule here can set."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        handler = HANDLERS.get(node.target.overloadpacket.__name__)
        if handler is not None:
            handler(node, seen, sizes)
    graph.lint()


def arguments(node: fx.Node) -> list[str]:
    return [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]


def get(node: fx.Node, name: str, default: Any = None) -> Any:
    at = arguments(node).index(name)
    if at < len(node.args):
        return node.args[at]
    return node.kwargs.get(name, default)


def put(node: fx.Node, name: str, value: Any) -> None:
    at = arguments(node).index(name)
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)


def source_of(node: fx.Node, seen: Seen) -> Value:
    """What is known of a call's first argument."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    found: Value = seen[first.name]
    return found


def changed(value: Value, sizes: Sizes) -> dict[int, tuple[int, int]]:
    """Axes whose size changes: axis -> (old, new)."""
    after = sizes.of(value)
    return {axis: (old, new) for axis, (old, new) in enumerate(zip(value.shape, after, strict=True)) if old != new}


@handles(
    "view",
    "reshape",
    "_unsafe_view",
    "expand",
    "view_copy",
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "expand_copy",
    "rand",
    "randn",
)
def sized(node: fx.Node, seen: Seen, sizes: Sizes) -> None:
    """The result's sizes are an argument."""
    name = "size" if "size" in arguments(node) else "shape"
    listed = list(get(node, name))
    for axis, (old, new) in changed(seen[node.name], sizes).items():
        given = listed[axis]
        if isinstance(given, fx.Node):  # a number computed from the batch: it keeps its proportion
            with node.graph.inserting_before(node):
                listed[axis] = node.graph.call_function(
                    operator.floordiv, (node.graph.call_function(operator.mul, (given, new)), old)
                )
        elif given != -1:
            if given != old:
                raise Refused(f"{node.name}: size {given} where {old} was traced")
            listed[axis] = new
    put(node, name, listed)


@handles("unflatten")
def unflatten(node: fx.Node, seen: Seen, sizes: Sizes) -> None:
    result: Value = seen[node.name]
    axis = get(node, "dim") % len(source_of(node, seen).shape)  # type: ignore[union-attr]
    listed = list(get(node, "sizes"))
    for at, (old, new) in changed(result, sizes).items():
        if axis <= at < axis + len(listed) and listed[at - axis] == old:
            listed[at - axis] = new
    put(node, "sizes", listed)


@handles(
    "split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes", "tensor_split"
)
def split(node: fx.Node, seen: Seen, sizes: Sizes) -> None:
    parts: list[Value] = list(seen[node.name])
    axis = get(node, "dim", 0) % len(parts[0].shape)
    if not any(axis in changed(part, sizes) for part in parts):
        return
    after = [sizes.of(part)[axis] for part in parts]
    node.target = torch.ops.aten.split_with_sizes.default
    node.args = (node.args[0], after, axis)
    node.kwargs = {}


def kept_before(labels: np.ndarray, position: int, sizes: Sizes) -> int:
    """How many of the first `position` positions stay."""
    return int(sizes.stays[labels[:position]].any(1).sum())


@handles("slice", "narrow")
def slice_(node: fx.Node, seen: Seen, sizes: Sizes) -> None:
    source: Value = source_of(node, seen)
    axis = get(node, "dim", 0) % len(source.shape)
    if axis not in changed(source, sizes):
        return
    labels = along(source, axis)
    assert labels is not None
    size = source.shape[axis]
    if node.target.overloadpacket.__name__ == "narrow":  # type: ignore[union-attr]
        start, length = int(get(node, "start")), int(get(node, "length"))
        put(node, "start", kept_before(labels, start, sizes))
        put(node, "length", kept_before(labels, start + length, sizes) - kept_before(labels, start, sizes))
        return
    start, end, step = get(node, "start"), get(node, "end"), get(node, "step", 1)
    if step != 1:
        places = moved(
            labels, np.arange(size)[start:end:step], sizes, sizes.of(source)[axis]
        )  # evenly again, or no slice has them
        gaps = np.unique(np.diff(places))
        if not places.size or places[0] < 0 or gaps.size > 1:
            raise Refused(f"{node.name}: a strided slice of an axis that is cut unevenly")
        for name, number in (("start", places[0]), ("end", places[-1] + 1), ("step", gaps[0] if gaps.size else 1)):
            put(node, name, int(number))
        return
    if isinstance(start, int):
        put(node, "start", kept_before(labels, start + size if start < 0 else min(start, size), sizes))
    if isinstance(end, int) and end < size:
        put(node, "end", kept_before(labels, end + size if end < 0 else end, sizes))


@handles("select")
def select(node: fx.Node, seen: Seen, sizes: Sizes) -> None:
    source: Value = source_of(node, seen)
    axis = get(node, "dim", 0) % len(source.shape)
    if axis in changed(source, sizes):
        labels = along(source, axis)
        assert labels is not None
        index = int(get(node, "index")) % source.shape[axis]
        put(node, "index", kept_before(labels, index, sizes))


@handles("pad", "constant_pad_nd")
def pad(node: fx.Node, seen: Seen, sizes: Sizes) -> None:
    result: Value = seen[node.name]
    amounts = list(get(node, "pad"))
    for i in range(0, len(amounts), 2):
        axis = len(result.shape) - 1 - i // 2
        before, after = amounts[i], amounts[i + 1]
        labels = along(result, axis)
        if (before or after) and labels is not None and axis in changed(result, sizes):
            if not isinstance(before, int) or not isinstance(after, int) or before < 0 or after < 0:
                raise Refused(f"{node.name}: padding of an axis that is cut")
            size = result.shape[axis]
            amounts[i] = kept_before(labels, before, sizes)
            amounts[i + 1] = kept_before(labels, size, sizes) - kept_before(labels, size - after, sizes)
    put(node, "pad", amounts)


@handles("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(node: fx.Node, seen: Seen, sizes: Sizes) -> None:
    groups = get(node, "groups", 1)
    if groups > 1:
        source: Value = source_of(node, seen)
        labels = along(source, 1)
        if labels is not None:
            flat = sizes.stays[labels].any(1).reshape(groups, -1)
            put(node, "groups", int(flat.any(1).sum()))


@handles("group_norm", "native_group_norm")
def group_norm(node: fx.Node, seen: Seen, sizes: Sizes) -> None:
    source: Value = source_of(node, seen)
    name = "num_groups" if "num_groups" in arguments(node) else "group"
    groups = get(node, name)
    labels = along(source, 1)
    if labels is not None:
        put(node, name, int(sizes.stays[labels].any(1).reshape(groups, -1).any(1).sum()))
        if name == "group":
            put(node, "C", sizes.of(source)[1])


@handles("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def layer_norm(node: fx.Node, seen: Seen, sizes: Sizes) -> None:
    source: Value = source_of(node, seen)
    listed = list(get(node, "normalized_shape"))
    put(node, "normalized_shape", list(sizes.of(source)[len(source.shape) - len(listed) :]))


@handles("scaled_dot_product_attention")
def attention(node: fx.Node, seen: Seen, sizes: Sizes) -> None:
    query: Value = source_of(node, seen)
    width = query.shape[-1]
    if get(node, "scale") is None and sizes.of(query)[-1] != width:
        put(node, "scale", float(width) ** -0.5)


@handles("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(node: fx.Node, seen: Seen, sizes: Sizes) -> None:
    source: Value = source_of(node, seen)
    labels = along(source, 1)
    if labels is not None:
        groups = get(node, "groups")
        put(node, "groups", int(sizes.stays[labels].any(1).reshape(groups, -1).any(1).sum()))


@handles("repeat", "tile")
def repeat(node: fx.Node, seen: Seen, sizes: Sizes) -> None:
    """Copies of what is one position are as many as stay; copies of a whole axis stay as many as they are."""
    source, result = source_of(node, seen), seen[node.name]
    name = "repeats" if "repeats" in arguments(node) else "dims"
    listed = list(get(node, name))
    listed = [1] * (len(result.shape) - len(listed)) + listed  # `tile` may name the last axes only
    inner = (1,) * (len(result.shape) - len(source.shape)) + sizes.of(source)
    for axis, (_, new) in changed(result, sizes).items():
        if isinstance(listed[axis], fx.Node) or new % inner[axis]:
            raise Refused(f"{node.name}: copies along an axis that is cut")
        listed[axis] = new // inner[axis]
    put(node, name, listed)


@handles("roll", "index_select", "unfold", "as_strided", "index", "lstm", "gru", "rnn_tanh", "rnn_relu")
def kept_only(node: fx.Node, seen: Seen, sizes: Sizes) -> None:
    """These hold positions or states along an axis: fine while that axis stays."""
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return
    source: Value = source_of(node, seen)
    after = changed(source, sizes)
    if name == "roll":
        bad = [axis for axis in after if axis in [d % len(source.shape) for d in get(node, "dims", [])]]
    elif name == "index":
        picks = get(node, "indices")
        bad = [
            axis for axis in after if axis < len(picks) and picks[axis] is not None and not _table(picks[axis], sizes)
        ]
    elif name == "index_select":
        bad = [
            axis
            for axis in after
            if axis == get(node, "dim") % len(source.shape) and not _table(get(node, "index"), sizes)
        ]
    elif name == "unfold":
        bad = [axis for axis in after if axis == get(node, "dimension") % len(source.shape)]
    else:
        bad = list(after)
    if bad:
        raise Refused(f"{node.name}: {name} along an axis that is cut")


def _table(node: Any, sizes: Sizes) -> bool:
    """Whether an index is a registered buffer that the plan renumbers."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and node.target in sizes.tables
