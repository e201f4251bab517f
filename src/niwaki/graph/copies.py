"""How often each unit is there: not at all where it was cut, more than once where its group grew.

A new unit is a copy of one that there is: it lies wherever that one lies, right behind it, on every axis of every
tensor. So everything that is known of units that stay (their axes, ties, costs) is known of new ones, too.
"""

import numpy as np

from niwaki.errors import InputError
from niwaki.graph.trace import ChannelGraph
from niwaki.graph.values import Parameter, Value


def along(units: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions of an axis that make the new one, in its order, and the number of the copy that each is of.

    Positions of one unit that lie side by side (pixels of a channel that was flattened) are copied together, so that
    the copy lies behind the unit as a whole.

    Args:
        units: unit at each position, -1 for none; `[positions]`.
        times: how often each unit is there, and last a 1 for what is no unit; bool or int `[units + 1]`.

    Returns:
        Positions and copies (0 for what stays, 1 for its first copy); both int64 `[new positions]`.

    Examples:
        >>> along(np.array([0, 0, 1, 1, 2, 2]), np.array([1, 2, 0, 1]))
        (array([0, 1, 2, 3, 2, 3]), array([0, 0, 0, 0, 1, 1]))
    """
    often = times[units]
    if often.dtype == bool or often.max(initial=0) <= 1:
        found = np.flatnonzero(often)
        return found, np.zeros(found.size, np.int64)
    starts = np.flatnonzero(np.r_[True, units[1:] != units[:-1]])
    lengths = np.diff(np.append(starts, units.size))
    run = np.repeat(np.arange(starts.size), often[starts])  # every run as often as its unit
    first = np.concatenate([[0], np.cumsum(often[starts])[:-1]])
    copy = np.arange(run.size) - first[run]
    size = lengths[run]
    inside = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
    return np.repeat(starts[run], size) + inside, np.repeat(copy, size)


def growable(graph: ChannelGraph) -> np.ndarray:
    """Units of which copies may be made: free ones that lie in no grid, in no table of positions, and are not read by
    groups of a convolution (which would have another number of groups, not wider ones); bool `[units]`.
    """
    units = graph.units
    found = np.zeros(units.count, bool)
    for group in graph.groups:
        found[group.ids] = group.fixed is None and group.kind == "channels"
    found &= ~(units.in_row | units.in_column)
    for _, source, _ in graph.tables:
        found[source[source >= 0]] = False
    for axis in graph.axes:
        if axis.blocks > 1:
            found[axis.units[axis.units >= 0]] = False
    return found


def refuse_rigid(graph: ChannelGraph, times: np.ndarray) -> None:
    """Refuse copies of what lies in a grid, or is fixed.

    Raises:
        InputError: names the group and why.
    """
    if not (times.astype(np.int64) > 1).any():
        return
    bad = (times.astype(np.int64) > 1) & ~growable(graph)
    for group in graph.groups:
        if bad[group.ids].any():
            found = f"it is fixed: {group.fixed}" if group.fixed else "rows and columns of a grid do not grow"
            raise InputError(f"grow group {group.name}", found=found, do="leave it as wide as it is")


HEARD = "new units are read by more than weights that start at zero"


def heard(graph: ChannelGraph) -> np.ndarray:
    """Units of which a copy changes what the network computes, even where weights that read it are zero: they are
    summed, or multiplied with one another or with a weight that reads nothing else; bool `[units]`.
    """
    found = np.zeros(graph.units.count + 1, bool)
    reads = {(axis.tensor, axis.axis): axis.units for axis in graph.axes if axis.role == "in"}
    source: dict[int, Parameter] = {}
    for record in graph.records:
        weights = [p for value in record.inputs if (p := value.parameter or source.get(id(value))) is not None]
        if record.moves:
            source |= {id(value): weights[0] for value in record.outputs if len(weights) == len(record.inputs) == 1}
            continue
        before = np.max([_spread(graph, value) for value in record.inputs], axis=0, initial=0)
        after = np.max([_spread(graph, value) for value in record.outputs], axis=0, initial=0)
        gone = np.flatnonzero(before > after)
        for weight in weights:
            for axis in weight.seeds:
                gone = np.setdiff1d(gone, reads.get((weight.name, axis), gone[:0]))
        found[gone] = True
    return found[:-1]


def _spread(graph: ChannelGraph, value: Value) -> np.ndarray:
    """Along how many axes of a tensor each unit lies (two, where a square weight turns units into the same ones); int
    `[units]`.
    """
    found = np.zeros(graph.units.count, np.int64)
    for labels in (*value.fields, *(value.parameter.seeds.values() if value.parameter is not None else ())):
        units = np.unique(graph.units.unit_of[labels])
        found[units[units >= 0]] += 1
    return found
