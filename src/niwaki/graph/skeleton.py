"""Copies of a model that share nothing with it but what they are told to: the one way niwaki copies models."""

import contextlib
import copy
import copyreg
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import CannotCutError

ATOMS = frozenset({int, float, bool, str, bytes, complex, type(None), type, torch.dtype, torch.device})
"""Types whose values are copies of themselves."""
META = torch.device("meta")
USUAL = frozenset({Tensor, nn.Parameter})
TABLES = frozenset({dict, OrderedDict, set, list})
TENSORS = frozenset({"_parameters", "_buffers"})
OWNED = frozenset({*TENSORS, "_modules"})
"""Tables of every module, from names to tensors and modules."""
HOOKS = frozenset(vars(nn.Module())) - OWNED
"""Torch's own tables of a module, which are nobody else's."""
FIRST = tuple(vars(nn.Module()))
"""Names that torch gives every module first."""
BARE = {name: type(table) for name, table in vars(nn.Module()).items() if name in HOOKS and type(table) in TABLES}
"""Those of torch's own tables, empty as long as nobody hooks in."""
ADDED = {
    nn.Module.__setstate__: frozenset(vars(nn.Module())) - {"training"},
    nn.modules.conv._ConvNd.__setstate__: frozenset(vars(nn.Module())) - {"training"} | {"padding_mode"},
}
"""Ways of torch's to set a module's attributes that only add those that are not there, and which these may be."""


def walk(model: nn.Module, *, every_name: bool = False) -> list[tuple[str, nn.Module]]:
    """Modules and their paths, each once unless `every_name`; as torch's `named_modules` without its nested generators.

    Large models have thousands of modules and are walked many times.
    """
    found = [("", model)]
    _visit("", model, found, None if every_name else {id(model)})
    return found


def _visit(prefix: str, module: nn.Module, found: list[tuple[str, nn.Module]], seen: set[int] | None) -> None:
    """Add the parts of a module to `found`, but for those `seen`. A function within `walk` that calls itself would be a
    cycle, and hold every module until Python looks for those.
    """
    for name, part in module._modules.items():
        if part is None:
            continue
        if seen is not None:
            if id(part) in seen:
                continue
            seen.add(id(part))
        found.append((prefix + name, part))
        if part._modules:
            _visit(f"{prefix}{name}.", part, found, seen)


Rest = list[tuple[dict[str, Any], str, Any]]
"""Attributes that are still to be copied: where they go, by which name, and what they are."""


def copy_with(model: nn.Module, change: Callable[[Tensor], Tensor], ties: "Ties | None" = None) -> nn.Module:
    """A deep copy in which every parameter, buffer and loose tensor `t` is `change(t)`, made once for each tensor.

    No tensor is copied on the way. Tensors held under several names stay one tensor; `ties` knows which they are.

    Raises:
        CannotCutError: the model's Python objects can't be copied.
    """
    memo: dict[int, Any] = {}
    twin_of = _twins(memo, change, ties)
    modules = [module for _, module in walk(model)]
    if all(map(_leaves_copying, {type(module) for module in modules})) and not any(map(_says_how, modules)):
        return _copied_plainly(model, modules, memo, twin_of)
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                twin_of(tensor)
        for name, value in list(vars(module).items()):
            kind = type(value)
            if kind in ATOMS or (kind in TABLES and not value) or name in OWNED or _flat(value):
                continue
            for tensor in _loose(value, 3):
                twin_of(tensor)
    try:
        return _copied(model, memo)
    except Exception as error:
        raise _uncopied(model, error) from error


def _copied_plainly(
    model: nn.Module, modules: list[nn.Module], memo: dict[int, Any], twin_of: Callable[[Tensor], Tensor]
) -> nn.Module:
    """`copy.deepcopy` of modules that all leave copying to Python, in one pass through their attributes."""
    plain: list[tuple[nn.Module, dict[str, Any]]] = []
    for module in modules:
        twin = memo[id(module)] = object.__new__(type(module))
        plain.append((twin, vars(twin) if type(module).__setstate__ in ADDED else {}))
    odd: Rest = []
    for module, (_, state) in zip(modules, plain, strict=True):
        odd += _fill(state, vars(module), memo, twin_of)
        parts = state["_modules"]
        for name, part in parts.items():
            parts[name] = None if part is None else memo[id(part)]
    _copy_rest(model, odd, memo, twin_of)
    try:
        for twin, state in reversed(plain):
            added = ADDED.get(type(twin).__setstate__)
            if added is None or not added <= state.keys():
                twin.__setstate__(state)  # type: ignore[operator]
    except Exception as error:
        raise _uncopied(model, error) from error
    made: nn.Module = memo[id(model)]
    return made


def _copy_rest(model: nn.Module, rest: Rest, memo: dict[int, Any], twin_of: Callable[[Tensor], Tensor]) -> None:
    """Copy by Python what `_fill` left, with the twins of the tensors in it."""
    for _, _, value in rest:
        for tensor in _loose(value, 3):
            twin_of(tensor)
    try:
        for state, name, value in rest:
            state[name] = copy.deepcopy(value, memo)
    except Exception as error:
        raise _uncopied(model, error) from error


def _fill(
    state: dict[str, Any], own: dict[str, Any], memo: dict[int, Any], twin_of: Callable[[Tensor], Tensor]
) -> Rest:
    """Put a module's attributes into `state`: what is plain as a copy, tensors as their twins, the table of modules as
    a new table of the same modules. Gives back where the rest lies, which is there as it was.
    """
    odd = []
    state.update(own)
    items: Iterable[tuple[str, Any]] = own.items()
    if tuple(itertools.islice(own, len(FIRST))) == FIRST and not any(map(own.__getitem__, BARE)):
        state.update([(name, kind()) for name, kind in BARE.items()])
        items = [(name, own[name]) for name in FIRST if name not in BARE]
        items += itertools.islice(own.items(), len(FIRST), None)
    for name, value in items:
        kind = type(value)
        if kind in ATOMS:
            continue
        if kind not in TABLES:
            if not _flat(value):
                odd.append((state, name, value))
        elif not value:
            state[name] = kind() if name in HOOKS else memo.setdefault(id(value), kind())
        elif name in TENSORS:
            state[name] = memo[id(value)] = kind((k, None if t is None else twin_of(t)) for k, t in value.items())
        elif name == "_modules" or (kind is list and id(value) not in memo and ATOMS.issuperset(map(type, value))):
            state[name] = memo[id(value)] = kind(value)
        else:
            odd.append((state, name, value))
    state.pop("_compiled_call_impl", None)
    return odd


def _twins(
    memo: dict[int, Any], change: Callable[[Tensor], Tensor], ties: "Ties | None" = None
) -> Callable[[Tensor], Tensor]:
    """What gives the twin of a tensor, made by `change`, one for all names of it, and puts it into `memo`."""
    made: dict[Any, Tensor] = {}
    ties = ties or Ties()

    def twin(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            key = ties.key(tensor)
            if key not in made:
                made[key] = change(tensor)
            memo[id(tensor)] = made[key]
        found: Tensor = memo[id(tensor)]
        return found

    return twin


def readied(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> nn.Module:
    """`model` (a copy) without hooks and caches, in evaluation mode: what is looked at. `modules` are its modules,
    where somebody has them already.
    """
    modules = modules or [module for _, module in walk(model)]
    return evaluating(without_caches(without_hooks(model, modules), modules), modules)


def evaluating(model: nn.Module, modules: Sequence[nn.Module]) -> nn.Module:
    """`model.eval()`, at once where no module has ways of its own."""
    kinds = {type(module) for module in modules}
    own = any(kind.train is not nn.Module.train or kind.eval is not nn.Module.eval for kind in kinds)
    if own or not all("training" in vars(module) for module in modules):
        return model.eval()
    for module in modules:
        vars(module)["training"] = False
    return model


@contextlib.contextmanager
def lent(model: nn.Module, note: Callable[[Tensor, Tensor], None], modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """`model` itself, whose `modules` these are, ready to be traced and without memory for as long as the block runs;
    then it is as it was.

    What `copy_with` makes anew is made anew here too, but for the modules, which only get other attributes meanwhile.
    `note` is told every tensor and its stand-in.

    Raises:
        CannotCutError: the model's Python objects can't be copied.
    """
    own = [(module, vars(module)) for module in modules]
    memo: dict[int, Any] = {id(module): module for module in modules}

    def made(tensor: Tensor) -> Tensor:
        new = to_meta(tensor)
        note(tensor, new)
        return new

    stand_in = _twins(memo, made)
    odd: Rest = []
    try:
        for module, state in own:
            lease: dict[str, Any] = {}
            odd += _fill(lease, state, memo, stand_in)
            object.__setattr__(module, "__dict__", lease)
        _copy_rest(model, odd, memo, stand_in)
        yield readied(model, modules)
    finally:
        for module, state in own:
            object.__setattr__(module, "__dict__", state)


def _uncopied(model: nn.Module, error: Exception) -> CannotCutError:
    return CannotCutError(
        f"copy a {type(model).__name__}",
        found=f"{type(error).__name__}: {error}",
        do="make the model's attributes copyable (copy.deepcopy must accept it)",
    )


def _flat(value: Any) -> bool:
    """A tuple of plain values, which is a copy of itself: strides, kernel sizes."""
    return type(value) is tuple and ATOMS.issuperset(map(type, value))


def _copied(module: nn.Module, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy` of a module. Where the module leaves copying to Python, its tables of tensors and modules, known
    to be just that, are copied here and not entry by entry through Python's general machinery.
    """
    if id(module) in memo:
        return memo[id(module)]
    own = _copies_itself(module) or type(module) in copyreg.dispatch_table
    reduced = None if own else module.__reduce_ex__(4)
    plain = (copyreg.__newobj__, (type(module),))  # type: ignore[attr-defined]
    if not isinstance(reduced, tuple) or reduced[:2] != plain or any(reduced[3:]) or type(reduced[2]) is not dict:
        return copy.deepcopy(module, memo)
    twin = memo[id(module)] = type(module).__new__(type(module))
    state: dict[str, Any] = {}
    for name, value in reduced[2].items():
        kind = type(value)
        if kind in ATOMS or _flat(value):
            state[name] = value
        elif kind is list and id(value) not in memo and ATOMS.issuperset(map(type, value)):
            state[name] = memo[id(value)] = list(value)
        elif kind not in TABLES or id(value) in memo or (value and name not in OWNED):
            state[name] = copy.deepcopy(value, memo)
        else:
            table = state[name] = memo[id(value)] = kind()
            for key in value:
                part = value[key]
                if id(part) in memo:
                    table[key] = memo[id(part)]
                else:
                    table[key] = _copied(part, memo) if isinstance(part, nn.Module) else copy.deepcopy(part, memo)
    if hasattr(twin, "__setstate__"):
        twin.__setstate__(state)
    else:
        twin.__dict__.update(state)
    return twin


def _copies_itself(module: nn.Module) -> bool:
    """Whether a module has a `__deepcopy__`; asked of its class and itself, since torch looks long for what is not
    there, but where it has a way of its own to find attributes.
    """
    kind = type(module)
    if kind.__getattr__ is not nn.Module.__getattr__ or kind.__getattribute__ is not object.__getattribute__:
        return hasattr(module, "__deepcopy__")
    return hasattr(kind, "__deepcopy__") or "__deepcopy__" in vars(module)


def _leaves_copying(kind: type[nn.Module]) -> bool:
    """Whether modules of this class leave copying to Python, which makes an empty one and copies attribute by
    attribute.
    """
    usual = (
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__new__ is object.__new__
        and kind.__getattribute__ is object.__getattribute__
        and kind.__getattr__ is nn.Module.__getattr__
        and kind.__getstate__ is nn.Module.__getstate__  # type: ignore[attr-defined]
    )
    own = any(hasattr(kind, name) for name in ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__"))
    more = issubclass(kind, (list, dict)) or copyreg._slotnames(kind)  # type: ignore[attr-defined]
    return usual and not own and not more and kind not in copyreg.dispatch_table


def _says_how(module: nn.Module) -> bool:
    """Whether a module itself says how it is copied, or keeps its parts in a table of its own kind."""
    state = vars(module)
    return "__deepcopy__" in state or "__reduce_ex__" in state or type(state["_modules"]) not in TABLES


def named_tensors(model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Parameters and buffers under every name they have, as torch lists them, in one walk through the modules."""
    return listed(model)[:2]


def listed(model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]], set[str]]:
    """`named_tensors`, and the names of the buffers that no state dict holds (`persistent=False`)."""
    parameters: list[tuple[str, Tensor]] = []
    buffers: list[tuple[str, Tensor]] = []
    passing: set[str] = set()
    for path, module in walk(model, every_name=True):
        prefix = f"{path}." if path else ""
        for name, tensor in module._parameters.items():
            if tensor is not None:
                parameters.append((prefix + name, tensor))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffers.append((prefix + name, buffer))
        for name in module._non_persistent_buffers_set:
            passing.add(prefix + name)
    return parameters, buffers, passing


def identity(tensor: Tensor) -> Any:
    """Equal for tensor objects that are the same memory in the same shape: tied parameters, however they were tied."""
    if tensor.numel() == 0 or tensor.layout != torch.strided:
        return id(tensor)
    storage = tensor.untyped_storage()._cdata
    return (
        storage,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        is_parameter(tensor),
    )


class Ties:
    """Keys of tensors, equal where `identity` is: only of what lies in one memory is more than that looked at."""

    def __init__(self) -> None:
        self.first: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []  # as long as they live, no other object has their id
        self.beside: dict[int, list[Tensor]] = {}
        """Memory, and the tensors that lie in it besides the first, otherwise than that one."""

    def key(self, tensor: Tensor) -> Any:
        if tensor.layout is not torch.strided or not tensor.numel():
            self.kept.append(tensor)
            return "alone", id(tensor)
        memory = tensor.untyped_storage()._cdata
        first = self.first.setdefault(memory, tensor)
        if first is tensor:
            return memory
        mine = identity(tensor)
        if mine == identity(first):
            return memory
        self.beside.setdefault(memory, []).append(tensor)
        return mine

    def overlapping(self) -> list[tuple[Tensor, Tensor]]:
        """Tensors that share numbers with another one without being the same: views that a module keeps."""
        found = []
        for memory, others in self.beside.items():
            listed = sorted([(*_extent(tensor), i) for i, tensor in enumerate((self.first[memory], *others))])
            tensors, end, last = (self.first[memory], *others), 0, -1
            for first, stop, i in listed:
                if first < end and identity(tensors[i]) != identity(tensors[last]):
                    found += [(tensors[i], tensors[last]), (tensors[last], tensors[i])]
                if stop > end:
                    end, last = stop, i
        return found


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of its memory that a tensor has a part in, and the one after the last."""
    first = tensor.storage_offset() * tensor.itemsize
    steps = sum((int(size) - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(first), int(first) + (steps + 1) * tensor.itemsize


def is_parameter(tensor: Tensor) -> bool:
    """The same as `isinstance`, which is Python code for parameters, where the type alone tells."""
    kind = type(tensor)
    return kind is nn.Parameter or (kind is not Tensor and isinstance(tensor, nn.Parameter))


def _loose(value: Any, depth: int) -> list[Tensor]:
    """Tensors in plain attributes, lists and dicts of a module."""
    if isinstance(value, Tensor):
        return [value]
    if depth and isinstance(value, (list, tuple)):
        return [t for item in value for t in _loose(item, depth - 1)]
    if depth and type(value) is dict:
        return [t for item in value.values() for t in _loose(item, depth - 1)]
    return []


def like(tensor: Tensor, data: Tensor) -> Tensor:
    """`data` as the same kind of tensor (parameter or plain) with the same `requires_grad`."""
    if is_parameter(tensor):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def to_meta(tensor: Tensor) -> Tensor:
    """A stand-in without memory; tensor subclasses (quantised, sharded) are refused by torch itself."""
    data = tensor if type(tensor) in USUAL else tensor.detach()
    return like(tensor, torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device=META))


def shared(tensor: Tensor) -> Tensor:
    """The same memory for parameters and constants; buffers too (tracing runs in eval mode and restores them)."""
    return like(tensor, tensor.detach())


def without_hooks(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> nn.Module:
    """`model` (a copy) without the forward hooks that users registered: they expect real numbers, and each call counts.

    Hooks that torch itself defines stay: weight and spectral norm compute their weight in one. So do those of the
    package that the model is from: its forward may go on with what they take down.
    """
    package, dot, _ = type(model).__module__.partition(".")
    packages = {"torch", package} if dot else {"torch"}  # what stands in a file alone is the user's
    for module in modules or [module for _, module in walk(model)]:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _package(hook) not in packages]:
                del hooks[key]
    return model


def without_caches(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> nn.Module:
    """`model` (a copy) without tensors that earlier forwards kept for later ones: they are of the old widths.

    What a module keeps in evaluation mode it has to drop when it goes into training mode, or training would use what
    is out of date: that is its own `train`, which is asked here, and the modes are as before.
    """
    modules = modules or [module for _, module in walk(model)]
    owners = [module for module in modules if type(module).train is not nn.Module.train]
    keeping = [m for m in owners if any(_loose(value, 3) for name, value in vars(m).items() if name not in OWNED)]
    if keeping:
        modes = [(module, module.training) for module in modules]
        for module in keeping:
            module.train()
        for module, mode in modes:
            module.training = mode
    return model


def _package(hook: Any) -> str:
    """Where a hook's function, or the class that it is an instance of, comes from."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").partition(".")[0]
