"""One network, evaluated again and again with other weights in some layer: what comes before that layer is not computed
again.

The forward is run as it is written, Python and all, under a `TorchDispatchMode` that sees every call of an operator.
Calls before the first one that touches a changed weight put out what they put out last time: the very tensors where
something later reads them, else stand-ins of their shape. From there on calls are made. What holds for one forward
holds for the next as long as the calls are the same, and what they put out has the sizes and the Python numbers that it
had, which is looked at; else everything is computed. Convolutions that are made are made the `quick` way.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from niwaki.search.quick import EMPTY, NORM, Quick

log = logging.getLogger(__name__)

NEAR = 1e-5
"""How near the losses of the quick way come to the plain one's, relative; else all is done the plain way."""
FEW, ALWAYS = 4096, 1 << 60
"""Whole numbers, up to so many of them, are always there: a forward may read them by ways that no mode sees."""
Key = tuple[int, int]
"""Which call, and which of its outputs."""


class _Stop(BaseException):
    """The forward has come to the call that it was to come to; no `except Exception` of a model may catch it."""


class _OtherWay(BaseException):
    """The forward made another call than the recorded one."""


@final
@dataclass(frozen=True, eq=False)
class _Shape:
    """A tensor's outside."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bytes: int
    """Of its memory, as far as it reaches."""


@final
@dataclass(frozen=True, eq=False)
class _Call:
    func: Any
    spec: TreeSpec
    outputs: tuple[Any, ...]
    """A `_Shape` for a new tensor, the number of the argument that it is, or a plain value."""


@final
@dataclass(eq=False)
class Tape:
    """The calls of one forward, and how long what they put out is needed."""

    calls: list[_Call] = field(default_factory=list)
    touched: dict[int, int] = field(default_factory=dict)
    """Memory of a parameter -> the first call that reads it."""
    last_read: dict[Key, int] = field(default_factory=dict)
    origin: dict[Key, Key] = field(default_factory=dict)
    """The output that first had the memory of this one."""
    writes: list[tuple[int, int]] = field(default_factory=list)
    """(the call that made some memory, a later call that wrote to it)"""
    outward: int | None = None
    """The first call that wrote to memory from before the forward: of a buffer, an input."""
    quick: dict[int, Quick] = field(default_factory=dict)
    """Convolutions that can be made faster."""
    norms: frozenset[int] = frozenset()
    """Norms that are folded into them."""

    def close(self) -> "Tape":
        """All calls are there: norms can be folded that alone read what their convolution puts out."""
        for number, one in self.quick.items():
            if one.after is not None and (self.outward is not None or self.last_read[number, 0] != one.after):
                one.norm, one.after = (), None
        self.norms = frozenset(one.after for one in self.quick.values() if one.after is not None)
        return self

    def start(self, changed: Sequence[Tensor], most: int) -> int:
        """The last call from which a forward can go on where these weights change, and hold at most `most` bytes.

        Between the making of some memory and the last write to it there is no such call, and none after a write to what
        was there before.
        """
        reads = [self.touched[memory] for memory in map(memory_of, changed) if memory in self.touched]
        first = min(reads, default=0)  # what no call was seen to read is read by ways that no mode sees
        if self.outward is not None:
            first = min(first, self.outward)
        held = [0] * (len(self.calls) + 2)  # bytes that are live before each call
        spans: dict[Key, tuple[int, int]] = {}
        for key, last in self.last_read.items():
            root = self.origin[key]
            low, high = spans.get(root, (key[0], 0))
            spans[root] = (min(low, key[0]), max(high, min(last, len(self.calls))))
        for root, (low, high) in spans.items():
            shape = self.calls[root[0]].outputs[root[1]]
            held[low + 1] += shape.bytes
            held[high + 1] -= shape.bytes
        bad = [0] * (len(self.calls) + 2)
        for made, write in self.writes:
            bad[made + 1] += 1
            bad[write + 1] -= 1
        best = live = open_ = 0
        for at in range(first + 1):
            live, open_ = live + held[at], open_ + bad[at]
            if not open_ and live <= most:
                best = at
        return best

    def live(self, at: int) -> frozenset[Key]:
        """What was put out before call `at` and is read from there on."""
        return frozenset(key for key, last in self.last_read.items() if key[0] < at <= last)


@final
class _Recorder(TorchDispatchMode):
    """Writes a tape."""

    def __init__(self, parameters: set[int], quick: bool) -> None:
        super().__init__()
        self.tape = Tape()
        self.parameters, self.quick = parameters, quick
        self.made: Any = WeakIdKeyDictionary()
        self.lies: dict[int, Key] = {}
        """Memory -> the output that has it, for what is made of outputs by ways no mode sees (`nn.Parameter(x)`)."""
        self.roots: dict[Key, int | None] = {}
        """Output that first had its memory -> the call that made this; None for a view of what was there before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tape, number = self.tape, len(self.tape.calls)
        given = [leaf for leaf in tree_flatten((args, kwargs or {}))[0] if isinstance(leaf, Tensor)]
        written = {id(tensor) for tensor in _written(func, args, kwargs or {})}
        quick = Quick.of(func, args, self._before) if self.quick else None
        out = func(*args, **(kwargs or {})) if quick is None else quick(args, folded=False)
        if quick is not None:
            tape.quick[number] = quick
        elif func is NORM:
            self._folded(number, args)
        for tensor in given:
            memory = memory_of(tensor)
            if memory in self.parameters:
                tape.touched.setdefault(memory, number)
            key = self._key(tensor)
            if key is not None:
                tape.last_read[key] = max(number, tape.last_read.get(key, 0))
            if id(tensor) not in written:
                continue
            made = None if key is None else self.roots[tape.origin[key]]
            if made is not None:
                tape.writes.append((made, number))
            elif tape.outward is None:
                tape.outward = number
        leaves, spec = tree_flatten(out)
        noted: list[Any] = []
        for place, leaf in enumerate(leaves):
            same = next((i for i, tensor in enumerate(given) if tensor is leaf), None)
            if same is not None or not isinstance(leaf, Tensor):
                noted.append(same if same is not None else _Plain(leaf))
                continue
            key = (number, place)
            base = next((t for t in given if memory_of(t) == memory_of(leaf)), None)
            root = self._key(base) if base is not None else None
            tape.origin[key] = key if root is None else tape.origin[root]
            if root is None:
                self.roots[key] = number if base is None else None
            self.made[leaf] = key
            if base is None:
                self.lies[memory_of(leaf)] = key
            if not leaf.is_floating_point() and leaf.numel() <= FEW:
                tape.last_read[key] = ALWAYS
            noted.append(
                _Shape(
                    tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.device, leaf.untyped_storage().nbytes()
                )
            )
        tape.calls.append(_Call(func, spec, tuple(noted)))
        return out

    def _key(self, tensor: Tensor) -> Key | None:
        found = self.made.get(tensor)
        return self.lies.get(memory_of(tensor)) if found is None else found

    def _before(self, tensor: Tensor) -> bool:
        return self._key(tensor) is None

    def _folded(self, number: int, args: Any) -> None:
        """Note the convolution that this norm could be folded into: the call before it but for what reads nothing."""
        key = self.made.get(args[0])
        if key is None or key[0] not in self.tape.quick or key in self.tape.last_read:
            return
        if all(call.func is EMPTY for call in self.tape.calls[key[0] + 1 :]):
            self.tape.quick[key[0]].follow(number, args, self._before)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that a call writes to, by its schema: their versions do not tell under a mode."""
    if not func._schema.is_mutable:
        return []
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_flatten(given)[0] if isinstance(leaf, Tensor)]
    return found


@final
@dataclass(frozen=True, eq=False)
class _Plain:
    """An output that is no tensor."""

    value: Any


@final
class _Player(TorchDispatchMode):
    """Goes through the first calls of a tape without making them."""

    def __init__(self, tape: Tape, begin: int, held: dict[Key, Tensor], stop: int | None = None) -> None:
        super().__init__()
        self.tape, self.begin, self.held, self.stop = tape, begin, held, stop
        self.number = -1
        self.wanted = frozenset() if stop is None else tape.live(stop)
        self.found: dict[Key, Tensor] = {key: held[key] for key in self.wanted if key in held}
        self.last = max(tape.norms, default=-1)
        """The last norm that is folded: up to there, calls have to be the recorded ones."""
        self.folded: tuple[int, Tensor] | None = None
        """The norm that has to come next, and what it is to put out."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        number = self.number
        if number == self.stop:
            raise _Stop
        if number >= self.begin and self.stop is None and number > self.last and number not in self.tape.quick:
            return func(*args, **(kwargs or {}))
        if number >= len(self.tape.calls) or self.tape.calls[number].func is not func:
            raise _OtherWay
        call = self.tape.calls[number]
        if number >= self.begin:
            out = self._made(number, call, func, args, kwargs or {})
            if self.stop is None:
                return out
            for place, (leaf, noted) in enumerate(zip(tree_flatten(out)[0], call.outputs, strict=True)):
                if not _alike(leaf, noted):
                    raise _OtherWay
                if (number, place) in self.wanted:
                    self.found[number, place] = leaf
            return out
        given: list[Tensor] | None = None
        leaves: list[Any] = []
        for place, noted in enumerate(call.outputs):
            if isinstance(noted, _Plain):
                leaves.append(noted.value)
            elif isinstance(noted, int):
                if given is None:
                    given = [leaf for leaf in tree_flatten((args, kwargs or {}))[0] if isinstance(leaf, Tensor)]
                leaves.append(given[noted])
            else:
                real = self.held.get((number, place))
                leaves.append(_stand_in(noted) if real is None else real.detach())  # a new tensor, as outputs are
        return tree_unflatten(leaves, call.spec)

    def _made(self, number: int, call: _Call, func: Any, args: Any, kwargs: Any) -> Any:
        """What a recorded call puts out, by the quick way where there is one."""
        if self.folded is not None and func is not EMPTY:
            norm, out = self.folded
            if norm != number or args[0] is not out:
                raise _OtherWay
            self.folded = None
            more = [torch.empty(one.size, dtype=one.dtype) for one in call.outputs[1:]]
            return tree_unflatten([out.detach(), *more], call.spec)  # a new tensor, as outputs are
        quick = self.tape.quick.get(number)
        if quick is None:
            return func(*args, **kwargs)
        if args[1] is not quick.weight or args[2] is not quick.bias:
            raise _OtherWay
        after = quick.after
        folded = after is not None and (self.stop is None or after < self.stop)
        out = quick(args, folded=folded)
        if after is not None and folded:
            self.folded = (after, out)
        return out


def _alike(leaf: Any, noted: Any) -> bool:
    """Whether an output may be taken for the recorded one: other values may have other sizes, or be other numbers."""
    if isinstance(noted, _Plain):
        return type(leaf) is type(noted.value) and bool(leaf == noted.value)
    return not isinstance(noted, _Shape) or (isinstance(leaf, Tensor) and tuple(leaf.shape) == noted.size)


_scratch: dict[torch.device, torch.UntypedStorage] = {}


def _stand_in(shape: _Shape) -> Tensor:
    """A tensor of this outside, over memory that all of them share: nothing reads it."""
    memory = _scratch.get(shape.device)
    if memory is None or memory.nbytes() < shape.bytes:
        memory = _scratch[shape.device] = torch.UntypedStorage(shape.bytes, device=shape.device)
        memory.fill_(255)  # type: ignore[attr-defined]  # NaN, should something read it by ways that no mode sees
    return torch.empty(0, dtype=shape.dtype, device=shape.device).set_(memory, 0, shape.size, shape.stride)  # type: ignore[call-overload]


def memory_of(tensor: Tensor) -> int:
    """Which memory a tensor lies in."""
    return tensor.untyped_storage()._cdata


@final
class Prefixes:
    """Evaluations of one function on several batches, under weights that change from some layer on.

    Args:
        losses: batch -> losses by task, of a network that stays the same object; deterministic.
        batches: what it is called on.
        parameters: the tensors that may change in place.
        memory: bytes that may be held for all batches together.
        quick: make convolutions the quick way; False where that failed.
    """

    def __init__(
        self,
        losses: Callable[[Any], dict[str, Tensor]],
        batches: Sequence[Any],
        parameters: Sequence[Tensor],
        memory: int,
        quick: bool = True,
    ) -> None:
        self.losses, self.batches, self.memory, self.quick = losses, batches, memory, quick
        self.parameters = {memory_of(tensor) for tensor in parameters}
        self.tapes: dict[Any, Tape | None] = {}
        """By the batch's outside; None by its number, where its forward goes another way."""
        self.held: dict[int, tuple[int, dict[Key, Tensor]]] = {}
        """Batch -> the call to go on from, and what is read from there on."""
        self.start: dict[int, int] = {}

    def record(self, number: int) -> dict[str, Tensor]:
        """Losses of a batch, its calls written down."""
        recorder = _Recorder(set(self.parameters), self.quick)
        try:
            with recorder:
                found = self.losses(self.batches[number])
        except Exception as error:
            if not self.quick:
                raise
            log.info("the forward is made as it is, since it asks for its tensors' order in memory: %s", error)
            self.quick = False
            return self.record(number)
        self.tapes[_outside(self.batches[number])] = recorder.tape.close()
        return found

    def proved(self) -> bool:
        """Whether the quick way says of the first batch what the plain one does; if not, it is left."""
        self.record(0)
        if self.quick:
            plain, quick = self.losses(self.batches[0]), self(0)
            near = (abs(float(quick[name]) - float(loss)) <= NEAR * abs(float(loss)) for name, loss in plain.items())
            self.quick = plain.keys() == quick.keys() and all(near) and self.tape(0) is not None
            if not self.quick:
                self.tapes.clear()
        return self.quick

    def tape(self, number: int) -> Tape | None:
        """That of a batch, where there is one."""
        return self.tapes.get(number, self.tapes.get(_outside(self.batches[number])))

    def begin(self, changed: Sequence[Tensor]) -> None:
        """From now on only these change; all others have the values that they had at the start."""
        for number, batch in enumerate(self.batches):
            if _outside(batch) not in self.tapes:
                self.record(number)
            tape = self.tape(number)
            self.start[number] = 0 if tape is None else tape.start(changed, self.memory // len(self.batches))

    def __call__(self, number: int) -> dict[str, Tensor]:
        """Losses of a batch under the weights as they are."""
        tape, start = self.tape(number), self.start.get(number, 0)
        if tape is None or (start == 0 and not tape.quick):
            return self.losses(self.batches[number])
        try:
            held = self._at(number, tape, start)
            player = _Player(tape, start, held)
            with player:
                found = self.losses(self.batches[number])
            if player.folded is not None:
                raise _OtherWay
            return found
        except _OtherWay:
            log.info("the forward goes another way on batch %d: all of it is computed", number)
            self.tapes[number] = None
            self.held.pop(number, None)
            return self.losses(self.batches[number])

    def _at(self, number: int, tape: Tape, start: int) -> dict[Key, Tensor]:
        """What is read from call `start` on, computed from the nearest place before that is known."""
        known, held = self.held.get(number, (0, {}))
        if known != start:
            if known > start:
                known, held = 0, {}
            player = _Player(tape, known, held, stop=start)
            self.held.pop(number, None)
            try:
                with player:
                    self.losses(self.batches[number])
            except _Stop:
                pass
            held = player.found
            self.held[number] = (start, held)
        return held


def _outside(batch: Any) -> Any:
    """What batches have in common whose forward may make the same calls."""
    leaves, spec = tree_flatten(batch)
    plain = (int, float, str, bytes, type(None))
    return tuple(
        (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x if isinstance(x, plain) else id(x) for x in leaves
    ), str(spec)
