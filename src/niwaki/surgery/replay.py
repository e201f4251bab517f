"""The quick check of a cut model: the very calls of the trace, on the same tensors, each cut down as the plan says.

Where every call of the cut model's forward is the one that was traced, with the same settings, given the results of the
same calls, and every result has the shape that the labels promise, then what each call gives is what it gave, cut down:
so it is for the first call, and each call here keeps it so for the next. A call for which that is not plain by its kind
ends the quick check, and the full one decides (`niwaki.surgery.check`). A forward that does otherwise is at fault if it
then fails by itself, as it would there; else the full check decides here, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from niwaki.graph import ChannelGraph
from niwaki.graph.constants import tensors_of, written_by
from niwaki.graph.kernels import Kernels, like_input
from niwaki.graph.operators import NORMS, SILENT, Operator, trains
from niwaki.graph.recorder import Record
from niwaki.graph.rules import attention, pointwise, spatial
from niwaki.graph.rules.indexing import picks_of
from niwaki.graph.rules.registry import argument, signature
from niwaki.graph.running import quiet
from niwaki.graph.skeleton import lent, named_tensors, walk
from niwaki.graph.values import Value
from niwaki.surgery.astray import Astray, Tally, calling
from niwaki.surgery.evidence import Sizes, failure, regular
from niwaki.surgery.places import along, moved, positions_of
from niwaki.units import map_tensors, run, tensors_in

SIZED = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "expand"), ("size",)),
    "native_layer_norm": ("normalized_shape",),
    "split": ("split_size",),
    "split_with_sizes": ("split_sizes",),
    "slice": ("start", "end"),
    "select": ("index",),
    "constant_pad_nd": ("pad",),
    "convolution": ("groups",),
    "native_group_norm": ("C", "group"),
    "as_strided_": ("size", "stride"),
}
"""Arguments that may follow a width: what they come to is seen by the shape of the result, or looked at by itself."""
PLAIN = frozenset(
    (
        *("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "dot", "mv"),
        *("permute", "transpose", "t", "unsqueeze", "squeeze", "unbind", "split", "split_with_sizes", "expand"),
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy"),
        *("clone", "contiguous", "_to_copy", "detach", "alias", "lift_fresh", "cat", "stack", "flip", "repeat"),
        *("mean", "sum", "amax", "amin", "prod", "logsumexp", "var", "std", "var_mean", "std_mean"),
        *("linalg_vector_norm", "_softmax", "_safe_softmax", "_log_softmax", "cumsum", "embedding", "glu"),
        *("native_batch_norm", "_native_batch_norm_legit_no_training", "native_layer_norm", "_fused_rms_norm"),
        *("zeros_like", "ones_like", "full_like", "empty_like", "_weight_norm_interface"),
        *("new_zeros", "new_ones", "new_full", "new_empty"),
    )
)
"""Calls that do the same to what stays of an axis as they did to all of it, whichever positions stay."""
PLACED = frozenset({"slice", "select", "constant_pad_nd"})
"""Calls that name positions by number."""
GROUPED = frozenset({"convolution", "native_group_norm"})


NONE: frozenset[int] = frozenset()
"""No axes."""


class Departed(Exception):
    """The forward does something else than the traced one, or something that has to be looked at in full."""


@dataclass(frozen=True)
class Told:
    """What a replay says of the cut model: that it does what was traced, that its forward fails, or nothing."""

    same: bool = False
    problem: str = ""
    """Why the forward fails, which did what was traced until then."""
    where: str = ""
    """The module in which it fails."""
    ran: frozenset[str] = frozenset()
    """Modules that made calls until then, or wait for one that failed; any may have that came after the first call that
    was not the traced one."""
    done: int = 0
    """Calls until then that were the traced ones, cut down; in each module up to the first that was not."""
    wrong: str = ""
    """The module of the first call that was not, or in which it fails."""
    off: frozenset[str] = frozenset()
    """Modules that made such a call."""


def replays(
    small: nn.Module, graph: ChannelGraph, alive: np.ndarray, example: Any, sizes: Sizes, kernels: Kernels | None = None
) -> Told:
    """Whether the forward of `small` is plainly the traced one, every call cut down, or fails.

    `kernels` remember what calls gave in other attempts at the same model.
    """
    if graph.device != "meta" or graph.data_reads or (alive > 1).any() or not regular(graph, alive > 0):
        return Told()
    modules = walk(small)
    replay = Replay(graph, sizes, kernels or Kernels(), modules)
    try:
        with lent(small, replay.note, [module for _, module in modules]) as skeleton:
            inputs = map_tensors(example, lambda t: t.to("meta"))
            if not replay.seed(skeleton, graph, tensors_in(inputs)):
                return Told()
            replay.busy = False
            with quiet(skeleton, modules), torch.no_grad(), replay:
                output = run(skeleton, inputs)
    except Exception as error:
        if replay.busy or replay.departed:  # whatever it is, the full check meets it again and says where
            return Told()
        return replay.fault(error, small)
    found = tensors_in(output)
    return Told(
        not (replay.departed or replay.astray)
        and replay.done == len(graph.records)
        and [tuple(t.shape) for t in found] == list(graph.outputs)
        and all(replay.known.get(id(t)) is value for t, value in zip(found, graph.results, strict=True))
    )


class Replay(TorchDispatchMode):
    """Goes along the records of a trace, one for each call."""

    def __init__(
        self, graph: ChannelGraph, sizes: Sizes, kernels: Kernels, modules: Sequence[tuple[str, nn.Module]] = ()
    ) -> None:
        super().__init__()
        self.records = graph.records
        self.sizes = sizes
        self.done = 0
        self.departed = False
        self.astray = False
        """Whether the forward no longer does what was traced, and is only followed to see whether it fails."""
        self.busy = True
        """Whether what goes wrong now is for the full check to find, not the forward's own fault."""
        self.kernels = kernels
        self.known: dict[int, Value | None] = {}
        """Tensors of this forward and what they were in the traced one."""
        self.bound: dict[int, Tensor] = {}
        """The same the other way; it keeps the tensors, so that no other takes their place."""
        self.real: dict[int, Tensor] = {}
        """Stand-ins on the meta device and the tensors they stand for."""
        self.kept: list[Tensor] = []
        self.beside = Astray(self.kernels, self.real)
        self.tally = Tally(graph.records, sizes, modules)

    def note(self, real: Tensor, stand_in: Tensor) -> None:
        self.real[id(stand_in)] = real
        self.kept.append(stand_in)  # no other may take its place

    def seed(self, skeleton: nn.Module, graph: ChannelGraph, inputs: list[Tensor]) -> bool:
        """Bind inputs to the values they had, by their place, and registered tensors, by their name, and see that they
        have the sizes of the plan. Tables whose numbers are known are met by these alone."""
        if len(inputs) != len(graph.given):
            return False
        for tensor, value in zip(inputs, graph.given, strict=True):
            if tensor.shape != value.shape or id(tensor) in self.known or id(value) in self.bound:
                return False
            self.known[id(tensor)], self.bound[id(value)] = value, tensor
        named: dict[str, Value] = {}
        for record in graph.records:
            for value in record.inputs:
                if value.parameter is not None:
                    named.setdefault(value.parameter.name, value)
                elif value.table is not None and value.constant is None:
                    named.setdefault(value.table, value)
        for listing in named_tensors(skeleton):
            for name, tensor in listing:
                if id(tensor) in self.known:
                    continue
                self.kept.append(tensor)
                known = named.get(name)
                if known is None and self.beside.of(tensor) is not None:
                    continue
                if known is not None:
                    if tensor.shape != self.sizes.of(known) or id(known) in self.bound:
                        return False
                    self.bound[id(known)] = tensor
                self.known[id(tensor)] = known
        return True

    # -- calls -------------------------------------------------------------------------------------------------
    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch asks: nothing is compiled here, and its guard costs every call
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, kind, free, slots = _of(func)
        if name in SILENT:
            return func(*args, **kwargs)
        self.busy = True
        if self.departed:
            self.leave()
        if slots:
            self.beside.write(written_by(slots, args, kwargs))
        if kind == "read":
            return self.number(args[0])
        if self.astray or self.done == len(self.records):
            return self.follow(func, args, kwargs)
        record = self.records[self.done]
        if record.func is not func or len(record.args) != len(args) or record.kwargs.keys() != kwargs.keys():
            if name == "detach" and id(args[0]) in self.known:
                return self.again(func(*args), self.known[id(args[0])])
            return self.follow(func, args, kwargs)
        same = True
        known = self.known
        for place, (was, now) in enumerate(zip(record.args, args, strict=True)):
            if was is now or (type(was) is Value and known.get(id(now)) is was):
                continue
            if not self.same(was, now):
                if place not in free or _rank(was) != _rank(now):
                    return self.follow(func, args, kwargs)
                same = False
        for key, was in record.kwargs.items():
            if not self.same(was, kwargs[key]):
                return self.follow(func, args, kwargs)
        before = args[0].stride() if kind == "strided" else ()
        if name in NORMS and args[0].is_meta and args[0].is_contiguous() and not trains(name, args):
            result: Any = like_input(args[0])
        else:
            self.busy = False
            result = self.kernels(func, args, kwargs)
            self.busy = True
        if not self.take(record, result):
            self.tally.begin(self.done, record.module)
            self.astray, self.busy = True, False
            return result
        if kind == "strided":
            same = same or walks_alike(args, before)
        if kind != "plain" and not self.keeps(record, func, args, kind, same):
            self.leave()
        self.done += 1
        self.busy = False
        return result

    def leave(self) -> NoReturn:
        self.departed = True
        raise Departed

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that is not the traced one, or that comes after such a one."""
        if not self.astray:
            self.tally.begin(self.done)
        self.astray, self.busy = True, False
        result = self.beside(func, args, kwargs)
        self.tally(func, result)
        return result

    def number(self, tensor: Tensor) -> Any:
        """What a tensor of one number holds, where the model makes it of its own constants."""
        numbers, value = self.beside.of(tensor), self.known.get(id(tensor))
        if numbers is None and value is not None and not self.beside.is_written(tensor):
            numbers = self.constant(value)
        if numbers is None:
            self.leave()
        self.busy = False
        return numbers.item()

    def constant(self, value: Value) -> Tensor | None:
        """What a traced value was known to hold, where it was made of nothing that is registered (and may be cut)."""
        todo = [value]
        for source in todo:
            if source.constant is None:
                return None
            if id(source) in self.makers:
                todo += self.makers[id(source)].inputs
            elif source.parameter is not None:
                return None  # bound by its name: nobody has seen that its numbers are the same
        return value.constant

    def again(self, tensor: Tensor, value: Value | None) -> Tensor:
        """The same result by another tensor: torch takes a new one where somebody, as this does, holds what it made."""
        self.known[id(tensor)] = value
        self.kept.append(tensor)
        self.busy = False
        return tensor

    def fault(self, error: Exception, model: nn.Module) -> Told:
        """The forward's own error, in the words of the full check, which would meet it at the same call."""
        paths = {id(module): path for path, module in walk(model)}
        stack = [paths[call] for call in calling(error) if call in paths]
        where = stack[-1] if stack else ""
        ran = {record.module for record in self.records[: None if self.astray else self.done]} | set(stack)
        ran |= {path[:at] for path in ran for at, letter in enumerate(path) if letter == "."} | {""}
        wrong = self.records[self.done].module if self.astray and self.done < len(self.records) else where
        off = frozenset({*self.tally.off, wrong})
        return Told(False, failure(error, where), where, frozenset(ran), self.done + self.tally.agreed, wrong, off)

    def same(self, was: Any, now: Any) -> bool:
        """Whether an argument is the one that was given: the same result, or the same setting."""
        if type(was) is Value:
            known = self.known.get(id(now), self)
            return known is was or (known is self and isinstance(now, Tensor) and self.meets(was, now))
        if isinstance(was, (list, tuple)):
            if not isinstance(now, (list, tuple)) or len(was) != len(now):
                return False
            pairs = zip(was, now, strict=True)
            return not [None for a, b in pairs if a is not b and not self.same(a, b)]
        return type(was) is type(now) and bool(was == now)

    def meets(self, was: Value, now: Tensor) -> bool:
        """A tensor that no call made: one of the model's own constants, known by its numbers."""
        if was.constant is None or was.parameter is not None or was.fields or tuple(now.shape) != was.shape:
            return False
        if id(was) in self.bound or id(was) in self.makers:
            return False
        with torch.utils._python_dispatch._disable_current_modes():
            mine = self.beside.of(now)
            if mine is None or mine.dtype != was.constant.dtype or not torch.equal(mine, was.constant.cpu()):
                return False
        self.known[id(now)] = was
        self.bound[id(was)] = now
        return True

    @cached_property
    def makers(self) -> dict[int, Record]:
        """The calls that gave values, by the values' ids; none gave what it was given and wrote to."""
        return {
            id(value): record
            for record in self.records
            for value in record.outputs
            if not any(value is given for given in record.inputs)
        }

    def take(self, record: Record, result: Any) -> bool:
        """Bind results to what they were, each in the shape that the labels promise; whether all have it."""
        tensors = [result] if type(result) is Tensor else tensors_of(result)
        if len(tensors) != len(record.outputs):
            return False
        for i, (tensor, value) in enumerate(zip(tensors, record.outputs, strict=True)):
            if (i == 0 or value.fields or record.moves) and tensor.shape != self.sizes.of(value):
                return False
            known = self.known.get(id(tensor), self)
            if known is self:
                if id(value) in self.bound:
                    self.leave()
                self.known[id(tensor)] = value
                self.bound[id(value)] = tensor
            elif known is not value:
                self.leave()
        return True

    # -- kinds of calls ----------------------------------------------------------------------------------------
    def keeps(self, record: Record, func: Any, args: tuple[Any, ...], kind: str, same: bool) -> bool:
        """Whether the call does to what stays what it did to all: by the axes that are shorter now."""
        if same and not any(map(self.cut_axes, record.inputs)):
            return not any(map(self.cut_axes, record.outputs))
        if kind == "placed":
            return self.in_place(record, args)
        if kind == "windows":
            return self.beside_windows(record, func, args)
        if kind == "attention":
            q, k = record.args[:2]
            return len(q.shape) == len(k.shape) == 4 and q.shape[1] == k.shape[1] and 3 not in self.cut_axes(q)
        if kind == "picked":
            source, *indices = record.inputs
            picks = picks_of([None if item is None else self.bound[id(item)] for item in record.args[1]])
            return not any(map(self.cut_axes, indices)) and not picks.keys() & self.cut_axes(source)
        if kind == "strided":
            return same
        if kind == "rolled":
            source, dims = record.inputs[0], argument(func, record.args, record.kwargs, "dims")
            return bool(dims) and not {d % len(source.shape) for d in dims} & self.cut_axes(source)
        return False

    def cut_axes(self, value: Value) -> frozenset[int]:
        """Axes of which something goes."""
        now = self.sizes.of(value)
        return NONE if now == value.shape else _differing(value.shape, now)

    def in_place(self, record: Record, args: tuple[Any, ...]) -> bool:
        """Whether the call names the positions that are left of those it named."""
        swapped = tuple(Value(tuple(a.shape)) if isinstance(a, Tensor) else a for a in args)
        outputs = [Value(self.sizes.of(value)) for value in record.outputs]
        now = Record(record.name, record.func, "", swapped, record.kwargs, [], outputs, record.kind)
        before, after = positions_of(record), positions_of(now)
        if len(before) != len(after) or not before:
            return False
        for (value, axis, places), (_, _, found) in zip(before, after, strict=True):
            labels, cut, left = along(value, axis), axis in self.cut_axes(value), self.sizes.of(value)[axis]
            if cut and (labels is None or (places.size > 1 and places[1] != places[0] + 1)):
                return False
            if not np.array_equal(places if labels is None else moved(labels, places, self.sizes, left), found):
                return False
        return True

    def beside_windows(self, record: Record, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether only channels go, and of grouped ones equally many of every group that stays."""
        x, y = record.inputs[0], record.outputs[0]
        batched = len(x.shape) == len(y.shape) and len(x.shape) > 2
        if not batched or self.cut_axes(x) - {1} or self.cut_axes(y) - {1}:
            return False
        if record.name not in GROUPED:
            return True
        weight = argument(func, record.args, record.kwargs, "weight")
        fits = weight is not None and len(weight.shape) == len(x.shape)
        if record.name == "convolution" and (not fits or self.cut_axes(weight) - {0, 1}):
            return False
        name = "groups" if record.name == "convolution" else "group"
        old = int(argument(func, record.args, record.kwargs, name))
        now = int(argument(func, args, {}, name))
        if old == now == 1:
            return True
        if record.name == "convolution" and argument(func, record.args, record.kwargs, "transposed"):
            return False
        inside, outside = self.rows(x, old), self.rows(y, old)
        if inside is None or outside is None:
            return False
        return int(inside.sum()) == now and np.array_equal(inside, outside)

    def rows(self, value: Value, groups: int) -> np.ndarray | None:
        """Which groups of channels keep any; None where they do not all keep equally many."""
        if value.shape[1] % groups:
            return None
        labels = along(value, 1)
        if labels is None:
            return None if 1 in self.cut_axes(value) else np.ones(groups, bool)
        counts = self.sizes.stays[labels].any(1).reshape(groups, -1).sum(1)
        live: np.ndarray = counts > 0
        return live if (counts[live] == counts.max()).all() else None


def _rank(setting: Any) -> int | None:
    """How many axes a setting is for, where it is one of several."""
    return len(setting) if isinstance(setting, (list, tuple)) else None


@lru_cache(maxsize=4096)
def _differing(shape: tuple[int, ...], now: tuple[int, ...]) -> frozenset[int]:
    return frozenset([axis for axis, (a, b) in enumerate(zip(shape, now, strict=True)) if a != b])


def walks_alike(args: tuple[Any, ...], before: tuple[int, ...]) -> bool:
    """Whether a tensor of these steps is laid out anew as it was, but for axes of one position."""
    tensor, size, stride, *offset = args
    return (
        offset in ([], [None], [tensor.storage_offset()])
        and len(size) == len(before)
        and all(n == 1 or a == b for n, a, b in zip(size, stride, before, strict=True))
    )


@cache
def _of(func: Any) -> tuple[str, str, frozenset[int], tuple[tuple[int | None, str], ...]]:
    """Name of an operator, how what it does to an axis is looked at, where its arguments may follow a width, and which
    it writes to."""
    operator = Operator.of(func)
    name = operator.name
    known = signature(func)
    free = frozenset(
        place for argued in SIZED.get(name, ()) if argued in known and (place := known[argued][0]) is not None
    )
    rule, module = operator.rule, operator.kind
    if name == "_local_scalar_dense":
        kind = "read"
    elif name in PLACED:
        kind = "placed"
    elif name in GROUPED or module == spatial.__name__:
        kind = "windows"
    elif module == attention.__name__ and name != "embedding":
        kind = "attention"
    elif name in PLAIN or (rule is pointwise.meet and name not in ("copy", "isin")):
        kind = "plain"
    elif name in ("index", "_unsafe_index"):
        kind = "picked"
    elif name == "as_strided_":
        kind = "strided"
    elif name == "roll":
        kind = "rolled"
    else:
        kind = "other"
    return name, kind, free, operator.slots
