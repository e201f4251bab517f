"""The weights of a network one by one: what each costs, and which units lie along its axes."""

from dataclasses import dataclass
from typing import final

import numpy as np

from niwaki.graph.cost import macs_of
from niwaki.graph.trace import ChannelGraph

SUMS = ("add", "add_", "sub", "sub_")


@final
@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter that is a matrix or a kernel, uncut."""

    name: str
    shape: tuple[int, ...]
    params: int
    """Its elements."""
    macs: int
    """Multiply-adds of the calls that it is a factor of, on the example."""
    roles: tuple[str, ...]
    """What each labelled axis is: "out", "in" or "other"."""
    units: tuple[np.ndarray, ...]
    """Units along each labelled axis, -1 where nothing is known; int `[rows, positions]`, several rows where the
    axis holds others in each block of a grouped convolution."""


def weights_of(graph: ChannelGraph) -> tuple[Weight, ...]:
    """Every parameter with more than one axis, in the order in which the model lists them.

    Multiply-adds of a weight that is computed before it is used (normalised, say) count for none.
    """
    macs = _macs(graph)
    roles = {(axis.tensor, axis.axis): axis.role for axis in graph.axes}
    found = []
    for parameter in graph.parameters.values():
        name, shape = parameter.name, parameter.shape
        if parameter.buffer or len(shape) < 2 or (sum(n > 1 for n in shape) < 2 and name not in macs):
            continue
        blocked = next((axis for axis, count in parameter.blocks.items() if count > 1), None)
        units, kinds = [], []
        for axis, size in enumerate(shape):
            seeds = parameter.seeds.get(axis)
            if seeds is None or size == 1:
                continue
            rows = parameter.blocks[blocked] if blocked is not None and axis in (0, blocked) else 1
            units.append(graph.units.unit_of[seeds].reshape(rows, -1))
            role = roles.get((name, axis), "other")
            kinds.append(role if role in ("out", "in") else "other")
        elements = int(np.prod(shape, dtype=np.int64))
        found.append(Weight(name, shape, elements, macs.get(name, 0), tuple(kinds), tuple(units)))
    return tuple(found)


def _macs(graph: ChannelGraph) -> dict[str, int]:
    """Multiply-adds of the calls that each parameter is a factor of, as it is or only moved."""
    source: dict[int, str] = {}
    found: dict[str, int] = {}
    for record in graph.records:
        names = [value.parameter.name if value.parameter else source.get(id(value)) for value in record.inputs]
        if record.moves and names and names[0] is not None and record.inputs[0].direct:
            for value in record.outputs:
                source[id(value)] = names[0]
        used = [n for n in names if n is not None and len(graph.shapes[n]) > 1]
        if used and record.terms:
            found[used[0]] = found.get(used[0], 0) + macs_of(record.terms)
    return found


def streams(graph: ChannelGraph) -> np.ndarray:
    """Units along which a forward adds what it computed to something else that it computed; bool `[units]`."""
    found = np.zeros(graph.units.count + 1, bool)
    for record in graph.records:
        made = [value for value in record.inputs if value.parameter is None and value.fields]
        if record.name in SUMS and len(made) > 1:
            for labels in record.outputs[0].fields:
                found[graph.units.unit_of[labels]] = True
    return found[:-1]
