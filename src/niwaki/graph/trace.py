"""`trace`: one forward under the recorder gives the channel graph. Nothing about the model changes."""

import contextlib
import fnmatch
import gc
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from niwaki.errors import CannotCutError, InputError, OutOfMemoryError
from niwaki.graph.blocks import Block, add_units, block_group, find_blocks
from niwaki.graph.constants import countable
from niwaki.graph.cost import Cost, Term, Widths, build, macs_of
from niwaki.graph.ends import fix_outputs, held_twice, seed
from niwaki.graph.groups import Axis, Units, make_groups, resolve
from niwaki.graph.labels import LabelSpace
from niwaki.graph.recorder import Heard, Record, Recorder
from niwaki.graph.running import quiet, watch
from niwaki.graph.second_look import real_twin, second_look
from niwaki.graph.skeleton import (
    Ties,
    copy_with,
    is_parameter,
    like,
    listed,
    readied,
    to_meta,
    walk,
)
from niwaki.graph.unread import fix_unread
from niwaki.graph.values import Parameter, Value
from niwaki.units import DataRead, Group, Needed, Unknown, map_tensors, need_module, run, tensors_in

log = logging.getLogger(__name__)

Listings = Sequence[list[tuple[str, Tensor]]]
"""Registered tensors under all their names: parameters, buffers."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class ChannelGraph:
    """Which parameter slices live or die together, why some can't, and what any choice of them costs.

    Source: the idea of labels is niwaki's own; see ARCHITECTURE.md.
    """

    groups: tuple[Group, ...]
    unknown: tuple[Unknown, ...]
    fingerprint: str
    model: str
    """Class of the model."""
    macs: int
    """Multiply-adds of the example, all units kept."""
    params: int
    """Parameters (tied ones once)."""
    seconds: float
    device: str
    """Where the forward ran: "meta" (no memory), or the real device."""
    unused: tuple[str, ...]
    """Parameters that no call touched; they are left alone."""
    units: Units
    axes: tuple[Axis, ...]
    widths: Widths
    costs: dict[str, Cost]
    records: tuple[Record, ...]
    outputs: tuple[tuple[int, ...], ...]
    """Shapes of what it puts out."""
    example: Any
    """The example's structure on the meta device (enough to trace again)."""
    names: dict[str, tuple[str, ...]]
    """Every name of each tensor, by its first name."""
    shapes: dict[str, tuple[int, ...]]
    tables: tuple[tuple[str, np.ndarray, np.ndarray], ...]
    """Integer buffers that pick positions of a labelled axis: name, the axis's units, the positions picked."""
    blocks: tuple[Group, ...] = ()
    """Modules that may be left out whole, their output being their input then: kind "block", one unit each."""
    inside: dict[str, Block] = field(default_factory=dict)
    """What is known of each block, by the name of its group."""
    data_reads: tuple[DataRead, ...] = ()
    """Where forward reads numbers out of data: another path than the example's may be taken next time."""
    heard: Heard = field(default_factory=dict)
    """What it read."""
    held: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """Whether this very forward fixes a unit (and not the user, or a forward in training mode); bool `[units]`."""
    loose: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """Whether any number of a label's positions will do; bool `[labels]`."""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    """Parameters and buffers of real numbers, by their first name."""
    integers: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The other tensors that the model registers: how many elements, and bytes of one."""
    inputs: Any = None
    """The example itself, where the forward ran on a real device."""
    given: tuple[Value, ...] = ()
    """The tensors of the example, in their order."""
    results: tuple[Value, ...] = ()
    """The tensors that it puts out."""
    features: dict[str, tuple[Value | None, ...]] = field(default_factory=dict)
    """Module -> the first tensor that each of its calls put out."""
    exports: dict[bool, Any] = field(default_factory=dict)
    """Exported programs of the model (training or not), made once where a cut needs them; they hold no weights."""

    def __repr__(self) -> str:
        free = sum(group.fixed is None for group in self.groups)
        totals = f"{len(self.blocks)} blocks, {self.params} parameters, {self.macs} multiply-adds"
        return f"ChannelGraph({self.model}: {len(self.groups)} groups, {free} of them free, {totals}; {self.device})"

    def group(self, name: str) -> Group:
        for group in (*self.groups, *self.blocks):
            if group.name == name:
                return group
        raise InputError(
            f"group {name!r}", found=f"{len(self.groups)} groups, none of that name", do="see `niwaki trace`"
        )

    @property
    def free_params(self) -> int:
        """Parameters that lie on at least one axis that can be cut."""
        free = {m.tensor for g in self.groups if g.fixed is None for m in g.members}
        return sum(int(np.prod(self.shapes[t])) for t in free if t in self.shapes and not self._buffer(t))

    def _buffer(self, tensor: str) -> bool:
        return any(axis.buffer for axis in self.axes if axis.tensor == tensor)

    def cost(self, alive: np.ndarray) -> dict[str, float]:
        """Every cost of the graph when only `alive` units stay (bool `[units]`), or when each is there so often (int).
        What is counted is exact."""
        counts = self.widths.counts(np.append(alive, True))
        return {name: cost.total(counts) for name, cost in self.costs.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data: groups with members (positions left out), totals, unknown operations."""
        return {
            "fingerprint": self.fingerprint,
            "macs": self.macs,
            "params": self.params,
            "free_params": self.free_params,
            "seconds": round(self.seconds, 4),
            "device": self.device,
            "groups": [
                {
                    "name": g.name,
                    "units": g.units,
                    "kind": g.kind,
                    "rows": g.rows,
                    "fixed": g.fixed,
                    "exact": g.exact,
                    "inexact": g.inexact,
                    "members": [
                        {
                            "tensor": m.tensor,
                            "axis": m.axis,
                            "role": m.role,
                            "blocks": m.blocks,
                            "positions": int(m.index.size),
                        }
                        for m in g.members
                    ],
                }
                for g in self.groups
            ],
            "blocks": [{"name": b.name, "module": self.inside[b.name].path} for b in self.blocks],
            "unknown": [{"operation": u.operation, "module": u.module, "where": u.where} for u in self.unknown],
            "data_reads": [{"operation": r.operation, "module": r.module, "where": r.where} for r in self.data_reads],
            "unused": list(self.unused),
        }


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's search for cycles: a trace makes many objects and keeps them, and with torch loaded each search
    among all that live takes longer (0.1 s and more) than the trace. What was made counts as old afterwards (frozen
    and thawed, unless somebody keeps objects frozen), or the next object made would start a search among all of it.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()


@uncollected()
def trace(
    model: nn.Module, example: Any, *, protect: Sequence[str] = (), device: str | torch.device | None = None
) -> ChannelGraph:
    """Follow labels through one forward of `model` on `example` and group what must be removed together.

    Args:
        example: a tensor, a tuple of arguments, a dict of keyword arguments, or a list, as the model takes it.
        protect: module or parameter names (shell patterns allowed) whose outputs keep their width.
        device: "meta" to forbid real tensors, a real device to run there; by default meta first, then the model's own.

    Raises:
        InputError: a protected name does not exist, or the example does not fit the model, which must be an nn.Module.
        CannotCutError: the model can't be copied or run.

    Examples:
        >>> import torch, niwaki
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> [(g.name, g.units, g.fixed) for g in niwaki.trace(net, torch.zeros(1, 4)).groups]
        [('0', 4, 'meets input of the model'), ('0#2', 8, None), ('2', 2, 'output of the model')]
    """
    need_module(model, "trace a model")
    start = time.perf_counter()
    wanted = torch.device(device) if device is not None else None
    attempts = (
        ["meta"] if wanted is not None and wanted.type == "meta" else ["meta", "real"] if wanted is None else ["real"]
    )
    failure: Exception | None = None
    for attempt in attempts:
        try:
            result = _trace_once(model, example, protect, attempt, wanted)
        except (InputError, CannotCutError):
            raise
        except torch.OutOfMemoryError as error:
            text = str(error).strip().splitlines() or ["out of memory"]
            raise OutOfMemoryError(
                f"trace {type(model).__name__}", found=text[0], do="use a smaller example or a smaller model"
            ) from error
        except Exception as error:
            log.debug("trace on %s failed: %s: %s", attempt, type(error).__name__, error)
            failure = failure or error if attempt == "meta" and len(attempts) > 1 else error
            continue
        object.__setattr__(result, "seconds", time.perf_counter() - start)
        return result
    assert failure is not None
    raise InputError(
        f"trace {type(model).__name__}",
        found=f"its forward failed: {type(failure).__name__}: {failure}",
        where="the forward of the model on the example",
        do="check that model(example) runs, and the example's shape and type",
    ) from failure


def _trace_once(
    model: nn.Module, example: Any, protect: Sequence[str], attempt: str, device: torch.device | None
) -> ChannelGraph:
    pairs: list[tuple[Tensor, Tensor]] = []

    def stand_in(tensor: Tensor) -> Tensor:
        if attempt == "meta":
            copy = to_meta(tensor)
        elif device is not None and device != tensor.device:
            copy = (
                type(tensor)(tensor.detach().to(device))
                if isinstance(tensor, nn.Parameter)
                else tensor.detach().to(device)
            )
        else:
            copy = like(tensor, tensor.detach().clone())  # a forward may write to its parameters
        pairs.append((tensor, copy))
        return copy

    skeleton = copy_with(model, stand_in, ties := Ties())
    modules = walk(skeleton)
    readied(skeleton, [module for _, module in modules])
    place = "meta" if attempt == "meta" else device
    inputs = map_tensors(example, lambda t: t.detach().to(place) if place is not None else t.detach().clone())
    space = LabelSpace()
    recorder = Recorder(space, modules)
    parameters = seed(recorder, skeleton)
    for real, copy in pairs:
        note_constant(recorder, real, copy)
    given = [recorder.value(tensor) for tensor in tensors_in(inputs)]
    for value in given:
        value.why, value.constant = "input of the model", None
    with quiet(skeleton, modules), torch.no_grad(), recorder, watch(recorder, meta=attempt == "meta"):
        output = run(skeleton, inputs)
    fix_outputs(recorder, output)
    heard = {key: list(answers) for key, answers in recorder.heard.items()}
    reads = tuple(recorder.reads)
    fixed = np.concatenate([np.zeros(0, np.int32), *(labels for labels, _ in space.fixed)])
    fix_unread(recorder, output, parameters)
    *listings, passing = listed(model)
    names = _all_names(listings)
    results = [recorder.value(tensor) for tensor in tensors_in(output)]
    blocks = find_blocks(
        recorder.calls,
        recorder.records,
        parameters,
        names=names,
        outputs=results,
    )
    if protect:
        blocks = [block for block in blocks if not _shielded(model, protect, block.path)]
    features: dict[str, tuple[Value | None, ...]] = {}
    for call in recorder.calls:
        features[call.path] = (*features.get(call.path, ()), call.first)
    if any(not p.seeds and any(n > 1 for n in p.shape) for p in parameters.values() if not p.buffer):
        second_look(
            skeleton,
            inputs,
            recorder,
            parameters,
            meta=attempt == "meta",
            real=lambda: real_twin(model, example, skeleton, recorder),
        )
    recorder.memory.clear()  # what is freed from here on outlived the forward
    _protect(model, protect, recorder, parameters)
    _protect(model, held_twice(ties, listings, parameters), recorder, parameters)
    units, axes = resolve(space, parameters)
    axes = [axis for axis in axes if axis.size > 1]
    held = np.zeros(units.count + 1, bool)
    held[units.unit_of[fixed]] = True
    groups = tuple(make_groups(units, axes))
    units, first = add_units(units, len(blocks)), units.count
    shapes = {p.name: p.shape for p in parameters.values()}
    whole = {name: first + i for i, block in enumerate(blocks) for name in block.parameters}
    roles = {axis.tensor: axis.role for axis in axes if axis.axis == 0}
    ran = {at: first + i for i, block in enumerate(blocks) for at in block.terms}
    shared = {id(f): f for t in recorder.terms for f in t.factors}
    counted = {key: units.unit_of[factor] for key, factor in shared.items()}
    terms = {
        "macs": [
            _times(Term(t.constant, tuple([counted[id(f)] for f in t.factors])), ran.get(at))
            for at, t in enumerate(recorder.terms)
        ],
        "params": _parameter_terms(parameters, {(axis.tensor, axis.axis): axis.units for axis in axes}, whole),
        "units": _unit_terms(groups, whole, {p.name for p in parameters.values() if p.buffer}),
    }
    widths, costs = build(terms)
    return ChannelGraph(
        groups=groups,
        unknown=tuple(dict.fromkeys(recorder.unknown)),
        data_reads=reads,
        heard=heard,
        held=held[:-1],
        loose=space.loose(),
        features=features,
        parameters=parameters,
        integers={
            name: (tensor.numel(), tensor.dtype.itemsize)
            for listing in listings
            for name, tensor in listing
            if name in names and name not in parameters
        },
        inputs=None if attempt == "meta" else map_tensors(example, lambda t: t.detach().clone()),
        fingerprint=_digest(model, listings, passing),
        model=type(model).__qualname__,
        macs=macs_of(recorder.terms),
        params=sum(math.prod(p.shape) for p in parameters.values() if not p.buffer),
        seconds=0.0,
        device=attempt if attempt == "meta" else str(place or "cpu"),
        unused=tuple(
            p.name for p in parameters.values() if not p.seeds and not p.buffer and any(n > 1 for n in p.shape)
        ),
        units=units,
        axes=tuple(axes),
        widths=widths,
        costs=costs,
        records=tuple(recorder.records),
        outputs=tuple(tuple(t.shape) for t in tensors_in(output)),
        given=tuple(given),
        results=tuple(results),
        example=map_tensors(example, lambda t: t.detach().to("meta")),
        names=names,
        shapes=shapes,
        blocks=tuple(block_group(block, first + i, shapes=shapes, roles=roles) for i, block in enumerate(blocks)),
        inside={f"block {block.path}": block for block in blocks},
        tables=tuple((name, units.unit_of[source], values) for name, source, values in recorder.tables),
    )


def note_constant(recorder: Recorder, real: Tensor, copy: Tensor) -> None:
    """Tables keep their values beside the meta tensor: gathers by them stay movement, numbers in them can be read.

    Parameters do not.
    """
    if not real.is_meta and not is_parameter(real) and countable(real):
        recorder.hold(copy, recorder.value(copy), real.detach().cpu())


def _protect(model: nn.Module, protect: Sequence[str], recorder: Recorder, parameters: dict[str, Parameter]) -> None:
    modules = [name for name, _ in model.named_modules()] if protect else []
    for wanted in (protect,) if isinstance(protect, str) else protect:
        why = wanted.why if isinstance(wanted, Needed) else "protected by the user"
        if wanted in parameters:
            hits = [wanted]
        else:
            inside = [name for name in modules if name and fnmatch.fnmatchcase(name, wanted)]
            hits = [p for p in parameters for m in inside if p == m or p.startswith(m + ".")]
            if not inside:
                close = [name for name in modules if name and wanted.split(".")[-1] in name][:5]
                raise InputError(
                    f"protect {wanted!r}",
                    found="no module or parameter of that name" + (f"; near: {', '.join(close)}" if close else ""),
                    where=type(model).__name__,
                    do="give a name from model.named_modules()",
                )
            if not hits:  # modules without parameters: what they put out
                for record in recorder.records:
                    if any(record.module == m or record.module.startswith(m + ".") for m in inside):
                        for value in record.outputs:
                            for labels in value.fields:
                                recorder.space.fix(labels, why)
        for name in hits:
            for axis, seeds in parameters[name].seeds.items():
                if recorder.space.roles.get(int(seeds[0])) != "in" or wanted in parameters:
                    del axis
                    recorder.space.fix(seeds, why)


def _times(term: Term, block: int | None) -> Term:
    """The term, nothing where the block it lies in is gone."""
    return term if block is None else Term(term.constant, (*term.factors, np.array([[block]], dtype=np.int32)))


def _unit_terms(groups: tuple[Group, ...], whole: dict[str, int], buffers: set[str]) -> list[Term]:
    """Number of units in groups that can be cut; those that lie in one block alone go with it."""
    apart: dict[int | None, list[np.ndarray]] = {}
    for group in groups:
        if group.fixed is None:
            blocks = {whole.get(member.tensor) for member in group.members if member.tensor not in buffers}
            apart.setdefault(blocks.pop() if len(blocks) == 1 else None, []).append(group.ids)
    return [_times(Term(1, (np.concatenate(ids).reshape(1, -1),)), block) for block, ids in apart.items()]


def _shielded(model: nn.Module, protect: Sequence[str], path: str) -> bool:
    """Whether a block, what holds it or what it holds is protected."""
    wanted = (protect,) if isinstance(protect, str) else tuple(protect)
    below = [name for name, _ in model.named_modules() if name == path or name.startswith(path + ".")]
    parameters = [name for name, _ in model.named_parameters() if name.startswith(path + ".")]
    parts = path.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatchcase(name, one) for one in wanted for name in (*above, *below, *parameters))


def _parameter_terms(
    parameters: dict[str, Parameter], units: dict[tuple[str, int], np.ndarray], whole: dict[str, int]
) -> list[Term]:
    """Number of elements of every parameter, as a product of its labelled axes; none where its block is gone."""
    terms = []
    for parameter in parameters.values():
        if parameter.buffer:
            continue
        constant, factors = 1, []
        blocked = next((a for a, n in parameter.blocks.items() if n > 1), None)
        for axis, size in enumerate(parameter.shape):
            along = units.get((parameter.name, axis))
            if along is None or size == 1:
                constant *= size
            elif blocked is not None and axis in (0, blocked):
                factors.append(along.reshape(parameter.blocks[blocked], -1))
            else:
                factors.append(along.reshape(1, -1))
        terms.append(_times(Term(constant, tuple(factors)), whole.get(parameter.name)))
    return terms


def _all_names(listings: Listings) -> dict[str, tuple[str, ...]]:
    first: dict[Any, str] = {}
    names: dict[str, list[str]] = {}
    ties = Ties()
    for listing in listings:
        for name, tensor in listing:
            names.setdefault(first.setdefault(ties.key(tensor), name), []).append(name)
    return {name: tuple(every) for name, every in names.items()}


def passing_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that no state dict holds (`register_buffer(..., persistent=False)`)."""
    return listed(model)[2]


def fingerprint(model: nn.Module) -> str:
    """Digest of the model's class and the names and shapes of its tensors; values and types do not count.

    Nor do buffers that no state dict holds: they may follow the last input (tables of positions).

    Raises:
        InputError: `model` is not an nn.Module.
    """
    need_module(model, "look at the tensors of a model")
    *listings, passing = listed(model)
    return _digest(model, listings, passing)


def _digest(model: nn.Module, listings: Listings, passing: set[str]) -> str:
    listing = [type(model).__qualname__]
    for tensors in listings:
        listing += [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors if name not in passing]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
