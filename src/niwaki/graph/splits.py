"""Groups of units that a forward splits off one axis in equal parts."""

import numpy as np

from niwaki.graph.labels import varying
from niwaki.graph.trace import ChannelGraph
from niwaki.graph.values import Value


def even_parts(graph: ChannelGraph) -> list[list[int]]:
    """Numbers of groups that lie side by side on axes that calls split in equal parts (`chunk`): a forward that asks
    for halves finds them only where all keep equally many. Groups that share a split, directly or through others, come
    together; each part is all of one plain group.
    """
    home = {group.ids.tobytes(): number for number, group in enumerate(graph.groups) if group.kind == "channels"}
    found: list[set[int]] = []
    for record in graph.records:
        if record.name not in ("split", "split_with_sizes", "unsafe_split", "chunk") or len(record.outputs) < 2:
            continue
        if len({value.shape for value in record.outputs}) > 1:
            continue
        whole = record.inputs[0]
        axes = [at for at, size in enumerate(record.outputs[0].shape) if size != whole.shape[at]]
        parts = [_units(graph, value, axes[0]) if axes else None for value in record.outputs]
        mine = {home.get(np.sort(part).astype(np.int32).tobytes(), -1) if part is not None else -1 for part in parts}
        if -1 in mine or len(mine) != len(parts):
            continue
        near = [other for other in found if other & mine]
        found = [other for other in found if not other & mine] + [mine.union(*near)]
    return [sorted(numbers) for numbers in found]


def _units(graph: ChannelGraph, value: Value, axis: int) -> np.ndarray | None:
    """The units along an axis, where it has one label each; int `[positions]`."""
    for labels in value.fields:
        if varying(labels) == (axis,) or list(varying(labels)) == [axis]:
            return np.asarray(graph.units.unit_of[labels].ravel())
    return None
