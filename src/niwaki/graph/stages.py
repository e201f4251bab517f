"""The stages of a forward by the scale of what its batch norms put out, and the places that close them."""

import math
from dataclasses import dataclass
from typing import final

from niwaki.errors import InputError
from niwaki.graph.recorder import Record
from niwaki.graph.trace import ChannelGraph
from niwaki.units import tensors_in

WINDOWS = ("convolution", "pool")
"""What calls that slide a window are called."""
HALVED = 3
"""Positions of which a window with a stride of 2 makes one."""


@final
@dataclass(frozen=True)
class Stage:
    """A run of layers at one scale.

    `turn` counts changes of direction on the way: 0 while the scale gets coarser (a backbone), 1 while it gets finer
    again (the top-down half of a pyramid), 2 while it gets coarser once more (the bottom-up half), and so on.
    """

    turn: int
    stride: int
    """How many positions of the input one of its outputs stands for, along an axis; 1 where there are none."""
    scales: tuple[str, ...]
    """Names of the scales of its batch norms, in the order of the forward."""
    place: str | None
    """The outermost module whose output is the last that the stage puts out at its stride; None where no module does,
    or the output has a single position."""


def stages_of(graph: ChannelGraph) -> tuple[Stage, ...]:
    """The stages of the traced forward, in its order. Layers without batch norm belong to none; those on what a pooling
    of the whole map left (image pooling, squeeze) belong to the stage that they come behind.
    """
    norms = [(at, record) for at, record in enumerate(graph.records) if scale_name(record) is not None]
    reach, pooled = _reach(graph), _pooled(graph)
    found: list[tuple[int, int, int, list[str]]] = []  # turn, stride, the record it begins with, scales
    turn, seen = 0, set[str]()
    for at, record in norms:
        name, stride = scale_name(record), _stride(record.outputs[0].shape, reach)
        if stride is None or id(record.outputs[0]) in pooled:  # no scale of its own: goes with what was before
            stride = found[-1][1] if found else 1
        if found and stride != found[-1][1]:
            coarser = stride > found[-1][1]
            turn += coarser is (turn % 2 == 1)
            found.append((turn, stride, at, []))
        elif not found:
            found.append((turn, stride, at, []))
        if name is not None and name not in seen:  # a layer that is called again counts where it is called first
            seen.add(name)
            found[-1][3].append(name)
    begins = [at for _, _, at, _ in found]
    heavy = [at for at, record in enumerate(graph.records) if "convolution" in record.name]
    made = {id(value): at for at, record in enumerate(graph.records) for value in record.outputs}
    stages = []
    for (turn, stride, at, scales), end in zip(found, [*begins[1:], len(graph.records)], strict=True):
        closing: tuple[int, int, str] | None = None
        last = max(place for place, _ in norms if place < end)
        end = min([end, *(place for place in heavy if place > last)])  # a convolution without norm is an output
        for path, values in graph.features.items():
            value = values[0] if len(values) == 1 else None
            if not path or value is None or not at <= made.get(id(value), -1) < end:
                continue
            if _stride(value.shape, reach) == stride and len(value.shape) > 2 and math.prod(value.shape[2:]) > 1:
                closing = max(closing or (-1, 0, ""), (made[id(value)], -path.count("."), path))
        stages.append(Stage(turn, stride, tuple(scales), closing[2] if closing else None))
    return tuple(stage for stage in stages if stage.scales)


def stride_at(graph: ChannelGraph, path: str) -> int:
    """How many positions of the input one position of a module's output stands for, along an axis.

    Raises:
        InputError: the forward does not call it once, or its output has no positions.
    """
    values = graph.features.get(path, ())
    stride = _stride(values[0].shape, _reach(graph)) if len(values) == 1 and values[0] is not None else None
    if stride is None:
        found = f"{len(values)} calls of it, or an output without positions"
        raise InputError(f"scale of {path}", found=found, do="name a module that each forward calls once")
    return stride


def scale_name(record: Record) -> str | None:
    """The name of the scale of a call of batch norm; None for other calls, and where it has none."""
    if "batch_norm" not in record.name or len(record.args) < 2:
        return None
    parameter = getattr(record.args[1], "parameter", None)
    return None if parameter is None else str(parameter.name)


def _pooled(graph: ChannelGraph) -> set[int]:
    """Which values have a single position since something took the whole map together; by their id.

    A step that halves (windows over two or three positions) is one of scale; any other to one position is such a
    pooling, and what is made of its result alone has no scale either, until it meets a map again.
    """
    pooled = set[int]()
    for record in graph.records:
        given = [value for value in record.inputs if value.parameter is None and len(value.shape) > 1]
        widest = max((max(value.shape[2:], default=0) for value in given), default=0)
        halves = 1 < widest <= HALVED and any(word in record.name for word in WINDOWS) and "adaptive" not in record.name
        known = [value for value in given if len(value.shape) > 2 and id(value) not in pooled]
        for value in record.outputs:
            alone = len(value.shape) > 2 and math.prod(value.shape[2:]) == 1
            if alone and given and not halves and (widest > 1 or not known):
                pooled.add(id(value))
    return pooled


def _reach(graph: ChannelGraph) -> int:
    """The longest axis of positions of the input."""
    return max((max(t.shape[2:]) for t in tensors_in(graph.example) if t.dim() > 2), default=1)


def _stride(shape: tuple[int, ...], reach: int) -> int | None:
    """Of an output [batch, channels, ...]; None where it has no positions."""
    return max(1, round(reach / max(shape[2:]))) if len(shape) > 2 else None
