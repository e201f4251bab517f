"""Sees every ATen call of one forward, applies its rule, and remembers what surgery needs of it."""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from niwaki.graph.constants import computed, countable, memory_of, tensors_of, written_by
from niwaki.graph.cost import Term
from niwaki.graph.kernels import Kernels, like_input
from niwaki.graph.labels import LabelSpace
from niwaki.graph.operators import SILENT, Operator, trains
from niwaki.graph.rules import MOVEMENT, RULES, Call
from niwaki.graph.values import Labels, Memory, Value
from niwaki.units import DataRead, Unknown, tensors_in

UNREGISTERED = "a constant tensor that the model does not register"
UNSPANNED = "an axis that no parameter spans"
LEAVES = frozenset(
    ("numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "__deepcopy__")
)
"""Functions of tensors whose answer torch sees no more of."""

Heard = Mapping[tuple[str, str], list[Any]]
"""(module, operation) -> the answers to what forward read, in order."""


@dataclass(eq=False, slots=True)
class Record:
    """One call as surgery sees it: where it ran, its plain numbers, the tensors in and out."""

    name: str
    func: Any
    module: str
    args: tuple[Any, ...]
    """Arguments with each tensor replaced by its `Value`."""
    kwargs: dict[str, Any]
    inputs: list[Value]
    """The tensors that it reads, in lists too."""
    outputs: list[Value]
    kind: str
    """The module of its rule, or nothing where there is none."""
    terms: tuple[Term, ...] = ()
    """Its multiply-adds, over labels."""

    @property
    def moves(self) -> bool:
        """Whether it only moves data."""
        return self.kind in MOVEMENT


@dataclass(eq=False, slots=True)
class ModuleCall:
    """One call of a module: what it was given first, what it put out, and what ran in between."""

    path: str
    given: Value | None
    """Its first positional argument, where that is a tensor."""
    records: range
    terms: range
    output: Value | None = None
    """Its result, where that is a tensor or a tuple of one."""
    puts_out: str = "tensor"
    """"tensor" or "tuple"."""
    first: Value | None = None
    """The first tensor of its result, whatever that is."""


class Life(weakref.ref[Any]):
    """A storage while it is there."""

    __slots__ = ("key", "memory")
    key: int
    memory: Memory | None


def _freed(table: dict[int, Life], records: list[Record]) -> Callable[[Any], None]:
    """What is done where a storage of `table` is freed."""

    def freed(life: Life) -> None:
        table.pop(life.key, None)
        if life.memory is not None:
            life.memory.died = len(records)

    return freed


class Recorder(TorchDispatchMode):
    """Labels flow through the calls made while this mode is on."""

    def __init__(
        self, space: LabelSpace, modules: Sequence[tuple[str, nn.Module]] = (), *, heard: Heard | None = None
    ) -> None:
        """`modules` are those whose calls are noted, by their paths; `heard` are answers of an earlier forward, to be
        given again: the same path, the same factors."""
        super().__init__()
        self.space = space
        self.modules = list(modules)
        self.values: dict[int, tuple[Any, Value]] = {}
        self.memory: dict[int, Life] = {}
        self.records: list[Record] = []
        self._freed = _freed(self.memory, self.records)
        self.terms: list[Term] = []
        self.unknown: list[Unknown] = []
        self.stack: list[str] = [""]
        self.why = ""
        self.ran: set[str] = set()
        self.tables: list[tuple[str, Any, Any]] = []
        self.kernels = Kernels()
        self.operators: dict[int, Operator] = {}
        """By the ids of operators, which live as long as this does: those are found sooner."""
        self.held: dict[int, list[Value]] = {}
        self.calls: list[ModuleCall] = []
        self.failed = 0, ""
        """The id of the error that passes through modules, and the innermost of them."""
        self.reads: dict[DataRead, None] = {}
        self.heard: dict[tuple[str, str], list[Any]] = {}
        self.again: dict[tuple[str, str], Iterator[Any]] = {
            key: iter(answers) for key, answers in (heard or {}).items()
        }
        self.outside = ""
        """How numbers left torch, once they did: what comes from outside may be made of them."""
        self.numbers: dict[str, set[int]] = {}
        """Module -> whole numbers that it read out of data."""

    # -- which module is running -------------------------------------------------------------------------------
    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch asks: nothing is compiled here, and its guard costs every call
        return False

    def __enter__(self) -> "Recorder":
        for path, module in self.modules:
            vars(module)["_compiled_call_impl"] = self._watched(module, path)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for _, module in self.modules:
            vars(module).pop("_compiled_call_impl", None)

    def _watched(self, module: nn.Module, path: str) -> Callable[..., Any]:
        """What torch is told to do where a module is called: the same, and what it is given and gives is noted.

        Hooks of torch would do, but with one anywhere every call of every module takes a longer way.
        """
        call, stack, records, terms = module._call_impl, self.stack, self.records, self.terms

        def called(*args: Any, **kwargs: Any) -> Any:
            given = self.seen(args[0]) if args and isinstance(args[0], Tensor) else None
            depth, record, term = len(stack), len(records), len(terms)
            self.failed = 0, ""
            stack.append(path)
            self.ran.add(path)
            try:
                output = call(*args, **kwargs)
            except Exception as error:
                known = self.failed[0] in (id(error), id(error.__context__))  # seen, or another one's reason
                self.failed = id(error), self.failed[1] if known else stack[-1]
                raise
            finally:
                del stack[depth:]
            made = ModuleCall(path, given, range(record, len(records)), range(term, len(terms)))
            if type(output) is Tensor:
                made.output = made.first = self.seen(output)
            else:
                single = output[0] if type(output) is tuple and len(output) == 1 else output
                made.output = self.seen(single) if isinstance(single, Tensor) else None
                made.puts_out = "tensor" if single is output else "tuple"
                found = tensors_in(output)
                made.first = self.seen(found[0]) if found else None
            self.calls.append(made)
            return output

        return called

    def where(self, error: Exception) -> str:
        """The module that met an error."""
        return self.failed[1] if self.failed[0] == id(error) else self.stack[-1]

    # -- values ------------------------------------------------------------------------------------------------
    def know(self, tensor: Tensor, value: Value) -> None:
        self.values[id(tensor)] = (weakref.ref(tensor), value)
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.memory:
                self._follow(storage, None)

    def _follow(self, storage: Any, memory: Memory | None) -> None:
        """Know whose a storage is until it is freed; nobody's where no call of this forward took it."""
        life = Life(storage, self._freed)
        life.key, life.memory = storage._cdata, memory
        self.memory[life.key] = life

    def _place(self, tensor: Tensor, value: Value) -> None:
        """Note which memory a call's result lies in."""
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            known = self.memory.get(storage._cdata)
            if known is None:
                value.memory = Memory(value, tensor.dtype.itemsize, len(self.records))
                self._follow(storage, value.memory)
            else:
                value.memory = known.memory

    def seen(self, tensor: Tensor) -> Value | None:
        entry = self.values.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def value(self, tensor: Tensor) -> Value:
        known = self.seen(tensor)
        if known is None:
            known = Value(tuple(tensor.shape), why=self.outside or UNREGISTERED)
            if not self.outside and not tensor.is_meta and countable(tensor):
                self.hold(tensor, known, tensor.detach())
            self.know(tensor, known)
        return known

    def hold(self, tensor: Tensor, value: Value, constant: Tensor) -> None:
        """`tensor` is known to be `constant` until something is written where it lies."""
        value.constant = constant
        self.held.setdefault(memory_of(tensor), []).append(value)

    def forget(self, tensor: Tensor) -> None:
        """Something was written into `tensor`: neither it nor any view of it is known any more."""
        self.value(tensor).constant = None
        for value in self.held.pop(memory_of(tensor), ()):
            value.constant = None

    # -- numbers that leave ------------------------------------------------------------------------------------
    def hear(self, operation: str, ask: Callable[[], Any]) -> Any:
        """The answer to a read of data: the one of the earlier forward where there was one."""
        module = self.stack[-1]
        named = "item" if operation == "_local_scalar_dense" else operation.strip("_")
        self.reads[DataRead(named, module, _source_line())] = None
        nothing = object()
        answer = next(self.again.get((module, operation), iter(())), nothing)
        answer = ask() if answer is nothing else answer
        kept, answer = (answer, answer.copy()) if isinstance(answer, np.ndarray) else (answer, answer)
        self.heard.setdefault((module, operation), []).append(kept)
        if type(answer) is int:
            self.numbers.setdefault(module, set()).update((answer, answer + 1))
        return answer

    def data_numbers(self) -> set[int]:
        """Whole numbers that the running module read out of data, and those after them."""
        return self.numbers.get(self.stack[-1], set())

    def leave(self, operation: str, tensor: Tensor, ask: Callable[[], Any]) -> Any:
        """A tensor goes where no call is seen: what it holds stays as it is, and what comes back is not known."""
        value = self.value(tensor)
        if value.constant is not None and value.parameter is None and not value.fields:
            return ask()
        how = f"left torch through {operation.strip('_')} in {self.stack[-1] or 'the model'}, {_source_line()}"
        self.outside = f"a tensor from outside torch, after numbers {how}"
        for labels in value.get(self.space):
            self.space.fix(labels, how)
        value.zero = False
        value.written()
        return self.hear(operation, ask) if operation in ("numpy", "tolist", "__array__") else ask()

    # -- calls -------------------------------------------------------------------------------------------------
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = self.operators.get(id(func))
        if operator is None:
            operator = self.operators[id(func)] = Operator.of(func)
        name = operator.name
        if operator.reads and name == "_local_scalar_dense":
            known = self.value(args[0]).constant
            if known is not None:  # a constant of the model's own making: its number is known without data
                return known.item()
        if operator.norm and args[0].is_meta and args[0].is_contiguous() and not trains(name, args):
            result: Any = like_input(args[0])  # torch decomposes these in Python, slowly
        elif operator.reads and not args[0].is_meta:
            result = self.hear(name, lambda: func(*args, **kwargs))
        else:
            result = self.kernels(func, args, kwargs)
        outputs = [result] if type(result) is Tensor else tensors_of(result)
        given: list[Tensor] = []
        inputs: list[Value] = []
        placed = tuple([self._valued(item, given, inputs) for item in args])
        named = {k: self._valued(item, given, inputs) for k, item in kwargs.items()} if kwargs else {}
        if not outputs:
            if name in RULES:
                RULES[name](Call(name, func, args, kwargs, result, self))
            elif name not in SILENT and any(value.fields or value.parameter for value in inputs):
                self._give_up(f"{func.namespace}::{name}", inputs)
            return result
        call = Call(name, func, args, kwargs, result, self)
        self.why = ""
        kind = operator.kind
        labels = self._apply(call, name, inputs, operator.rule)
        constants = self._constants(call, outputs, inputs)
        why = self.why or _reason(inputs)
        moved = kind in MOVEMENT
        direct = moved and bool(inputs) and all(v.direct for v in inputs)
        made = []
        written = written_by(operator.slots, args, kwargs) if operator.slots else []
        for i, tensor in enumerate(outputs):
            fields = labels[i] if i < len(labels) else ()
            old = self.seen(tensor) if [None for one in given if one is tensor] else None
            if old is not None:  # in place: the tensor stays the tensor it was
                old.fields = fields if old.parameter is None else old.fields
                old.shape = tuple(tensor.shape)
                old.zero = call.zero
                made.append(old)
                continue
            value = Value(tuple(tensor.shape), fields, why, call.zero, None, direct)
            self._place(tensor, value)
            if constants is not None:
                self.hold(tensor, value, constants[i])
            if moved and inputs:
                value.picked = (*inputs[0].picked, *(call.picked[i] if i < len(call.picked) else ()))
            if given and operator.view:
                value.shares(inputs[0])
            self.values[id(tensor)] = weakref.ref(tensor), value  # its memory is known by now
            made.append(value)
        self.terms.extend(call.terms)
        self.records.append(Record(name, func, self.stack[-1], placed, named, inputs, made, kind, tuple(call.terms)))
        for mutated in written:
            self.forget(mutated)
            self.value(mutated).written()
        return result

    def _valued(self, item: Any, given: list[Tensor], inputs: list[Value]) -> Any:
        """An argument with every tensor in it replaced by its value; they are added to `given` and `inputs`."""
        kind = type(item)
        if kind is int or kind is bool or kind is float or item is None:
            return item
        if isinstance(item, Tensor):
            entry = self.values.get(id(item))
            value = entry[1] if entry is not None and entry[0]() is item else self.value(item)
            given.append(item)
            inputs.append(value)
            return value
        if isinstance(item, (list, tuple)):
            return kind([self._valued(part, given, inputs) for part in item])
        return item

    def _apply(self, call: Call, name: str, inputs: list[Value], rule: Any) -> list[Labels]:
        if rule is None and not any(value.fields or value.parameter for value in inputs):
            return []
        labels = rule(call) if rule is not None else None
        if labels is None:
            self._give_up(f"{call.func.namespace}::{name}", inputs)
            return []
        return labels if isinstance(labels, list) else [labels]

    def _give_up(self, operation: str, inputs: list[Value]) -> None:
        where = _source_line()
        reason = f"unknown operation {operation} called in {self.stack[-1] or 'the model'}, {where}"
        self.unknown.append(Unknown(operation, self.stack[-1], where))
        self.why = f"the result of {reason}"
        for value in inputs:
            for labels in value.get(self.space):
                self.space.fix(labels, reason)

    def _constants(self, call: Call, outputs: list[Tensor], inputs: list[Value]) -> list[Tensor] | None:
        """What the outputs are, where the inputs are known."""
        known: list[Tensor] = []
        for value in inputs:
            if value.constant is None:
                return None
            known.append(value.constant)
        return computed(call.name, call.func, call.args, call.kwargs, outputs, known)


def _reason(inputs: list[Value]) -> str:
    """Why axes of a result carry no labels: anything computed from bare tensors alone keeps their reason."""
    for value in inputs:
        if value.parameter is None and not value.fields:
            return value.why
    return UNSPANNED


class Watch(TorchFunctionMode):
    """Sees tensors leave torch, on real devices; the meta device lets none go."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in LEAVES and args and isinstance(args[0], Tensor):
            return self.recorder.leave(name, args[0], lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def _source_line() -> str:
    """The innermost line outside torch and niwaki."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename.replace("\\", "/")
        if "/torch/" not in path and "/niwaki/graph/" not in path and not path.startswith("<"):
            return f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown line"
