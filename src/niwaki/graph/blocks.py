"""Residual blocks that can go whole: modules whose output is their input once their parameters are zero."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from niwaki.graph.groups import Units
from niwaki.graph.recorder import ModuleCall, Record
from niwaki.graph.rules import (
    attention,
    contraction,
    convolution,
    normalisation,
    pointwise,
    reduction,
    spatial,
)
from niwaki.graph.rules.registry import signature
from niwaki.graph.values import Parameter, Value
from niwaki.units import Group, Member

State = Literal["zero", "same"]
PLAIN = ("alias", "clone", "contiguous", "detach", "expand", "lift_fresh")
"""Movement that leaves a tensor what it is where it leaves its shape."""
VIEWS = ("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze")
"""Movement that leaves the elements in their order, whatever the shape."""
Source = Callable[[Value, int], tuple[int, Record] | None]
SELECTING = ("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max_pool1d", "adaptive_max_pool2d")
"""What comes out is some of what went in."""
PRODUCTS = {module.__name__ for module in (contraction, convolution, attention)}


@final
@dataclass(frozen=True, eq=False)
class Block:
    """A module that gives its input back when its parameters are zero, and may therefore be left out."""

    path: str
    puts_out: str
    """"tensor", or "tuple" where the module wraps its output in a tuple of one."""
    parameters: tuple[str, ...]
    """First names of the parameters that nothing else uses."""
    last: tuple[str, ...]
    """Those that multiply, shift or produce what is added to the input."""
    terms: range
    """Its contractions, among the trace's."""
    records: range
    """Its calls, among the trace's."""


def find_blocks(
    calls: list[ModuleCall],
    records: list[Record],
    parameters: Mapping[str, Parameter],
    *,
    names: Mapping[str, tuple[str, ...]],
    outputs: list[Value],
) -> list[Block]:
    """The innermost modules of this kind, in the order of their calls.

    A module counts if it is called once, owns parameters, takes its input as first argument, and nothing else that it
    computes is used outside.
    """
    times: dict[str, int] = {}
    for call in calls:
        times[call.path] = times.get(call.path, 0) + 1
    fitting = [
        call
        for call in calls
        if times[call.path] == 1
        and call.path
        and call.given is not None
        and call.output is not None
        and call.given.shape == call.output.shape
    ]
    if not fitting:
        return []
    owners = _owned([call.path for call in fitting], parameters, names)
    read: dict[int, int] = {id(value): len(records) for value in outputs}
    for at, record in enumerate(records):
        for value in record.inputs:
            read[id(value)] = max(read.get(id(value), at), at)
    made: dict[int, list[int]] = {}
    for at, record in enumerate(records):
        for value in record.outputs:
            made.setdefault(id(value), []).append(at)

    def source(value: Value, before: int) -> tuple[int, Record] | None:
        """The last call that made or wrote `value` before the call of this number."""
        earlier = [at for at in made.get(id(value), ()) if at < before]
        return (earlier[-1], records[earlier[-1]]) if earlier else None

    found: list[Block] = []
    taken: list[range] = []
    sums = [at for at, record in enumerate(records) if record.name.removesuffix("_") in ADDS]
    for call in sorted(fitting, key=lambda call: len(call.records)):
        own = owners.get(call.path, ())
        if not own or bisect_left(sums, call.records.start) == bisect_left(sums, call.records.stop):
            continue
        if any(call.records.start <= t.start and t.stop <= call.records.stop for t in taken):
            continue
        inside = records[call.records.start : call.records.stop]
        if any(
            read.get(id(value), -1) >= call.records.stop
            for record in inside
            for value in record.outputs
            if value is not call.output and value is not call.given
        ):
            continue
        vanishing = frozenset(name for name in own if parameters[name].shape)  # a mask can't take a lone number away
        last = _passes(call, inside, vanishing, source)
        if last is not None:
            found.append(Block(call.path, call.puts_out, tuple(own), last, call.terms, call.records))
            taken.append(call.records)
    order = {call.path: i for i, call in enumerate(fitting)}
    return sorted(found, key=lambda block: order[block.path])


def _owned(
    paths: list[str], parameters: Mapping[str, Parameter], names: Mapping[str, tuple[str, ...]]
) -> dict[str, list[str]]:
    """Module path -> its parameters, for those that share none with anything outside."""
    wanted = set(paths)
    owned: dict[str, list[str]] = {}
    shared: set[str] = set()
    above: dict[str, frozenset[str]] = {}  # a module -> the paths of all that hold what is in it

    def holding(name: str) -> frozenset[str]:
        home = name.rpartition(".")[0]
        if home not in above:
            above[home] = frozenset(_above(name))
        return above[home]

    for name, parameter in parameters.items():
        if parameter.buffer:
            continue
        places = [holding(every) for every in names.get(name, (name,))]
        inside = frozenset.intersection(*places) & wanted
        shared |= frozenset.union(*places) - inside
        for path in inside:
            owned.setdefault(path, []).append(name)
    return {path: held for path, held in owned.items() if path not in shared}


def _above(name: str) -> Iterator[str]:
    """Paths of the modules that hold a tensor, from the innermost."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _passes(call: ModuleCall, records: list[Record], own: frozenset[str], source: Source) -> tuple[str, ...] | None:
    """Whether the module puts out its input when its own parameters are zero: those nearest to the sum, or None."""
    assert call.given is not None and call.output is not None
    states: dict[int, State] = {id(call.given): "same"}
    roots: dict[int, int] = {}
    near: dict[int, frozenset[str]] = {}
    summed: frozenset[str] = frozenset()

    def state(value: Value) -> State | None:
        if value.parameter is not None:
            return "zero" if value.parameter.name in own else None
        return states.get(id(value))

    for record in records:
        given = record.inputs
        made = _state(record, given, state, lambda once: _settled(once, call, source))
        written = [value for value in record.outputs if any(value is one for one in given)]
        for value in written:  # what shares memory with a tensor that is written to is not known any more
            root = roots.get(id(value), id(value))
            for other in [i for i, of in roots.items() if of == root] + [root]:
                if other != id(value):
                    states.pop(other, None)
        zeros = [value for value in given if state(value) == "zero"]
        mine = [value for value in zeros if value.direct]  # parameters, as they are or transposed
        reach = frozenset[str]().union(
            *(
                {value.parameter.name} if value.parameter is not None else near.get(id(value), frozenset())
                for value in mine or zeros
            )
        )
        if made == "same" and any(state(v) == "zero" for v in given):
            summed |= reach
        for value in record.outputs:
            if made is None:
                states.pop(id(value), None)
            else:
                states[id(value)] = made
            near[id(value)] = reach
            if record.moves and given:
                roots[id(value)] = roots.get(id(given[0]), id(given[0]))
    passed = states.get(id(call.output)) == states.get(id(call.given)) == "same"
    return tuple(sorted(summed)) if passed and summed else None


def _state(
    record: Record,
    given: list[Value],
    state: Callable[[Value], State | None],
    settled: Callable[[Record], bool],
) -> State | None:
    """What is known of a call's result: all zero, the block's input, or nothing."""
    if not given:
        return None
    known = [state(value) for value in given]
    zero = [one == "zero" for one in known]
    if record.moves:
        if known[0] == "same" and len(given) == 1 and _keeps(record):
            return "same"
        return "zero" if all(zero) and not _named(record, "value") else None  # padding may be with another number
    if record.kind in PRODUCTS:
        return _product(record, state)
    if record.kind == normalisation.__name__:
        scale, shift = (_named(record, name) for name in ("weight", "bias"))
        held = isinstance(scale, Value) and state(scale) == "zero"
        return "zero" if held and (shift is None or state(shift) == "zero") else None
    if record.kind == reduction.__name__:
        return "zero" if all(zero) and record.name.removesuffix("_") in ("sum", "mean", "cumsum") else None
    if record.kind == spatial.__name__:
        return "zero" if all(zero) else None
    if record.kind != pointwise.__name__:
        return None
    name = record.name.removesuffix("_")
    if name in ADDS and len(given) == 2 and "same" in known and any(zero):
        at = known.index("same")
        first = at == 0 and name != "rsub"
        whole = name == "add" and record.kwargs.get("alpha", 1) == 1
        return "same" if given[at].shape == _shape(record) and (first or whole) else None
    if name == "mul" and any(zero):
        return "zero"
    if all(zero):
        return "zero" if _at_zero(record) else None
    if known == ["same"] and given[0].shape == _shape(record) and settled(record):
        return "same"
    return None


ADDS = frozenset({"add", "sub", "rsub"})
"""Where the branch of a block meets its input."""


def _shape(record: Record) -> tuple[int, ...]:
    return record.outputs[0].shape


def _keeps(record: Record) -> bool:
    """Whether movement leaves elements and their order as they are."""
    name = record.name.removesuffix("_copy").removesuffix("_")
    return name in VIEWS or (name in PLAIN and record.args[0].shape == _shape(record))


def _named(record: Record, name: str) -> Any:
    """An argument by its schema name, or None."""
    place = signature(record.func).get(name)
    if place is None:
        return None
    at = place[0]
    return record.args[at] if at is not None and at < len(record.args) else record.kwargs.get(name)


def _product(record: Record, state: Callable[[Value], State | None]) -> State | None:
    """A product is zero where a factor is; what is added to it has to be zero, too."""
    names = list(signature(record.func))
    tensors = [(name, _named(record, name)) for name in names]
    added = [v for n, v in tensors if isinstance(v, Value) and (n == "bias" or (n == "self" and record.name in ADDING))]
    factors = [v for n, v in tensors if isinstance(v, Value) and n in FACTORS and not any(v is a for a in added)]
    if any(state(value) != "zero" for value in added):
        return None
    if "attention" in record.name:
        factors = [v for n, v in tensors if n == "value"]
    return "zero" if any(state(value) == "zero" for value in factors) else None


ADDING = ("addmm", "baddbmm", "addbmm", "addmv", "addr")
FACTORS = ("self", "input", "weight", "mat1", "mat2", "batch1", "batch2", "other", "mat", "vec", "tensor")


@cache
def _evaluated(
    func: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], numbers: tuple[float, ...]
) -> Any:
    """`func` on plain numbers in the place of its tensors (given as None), or None where it can't be computed."""
    try:
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            held = [torch.tensor(numbers, dtype=torch.float64) if a is _TENSOR else a for a in args]
            answer = func(*held, **dict(kwargs))
    except Exception:  # an operator of other types: nothing is known of it
        return None
    return tuple(answer.double().tolist()) if isinstance(answer, Tensor) and answer.dim() == 1 else None


_TENSOR = "tensor"


def _plainly(record: Record, numbers: tuple[float, ...]) -> Any:
    args = tuple(_TENSOR if isinstance(a, Value) else a for a in record.args)
    kwargs = tuple((k, v) for k, v in record.kwargs.items() if not isinstance(v, Value))
    try:
        return _evaluated(record.func, args, kwargs, numbers)
    except TypeError:  # an argument that can't be hashed
        return None


def _at_zero(record: Record) -> bool:
    """Whether a pointwise call of zeros gives zeros."""
    return bool(_plainly(record, (0.0,)) == (0.0,))


GRID = tuple(float(x) for x in np.linspace(-9.0, 9.0, 73))


def _settled(record: Record, call: ModuleCall, source: Source) -> bool:
    """Whether a pointwise call leaves the block's input as it is: the input is the result of the same call, and doing
    it twice is doing it once (ReLU behind the sum of blocks that end in ReLU).
    """
    assert call.given is not None
    value, before = call.given, call.records.start
    while (found := source(value, before)) is not None:
        before, made = found
        alike = made.name.removesuffix("_") == record.name.removesuffix("_")
        if alike and (made.args[1:], made.kwargs) == (record.args[1:], record.kwargs):
            once = _plainly(record, GRID)
            return once is not None and _plainly(record, once) == once
        if not (made.moves or made.name in SELECTING) or len(made.inputs) != 1:
            return False
        value = made.inputs[0]
    return False


def add_units(units: Units, count: int) -> Units:
    """`units` with one more unit for each of `count` blocks, tied to nothing."""
    if not count:
        return units

    def grown(array: np.ndarray, fill: int | bool) -> np.ndarray:
        return np.append(array, np.full(count, fill, dtype=array.dtype))

    def numbered(array: np.ndarray) -> np.ndarray:
        start = int(array.max(initial=-1)) + 1
        return np.append(array, np.arange(start, start + count, dtype=array.dtype))

    return replace(
        units,
        count=units.count + count,
        row=numbered(units.row),
        column=numbered(units.column),
        classes=numbered(units.classes),
        in_row=grown(units.in_row, False),
        in_column=grown(units.in_column, False),
        row_frozen=grown(units.row_frozen, False),
        column_frozen=grown(units.column_frozen, False),
        reason=grown(units.reason, -1),
        row_reason=grown(units.row_reason, -1),
        column_reason=grown(units.column_reason, -1),
        inexact={kind: grown(marks, -1) for kind, marks in units.inexact.items()},
    )


def block_group(block: Block, unit: int, *, shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, str]) -> Group:
    """The block as a group of one unit; its members are what multiplies or produces the branch that is added."""
    members = tuple(
        Member(
            name,
            0,
            roles.get(name, "other"),
            1,
            np.arange(shapes[name][0], dtype=np.int32),
            np.zeros(shapes[name][0], dtype=np.int32),
        )
        for name in block.last
    )
    return Group(f"block {block.path}", 1, members, kind="block", ids=np.array([unit], dtype=np.int32))
