"""The check on the spot: a cut model is traced again and held against the graph it was cut by.

Shapes alone do not show two heads mixed, or padding put in the wrong place. So labels run through the cut model too:
wherever two positions meet there, they must be the same unit as in the original, in the same row of the same grid.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from niwaki.graph import ChannelGraph
from niwaki.graph.groups import components, rows_of_grids
from niwaki.graph.labels import LabelSpace, varying
from niwaki.graph.recorder import Record, Recorder, find_rule, seed
from niwaki.graph.rules import convolution, spatial
from niwaki.graph.rules.registry import signature
from niwaki.graph.skeleton import copy_with, to_meta, without_hooks
from niwaki.graph.trace import note_constant, note_tables, quiet
from niwaki.graph.values import Parameter, Value
from niwaki.surgery.evidence import Sizes, stays_of
from niwaki.units import map_tensors, run, tensors_in

SCALARS = ("mul", "div", "mul_", "div_", "true_divide")
WINDOWED = (convolution.__name__, spatial.__name__)
ATTENTION = "_scaled_dot_product"


@dataclass(frozen=True, eq=False)
class Scale:
    """A factor that depended on a width: what `value` must be multiplied by to undo its change."""

    value: Value
    factor: float
    record: Record


@dataclass(frozen=True, eq=False)
class Retrace:
    """One forward of the cut model under the recorder."""

    records: list[Record]
    parameters: dict[str, Parameter]
    problem: str | None
    """Why the model is not the one the plan means, or None."""
    scales: tuple[Scale, ...] = ()
    where: str = ""
    """Module in which the forward failed."""


def retrace(
    small: nn.Module,
    graph: ChannelGraph,
    alive: np.ndarray,
    example: Any,
    *,
    meta: bool = True,
    sizes: Sizes | None = None,
) -> Retrace:
    """Run `small` on the graph's example and compare units, rows and shapes with the original's.

    `sizes` are those of the graph's values when only `alive` units stay, where somebody has them already.
    """
    pairs = []

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        copy = to_meta(tensor) if meta else tensor.detach().clone()
        pairs.append((tensor, copy))
        return copy

    skeleton = without_hooks(copy_with(small, stand_in)).eval()
    space = LabelSpace()
    recorder = Recorder(space, {id(m): name for name, m in reversed(list(skeleton.named_modules()))})
    parameters = seed(recorder, skeleton)
    for real, copy in pairs:
        note_constant(recorder, real, copy)
    note_tables(recorder, skeleton)
    inputs = map_tensors(example, lambda t: t.to("meta") if meta else t)
    for tensor in tensors_in(inputs):
        recorder.value(tensor).constant = None
    try:
        with quiet(skeleton), torch.no_grad(), recorder:
            output = run(skeleton, inputs)
    except Exception as error:
        where = recorder.stack[-1]
        told = f"forward fails in {where or 'the model'}: {type(error).__name__}: {str(error)[:200]}"
        return Retrace(recorder.records, parameters, told, where=where)
    shapes = tuple(tuple(t.shape) for t in tensors_in(output))
    if shapes != graph.outputs and (graph.device == "meta" or [*map(len, shapes)] != [*map(len, graph.outputs)]):
        return Retrace(recorder.records, parameters, f"outputs are {shapes}, not {graph.outputs}")
    sizes = sizes or Sizes(stays_of(graph, alive))
    problem = _calls(recorder.records, graph, sizes) or _compare(space, parameters, graph, alive)
    scales = () if problem else _scales(recorder.records, graph)
    return Retrace(recorder.records, parameters, problem, scales)


def by_module(listing: tuple[Record, ...] | list[Record]) -> dict[str, list[Record]]:
    table: dict[str, list[Record]] = {}
    for record in listing:
        table.setdefault(record.module, []).append(record)
    return table


def _calls(records: list[Record], graph: ChannelGraph, sizes: Sizes) -> str | None:
    """Where a module makes the calls it made: shapes must be the traced ones cut down, windows as they were."""
    before = by_module(graph.records)
    for module, made in by_module(records).items():
        old = before.get(module, [])
        if [record.name for record in old] != [record.name for record in made]:
            continue
        for was, now in zip(old, made, strict=True):
            if problem := differs(was, now, graph, sizes):
                return problem
    return None


def differs(was: Record, now: Record, graph: ChannelGraph, sizes: Sizes) -> str | None:
    """What a call of the cut model does otherwise than the traced one cut down, or None."""
    where = now.module or "the model"
    if was.name != now.name or len(was.outputs) != len(now.outputs):
        return f"{now.name} in {where} is called in place of {was.name}"
    for i, (value, small) in enumerate(zip(was.outputs, now.outputs, strict=True)):
        # what a call gives besides (saved statistics, indices of a maximum) carries no labels
        expected = sizes.of(value)
        told = _told(value, sizes) if graph.device != "meta" else None
        if told is None or len(small.shape) != len(expected):
            same = small.shape == expected
        else:
            same = all(small.shape[a] == expected[a] for a in told)
        if not same and (i == 0 or value.fields):
            return f"{now.name} in {where} gives {small.shape}, not {expected}"
    data_say = graph.device != "meta" and was.outputs and now.outputs[0].shape[2:] != was.outputs[0].shape[2:]
    if window(was) != window(now) and not data_say:  # a picture resized to the size of a box
        return f"{now.name} in {where} runs with {window(now)}, not {window(was)}"
    return None


def _told(value: Value, sizes: Sizes) -> list[int]:
    """Axes that the plan makes shorter. How long the others are, of a call on real tensors, may be for the data to say:
    so many boxes, times so many classes that all stay.
    """
    return [axis for labels in value.fields if not bool(sizes.stays[labels].all()) for axis in varying(labels)]


def window(record: Record) -> tuple[Any, ...] | None:
    """Strides, paddings and the like of a convolution, pooling or resizing: what no cut of channels may change."""
    rule = find_rule(record.func, record.name)
    if rule is None or rule.__module__ not in WINDOWED:
        return None
    return tuple(
        item
        for name, item in zip(signature(record.func), record.args, strict=False)
        if not isinstance(item, Value) and name != "groups"
    )


def _compare(space: LabelSpace, parameters: dict[str, Parameter], graph: ChannelGraph, alive: np.ndarray) -> str | None:
    padded = np.append(alive, True)
    labels, units, lone = [], [], []
    for axis in graph.axes:
        parameter = parameters.get(axis.tensor)
        kept = axis.units[padded[axis.units]]
        if kept.size == 1 or (kept.size and parameter is None):  # what a left-out block tied need not hang together
            lone.append(kept[kept >= 0])
        if parameter is None or axis.axis not in parameter.seeds:
            continue
        seeds = parameter.seeds[axis.axis]
        if kept.size != seeds.size:
            return f"axis {axis.axis} of {axis.tensor} has {seeds.size} positions, the plan keeps {kept.size}"
        labels.append(seeds)
        units.append(kept)
    if not labels:
        return None
    label, unit = np.concatenate(labels), np.concatenate(units)
    rows_of_grids(space)
    component = components(space.count, space.strict)
    # what a column joins may meet directly once a single row is left, and what a row joins once a single column is
    means = np.where(graph.units.in_column[unit], graph.units.column[unit] + graph.units.count, unit)
    wrong = _mixed(component[label], means)
    if wrong is not None:
        wrong = _scattered(component[label], means, unit, graph)
    if wrong is not None:
        return (
            f"positions of different units meet (unit {unit[wrong]} of {_tensor_at(graph, parameters, label[wrong])})"
        )
    slabs = space.slabs["row"]
    rows = components(space.count, [*space.strict, *slabs]) if slabs else component
    old = graph.units.row[unit]
    inside = np.flatnonzero(graph.units.in_row[unit] & ~graph.units.row_frozen[unit])
    # a grid with a single row left is no grid any more: what was its row axis may meet anything
    grid = graph.units.classes[unit[inside]].astype(np.int64)
    most = int(old.max(initial=0)) + 1
    pairs, pair = np.unique(grid * most + old[inside], return_inverse=True)
    several = (np.bincount(pairs // most, minlength=int(grid.max(initial=0)) + 1) > 1)[grid]
    inside, pair = inside[several], pair[several]
    wrong = _mixed(rows[label[inside]], old[inside])
    if wrong is None:  # rows must not fall apart either, as far as can be seen: an axis of one position ties nothing
        seen = np.ones(int(graph.units.row.max(initial=0)) + 1, bool)
        seen[graph.units.row[np.concatenate([np.zeros(0, np.int32), *lone])]] = False
        together = np.flatnonzero(seen[old[inside]])
        wrong = _mixed(pair[together], rows[label[inside[together]]])
        wrong = None if wrong is None else int(together[wrong])
    if wrong is not None:
        return f"rows of a grid are mixed or split ({_tensor_at(graph, parameters, label[inside][wrong])})"
    return None


def _scattered(component: np.ndarray, means: np.ndarray, unit: np.ndarray, graph: ChannelGraph) -> int | None:
    """Where units meet that do not lie whole in that one place, or in no common grid, or None.

    In a row of a single column everything is one, and nothing of it is found elsewhere; of columns mixed up it is.
    """
    several = np.zeros(int(component.max()) + 1, bool)
    order = np.argsort(component, kind="stable")
    c, m = component[order], means[order]
    several[c[1:][(c[1:] == c[:-1]) & (m[1:] != m[:-1])]] = True
    met = np.flatnonzero(several[component])
    units = graph.units
    every = np.arange(units.count)
    tied = components(3 * units.count, [(every, units.count + units.row), (every, 2 * units.count + units.column)])
    wrong = _mixed(component[met], tied[unit[met]])
    if wrong is not None:
        return int(met[wrong])
    parts = np.flatnonzero(np.isin(unit, unit[met]))
    wrong = _mixed(unit[parts], component[parts])
    return None if wrong is None else int(parts[wrong])


def _mixed(key: np.ndarray, value: np.ndarray) -> int | None:
    """Where two different values share a key, or None."""
    first = np.zeros(int(key.max(initial=-1)) + 1, dtype=value.dtype)
    first[key[::-1]] = value[::-1]  # the first value of each key
    bad = np.flatnonzero(first[key] != value)
    return int(bad[0]) if bad.size else None


def _tensor_at(graph: ChannelGraph, parameters: dict[str, Parameter], label: int) -> str:
    for name, parameter in parameters.items():
        for axis, seeds in parameter.seeds.items():
            if seeds[0] <= label <= seeds[-1]:
                return f"axis {axis} of {name}"
    return "a tensor"


def _scales(records: list[Record], graph: ChannelGraph) -> tuple[Scale, ...]:
    """Factors that differ between the two forwards, call by call of each module."""

    def keyed(listing: tuple[Record, ...] | list[Record]) -> dict[tuple[str, str, int], Record]:
        seen: dict[tuple[str, str], int] = {}
        table = {}
        for record in listing:
            if record.name in SCALARS or record.name.startswith(ATTENTION):
                count = seen.get((record.module, record.name), 0)
                seen[record.module, record.name] = count + 1
                table[record.module, record.name, count] = record
        return table

    before, found = keyed(graph.records), []
    for key, record in keyed(records).items():
        old = before.get(key)
        if old is None:
            continue
        was, now = _factor(old), _factor(record)
        if was is not None and now is not None and was != now and now != 0:
            factor = was / now
            if record.name.startswith("div") or record.name == "true_divide":
                factor = now / was
            if abs(factor - 1) > 1e-12:
                found.append(Scale(record.args[0], factor, record))
    return tuple(found)


def _factor(record: Record) -> float | None:
    """The number a call multiplies or divides by, where it is one number."""
    if record.name.startswith(ATTENTION):
        given = record.kwargs.get("scale")
        width = record.args[0].shape[-1]
        return float(given) if given is not None else float(width) ** -0.5
    other = record.args[1]
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        return float(other)
    if isinstance(other, Value) and other.shape == () and other.constant is not None:
        return float(other.constant)
    return None
