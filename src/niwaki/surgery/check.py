"""The check on the spot: a cut model is traced again and held against the graph it was cut by.

Shapes alone do not show two heads mixed, or padding put in the wrong place. So labels run through the cut model too:
wherever two positions meet there, they must be the same unit as in the original, in the same row of the same grid.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from niwaki.graph import ChannelGraph
from niwaki.graph.copies import along
from niwaki.graph.ends import fix_outputs, seed
from niwaki.graph.groups import components, rows_of_grids, settle_outer
from niwaki.graph.labels import LabelSpace, varying
from niwaki.graph.recorder import UNREGISTERED, Record, Recorder
from niwaki.graph.rules import MOVEMENT, attention, contraction, convolution
from niwaki.graph.rules.registry import argument, signature
from niwaki.graph.running import quiet, watch
from niwaki.graph.skeleton import copy_with, readied, to_meta, walk
from niwaki.graph.trace import note_constant
from niwaki.graph.values import Parameter, Value
from niwaki.surgery.attention import CutMultiheadAttention
from niwaki.surgery.evidence import Sizes, failure, group_count, groups_after, stays_of
from niwaki.surgery.factors import WINDOWED, Pair, Scale, followed, scales_of
from niwaki.surgery.places import STAYING, misplaced
from niwaki.units import device_of, map_tensors, run, tensors_in

PRODUCTS = {
    **dict.fromkeys(("mul", "mm", "bmm", "mv", "dot"), ("product",)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), ("product", "add")),
}
"""Calls that products and sums are made of: which ones, sizes may say."""
PIECES = frozenset({"slice", "select", "narrow", "split", "split_with_sizes", "unsafe_split", "unbind"})
CONTRACTIONS = (contraction.__name__, convolution.__name__, attention.__name__)


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
    ran: frozenset[str] = frozenset()
    """Modules that were called until then."""
    agreed: int | None = None
    """Calls that are known to do what they did, where `records` holds none."""
    wrong: str | None = None
    """Then: the module of the first call that does not, where that is not the one in which the forward failed."""
    off: frozenset[str] = frozenset()
    """Then: modules that made such a call."""
    read: frozenset[tuple[str, str]] | None = None
    """Module paths and attributes: those of the open integers that may have had a part in it; None where all may."""


def example_of(graph: ChannelGraph, model: nn.Module) -> Any:
    """What the graph's forward ran on, for another run on the device of `model`."""
    if graph.device == "meta":
        return graph.example
    place = device_of(model)
    return map_tensors(graph.inputs, lambda tensor: tensor.to(place))


def retrace(
    small: nn.Module,
    graph: ChannelGraph,
    alive: np.ndarray,
    example: Any,
    *,
    meta: bool = True,
    sizes: Sizes | None = None,
    loose: Collection[str] = (),
) -> Retrace:
    """Run `small` on the graph's example and compare units, rows and shapes with the original's.

    `loose` names tensors that the original holds without registering them. `sizes` are those of the graph's values when
    only `alive` units stay, where somebody has them already.
    """
    pairs = []

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        copy = to_meta(tensor) if meta else tensor.detach().clone()
        pairs.append((tensor, copy))
        return copy

    skeleton = readied(copy_with(small, stand_in))
    space = LabelSpace()
    recorder = Recorder(space, walk(skeleton), heard=graph.heard)
    parameters = seed(recorder, skeleton)
    unregister(recorder, parameters, {name: skeleton.get_buffer(name) for name in loose})
    for real, copy in pairs:
        note_constant(recorder, real, copy)
    inputs = map_tensors(example, lambda t: t.to("meta") if meta else t.detach().clone())
    for tensor in tensors_in(inputs):
        recorder.value(tensor).constant = None
    try:
        with quiet(skeleton), torch.no_grad(), recorder, watch(recorder, meta=meta):
            output = run(skeleton, inputs)
    except Exception as error:
        where = recorder.where(error)
        return Retrace(recorder.records, parameters, failure(error, where), where=where, ran=frozenset(recorder.ran))
    shapes = tuple(tuple(t.shape) for t in tensors_in(output))
    if shapes != graph.outputs and (graph.device == "meta" or [*map(len, shapes)] != [*map(len, graph.outputs)]):
        return Retrace(recorder.records, parameters, f"outputs are {shapes}, not {graph.outputs}")
    fix_outputs(recorder, output)
    sizes = sizes or Sizes(stays_of(graph, alive))
    pairs_made = _pairs(recorder.records, graph)
    given = [recorder.value(tensor) for tensor in tensors_in(inputs)]
    problem: str | None = (
        _calls(pairs_made, graph, sizes)
        or _others(recorder.records, graph, sizes, small)
        or _compare(space, parameters, graph, alive, pairs_made)
        or _crossed(pairs_made, graph, given)
        or followed(pairs_made)
    )
    scales = () if problem else scales_of(recorder.records, graph, sizes)
    for scale in scales:
        if not isinstance(scale.value, Value):  # a number made of a width, and no tensor that weights lead to
            problem = f"{scale.record.name} in {scale.record.module or 'the model'} is of other numbers than it was"
    return Retrace(recorder.records, parameters, problem, scales)


def unregister(recorder: Recorder, parameters: dict[str, Parameter], held: Mapping[str, torch.Tensor]) -> None:
    """Tensors that the original holds without registering them: nothing of them is cut."""
    for name, tensor in held.items():
        if parameters.pop(name, None) is not None:
            recorder.know(tensor, Value(tuple(tensor.shape), why=UNREGISTERED))


def by_module(listing: tuple[Record, ...] | list[Record]) -> dict[str, list[Record]]:
    table: dict[str, list[Record]] = {}
    for record in listing:
        table.setdefault(record.module, []).append(record)
    return table


def _pairs(records: list[Record], graph: ChannelGraph) -> list[Pair]:
    """The calls of modules that make the calls they made.

    Slicing what is now all there is, or viewing what has the shape already, is no call any more: where movement alone
    differs, the other calls are paired.
    """

    before = by_module(graph.records)
    found: list[Pair] = []
    for module, made in by_module(records).items():
        old = before.get(module, [])
        whole = [record.name for record in old] == [record.name for record in made]
        if not whole:
            old, made = ([record for record in calls if not _moves(record)] for calls in (old, made))
            if [record.name for record in old] != [record.name for record in made]:
                continue
        found += [(was, now, whole) for was, now in zip(old, made, strict=True)]
    return found


def _others(records: list[Record], graph: ChannelGraph, sizes: Sizes, small: nn.Module) -> str | None:
    """A module that makes other calls than it made on pieces of what is cut: there may be fewer of them now, and other
    ones, and no shape of what is put together from them tells. An exported program has one module alone, and the
    attention that niwaki puts in place of torch's is not compared.
    """
    before, after = by_module(graph.records), by_module(records)
    if graph.device != "meta" or (after.keys() <= {""} and len(before) > 1):
        return None
    put = {name for name, module in small.named_modules() if isinstance(module, CutMultiheadAttention)}
    for module, made in after.items():
        old = before.get(module, []) if module not in put else made
        same = any(_said(old, sums=sums) == _said(made, sums=sums) for sums in (True, False))
        if not same and any(_takes_pieces(record, sizes) for record in old):
            return f"{module or 'the model'} makes other calls than it made, on pieces of what is cut"
    return None


def _takes_pieces(record: Record, sizes: Sizes) -> bool:
    """Whether a call takes a part of an axis that is cut."""
    if record.name not in PIECES:
        return False
    source, piece = record.inputs[0], record.outputs[0]
    axis = argument(record.func, record.args, record.kwargs, "dim") % len(source.shape)
    return piece.shape != source.shape and sizes.of(source)[axis] != source.shape[axis]


def _said(records: list[Record], *, sums: bool) -> list[str]:
    """Names of the calls in order, but for those that may be none, or others, where sizes are 1: movement, how products
    are taken, and, without `sums`, the sum of a single number.
    """
    names: list[str] = []
    for record in records:
        alone = record.name == "sum" and math.prod(record.inputs[0].shape) == math.prod(record.outputs[0].shape)
        if not record.moves and (sums or not alone):
            names += PRODUCTS.get(record.name, (record.name,))
    return names


def _moves(record: Record) -> bool:
    """Whether a call may be none any more, or one of several, once the model is cut."""
    return record.moves and record.name not in STAYING


def _calls(pairs: list[Pair], graph: ChannelGraph, sizes: Sizes) -> str | None:
    """Shapes must be the traced ones cut down, windows as they were."""
    for was, now, whole in pairs:
        if problem := differs(was, now, graph, sizes, whole=whole):
            return problem
    return None


def _places(pairs: list[Pair], known: np.ndarray, graph: ChannelGraph, times: np.ndarray) -> str | None:
    """Whether calls get the units they got: a slice of the right length may still be another one.

    `known` is the unit of every label of the cut model, that of its first copy with the number of units added (and so
    on), -1 where there is none or more than one.
    """
    count = graph.units.count
    seen: set[tuple[int, int]] = set()
    for was, now, _ in pairs:
        if now.kind in ("", *MOVEMENT, *CONTRACTIONS):  # what is contracted meets, and ties tell
            continue
        for value, small in zip(was.inputs, now.inputs, strict=False):
            if (id(value), id(small)) in seen or value.parameter is not None or len(value.shape) != len(small.shape):
                continue
            seen.add((id(value), id(small)))
            fields = {varying(labels): labels for labels in value.fields}
            taken = [labels.ravel() for labels in (*value.fields, *value.picked)]
            for labels in small.picked:  # what is a single position now may have been several
                unit = known[labels.ravel()[0]] if labels.size else -1
                if unit >= 0 and taken and not any((graph.units.unit_of[part] == unit % count).any() for part in taken):
                    return f"{now.name} in {now.module or 'the model'} picks another unit than it picked"
            for labels in small.fields:
                before = fields.get(varying(labels))
                if before is None:
                    continue
                units = graph.units.unit_of[before.ravel()]
                positions, copies = along(units, times)
                meant = np.where(units[positions] < 0, -1, units[positions] + count * copies)
                found = known[labels.ravel()]
                if meant.size == found.size and bool(((meant != found) & (meant >= 0) & (found >= 0)).any()):
                    return f"{now.name} in {now.module or 'the model'} gets other units than it got"
    return None


def differs(was: Record, now: Record, graph: ChannelGraph, sizes: Sizes, *, whole: bool = True) -> str | None:
    """What a call of the cut model does otherwise than the traced one cut down, or None."""
    where = now.module or "the model"
    if was.name != now.name or len(was.outputs) != len(now.outputs):
        return f"{now.name} in {where} is called in place of {was.name}"
    for i, (value, small) in enumerate(zip(was.outputs, now.outputs, strict=True)):
        # what a call gives besides (saved statistics, indices of a maximum) carries no labels
        expected = sizes.of(value)
        told = None if whole and graph.device == "meta" else _told(value, sizes)
        if told is None and any(bool(graph.loose[labels].any()) for labels in value.fields):
            told = [
                a for a in range(len(value.shape)) if not any(a in varying(f) for f in value.fields if _loose(f, graph))
            ]
        if told is None or len(small.shape) != len(expected):
            same = small.shape == expected
        else:
            same = all(small.shape[a] == expected[a] for a in told)
        if not same and (i == 0 or value.fields):
            return f"{now.name} in {where} gives {small.shape}, not {expected}"
    counted = group_count(was)
    if counted is not None and now.args[counted[1]] != (meant := groups_after(was, sizes)):
        return f"{now.name} in {where} runs with {now.args[counted[1]]} groups, not {meant}"
    if misplaced(was, now, sizes):
        return f"{now.name} in {where} picks or fills other places than it did"
    data_say = graph.device != "meta" and was.outputs and now.outputs[0].shape[2:] != was.outputs[0].shape[2:]
    if window(was) != window(now) and not data_say:  # a picture resized to the size of a box
        return f"{now.name} in {where} runs with {window(now)}, not {window(was)}"
    return None


def _crossed(pairs: list[Pair], graph: ChannelGraph, given: list[Value]) -> str | None:
    """Whether a call gets the result of another call, or another input of the model, than it got."""
    made: dict[int, Value] = {}
    for was, now, _ in pairs:
        made.update((id(a), b) for a, b in zip(was.outputs, now.outputs, strict=True))
    made.update((id(a), b) for a, b in zip(graph.given, given, strict=True))
    known = {id(value) for value in made.values()}
    for was, now, _ in pairs:
        for a, b in zip(was.inputs, now.inputs, strict=False):
            if id(b) in known and made.get(id(a), b) is not b:
                return f"{now.name} in {now.module or 'the model'} gets another tensor than it got"
    return None


def _loose(labels: np.ndarray, graph: ChannelGraph) -> bool:
    """Whether these are copies that nothing counts: as many as a forward makes."""
    return bool(graph.loose[labels].all())


def _told(value: Value, sizes: Sizes) -> list[int]:
    """Axes that the plan makes shorter. How long the others are, of a call on real tensors, may be for the data to say:
    so many boxes, times so many classes that all stay. Where movement differs, they may have followed a width (an
    index that was expanded).
    """
    return [axis for labels in value.fields if bool((sizes.times[labels] != 1).any()) for axis in varying(labels)]


def window(record: Record) -> tuple[Any, ...] | None:
    """Strides, paddings and the like of a convolution, pooling or resizing: what no cut of channels may change."""
    if record.kind not in WINDOWED:
        return None
    return tuple(
        item
        for name, item in zip(signature(record.func), record.args, strict=False)
        if not isinstance(item, Value) and name != "groups"
    )


def _compare(
    space: LabelSpace, parameters: dict[str, Parameter], graph: ChannelGraph, alive: np.ndarray, made: list[Pair]
) -> str | None:
    padded, count = np.append(alive, True), graph.units.count
    labels, units, numbers, lone = [], [], [], []
    for axis in graph.axes:
        parameter = parameters.get(axis.tensor)
        positions, copies = along(axis.units, padded)
        kept = axis.units[positions]
        if kept.size == 1 or (kept.size and parameter is None):  # what a left-out block tied need not hang together
            lone.append(kept[kept >= 0])
        if parameter is None or axis.axis not in parameter.seeds:
            continue
        seeds = parameter.seeds[axis.axis]
        if kept.size != seeds.size:
            return f"axis {axis.axis} of {axis.tensor} has {seeds.size} positions, the plan keeps {kept.size}"
        labels.append(seeds)
        units.append(kept)
        numbers.append(copies)
    if not labels:
        return None
    label, unit, copy = np.concatenate(labels), np.concatenate(units), np.concatenate(numbers)
    rows_of_grids(space)
    component = components(space.count, space.strict)
    # what a column joins may meet directly once a single row is left, and what a row joins once a single column is
    means = np.where(graph.units.in_column[unit], graph.units.column[unit] + count, unit) + 2 * count * copy
    wrong = _mixed(component[label], means)
    if wrong is not None:
        wrong = _scattered(component[label], means, unit, graph)
    if wrong is not None:
        return (
            f"positions of different units meet (unit {unit[wrong]} of {_tensor_at(graph, parameters, label[wrong])})"
        )
    row, outer = ([(component[a], component[b]) for a, b in space.slabs[kind]] for kind in ("row", "outer"))
    row, _ = settle_outer(row, outer, component.size)
    rows = components(component.size, row)[component] if row else component
    old = graph.units.row[unit]
    inside = np.flatnonzero(graph.units.in_row[unit] & ~graph.units.row_frozen[unit])
    # a grid with a single row left is no grid any more: what was its row axis may meet anything
    grid = graph.units.classes[unit[inside]].astype(np.int64)
    most = int(old.max(initial=0)) + 1
    pairs, pair = np.unique(grid * most + old[inside], return_inverse=True)
    several = (np.bincount(pairs // most, minlength=int(grid.max(initial=0)) + 1) > 1)[grid]
    inside, pair = inside[several], pair[several]
    wrong = _mixed(rows[label[inside]], old[inside])
    for alone in (lambda: lone, lambda: _lone(graph, alive)) if wrong is None else ():
        # rows must not fall apart either, as far as can be seen: an axis of one position ties nothing
        seen = np.ones(int(graph.units.row.max(initial=0)) + 1, bool)
        seen[graph.units.row[np.concatenate([np.zeros(0, np.int32), *alone()])]] = False
        together = np.flatnonzero(seen[old[inside]])
        apart = _mixed(pair[together], rows[label[inside[together]]])
        wrong = None if apart is None else int(together[apart])
        if wrong is None:
            break
    if wrong is not None:
        return f"rows of a grid are mixed or split ({_tensor_at(graph, parameters, label[inside][wrong])})"
    known = np.full(component.max(initial=0) + 1, -1, dtype=np.int64)
    known[component[label]] = unit + count * copy
    known[component[label[known[component[label]] != unit + count * copy]]] = -1
    held = np.zeros(known.size, bool)
    held[component[np.concatenate([np.zeros(0, np.int32), *(labels for labels, _ in space.fixed)])]] = True
    lost = np.flatnonzero(graph.held[unit] & ~held[component[label]])
    whole = all(
        alive[block.ids].all() for block in graph.blocks
    )  # what a block picks is not picked once it is left out
    if lost.size and whole:
        return f"what forward picks is not what it picked ({_tensor_at(graph, parameters, label[lost[0]])})"
    return _places(made, known[component], graph, padded)


def _lone(graph: ChannelGraph, alive: np.ndarray) -> list[np.ndarray]:
    """Units left alone on an axis of any tensor of the forward."""
    found = []
    for record in graph.records:
        for value in record.outputs:
            for labels in value.fields:
                units = np.unique(graph.units.unit_of[labels])
                kept = units[(units < 0) | (alive[units] > 0)]
                if kept.size == 1:
                    found.append(kept[kept >= 0])
    return found


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
