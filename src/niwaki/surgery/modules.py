"""Integers that modules keep: the declared sizes of torch's own modules, and mends of anybody's by evidence."""

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from niwaki.graph.skeleton import walk
from niwaki.surgery.attention import CutMultiheadAttention
from niwaki.surgery.evidence import Changes

Mend = dict[str, Any]
"""{"module": path, "attribute": name, "value": new value}"""


class Option(NamedTuple):
    """Integers that are decided together."""

    places: list[tuple[str, str]]
    """Module paths and attributes."""
    choices: list[Any]
    """What they may become, the likeliest first."""


Modules = Iterable[tuple[str, nn.Module]]
"""Modules and their paths."""


def declare(modules: Modules, touched: set[str], groups: Mapping[str, int]) -> list[Mend]:
    """Set the declared sizes of torch's own modules whose tensors changed, from the shapes of those tensors.

    `groups` has the number of groups that a grouped call in a module is left with (module path -> groups).
    """
    mends: list[Mend] = []
    for path, module in modules:
        if not _touched(path, module, touched):
            continue
        for attribute, value in declared(module, groups.get(path)).items():
            if hasattr(module, attribute) and getattr(module, attribute) != value:
                setattr(module, attribute, value)
                mends.append({"module": path, "attribute": attribute, "value": value})
    return mends


def _touched(path: str, module: nn.Module, touched: set[str]) -> bool:
    prefix = f"{path}." if path else ""
    return any(prefix + name in touched for name in (*module._parameters, *module._buffers)) or (
        "parametrizations" in module._modules and any(name.startswith(prefix) for name in touched)
    )


def declared(module: nn.Module, groups: int | None = None) -> dict[str, Any]:
    """Sizes a torch module declares, as its tensors have them now; `groups` where the trace counted them."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return {"in_features": weight.shape[1], "out_features": weight.shape[0]}  # type: ignore[union-attr]
    if isinstance(module, nn.modules.conv._ConvNd):
        inner, outer = (0, 1) if module.transposed else (1, 0)
        shape, g = module.weight.shape, groups or module.groups
        return {
            "in_channels": shape[inner] * (1 if module.transposed else g),
            "out_channels": shape[outer] * (g if module.transposed else 1),
            "groups": g,
        }
    if isinstance(module, (nn.modules.batchnorm._NormBase,)):
        size = next((t.shape[0] for t in (module.weight, module.running_mean) if t is not None), None)
        return {"num_features": size} if size is not None else {}
    if isinstance(module, nn.LayerNorm) or (hasattr(nn, "RMSNorm") and isinstance(module, nn.RMSNorm)):
        return {"normalized_shape": tuple(weight.shape)} if weight is not None else {}
    if isinstance(module, nn.GroupNorm):
        return (
            {"num_channels": weight.shape[0], "num_groups": groups or module.num_groups} if weight is not None else {}
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}
    if isinstance(module, nn.Bilinear):
        return {
            "out_features": module.weight.shape[0],
            "in1_features": module.weight.shape[1],
            "in2_features": module.weight.shape[2],
        }
    if isinstance(module, nn.RNNBase):
        first, recurrent = module._parameters["weight_ih_l0"], module._parameters["weight_hh_l0"]
        assert first is not None and recurrent is not None
        return {"input_size": first.shape[1], "hidden_size": recurrent.shape[1]}
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
    if isinstance(module, CutMultiheadAttention):  # set as a whole when it was made
        return {
            name: getattr(module, name)
            for name in ("num_heads", "embed_dim", "head_dim", "kdim", "vdim", "query_width")
        }
    if isinstance(module, nn.PReLU):
        return {"num_parameters": module.weight.shape[0]}
    return {}


def settings(module: nn.Module) -> frozenset[str]:
    """Attributes of a torch module that `declared` answers for, its widths and what is none (stride, layers), and those
    of poolings, which have no widths."""
    if not isinstance(module, POOLINGS) and not declared(module):
        return frozenset()
    kind: Any = type(module)
    return _arguments(kind)


POOLINGS = tuple(
    kind for kind in vars(nn.modules.pooling).values() if getattr(kind, "__module__", "") == "torch.nn.modules.pooling"
)
"""What torch pools by."""


@cache
def _arguments(kind: Any) -> frozenset[str]:
    """What the class of torch that `kind` is or derives from is made with, and what it makes of its padding."""
    own = next(base for base in kind.__mro__ if base.__module__.startswith("torch.nn."))
    return frozenset(inspect.signature(own).parameters) | {"_reversed_padding_repeated_twice"}


NEVER = frozenset({bool, float, str, type(None), dict, OrderedDict, set})
"""Types of attributes that are no whole numbers."""
MOST_PARTS = 16
"""An integer may be this fraction of a number that changed: heads of a width, bins of four sides."""


def options(modules: Modules, changes: Changes) -> list[Option]:
    """Integers of modules that may have to change with the numbers seen there: those that equal one that changed, whose
    likeliest choice is that it changed too, and those that are a part of one, which are likelier to stay.

    Modules of one class in which the same number has the same choices are decided together.
    """
    found: dict[Any, Option] = {}
    for path, module in modules:
        home = path
        while home and home not in changes:  # asked by a method and not called: what it computes ran in who holds it
            home = home.rpartition(".")[0]
        table = changes.get(home, {})
        if not table:
            continue
        fixed: frozenset[str] | None = None
        for attribute, value in vars(module).items():
            if type(value) in NEVER or attribute == "_version":
                continue
            choices = _choices(value, table)
            if len(choices) > 1 or (choices and choices[0] != value):
                fixed = settings(module) if fixed is None else fixed
                if attribute in fixed:
                    continue
                key = (type(module).__qualname__, attribute, repr(value), repr(choices))
                found.setdefault(key, Option([], choices)).places.append((path, attribute))
    return list(found.values())


def _choices(value: Any, table: Mapping[int, set[int]]) -> list[Any]:
    """What an attribute may become, the likeliest first."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        if value <= 1:
            return []
        changed = [n for n in sorted(table.get(value, ())) if n != value]
        wholes = [(n, n // value) for n in table if n % value == 0 and 1 < n // value <= MOST_PARTS]
        parts = sorted({new // k for n, k in wholes for new in table[n] if new != n and new % k == 0})
        return [*changed, value, *[n for n in parts if n not in (value, *changed)][:3]] if changed or parts else []
    if isinstance(value, (list, tuple)) and 0 < len(value) <= 8 and all(type(item) is int for item in value):
        if max(value) <= 1:
            return []
        each = [_choices(item, table) or [item] for item in value]
        if all(len(part) == 1 for part in each):
            return []
        picks = [type(value)(pick) for pick in list(product(*each))[:8]]
        # a shape is mostly what a forward remembers of its last input, and finds anew
        return [value, *(pick for pick in picks if pick != value)] if isinstance(value, torch.Size) else picks
    return []


@contextlib.contextmanager
def reading(asked: Iterable[tuple[type[nn.Module], str]]) -> Iterator[set[tuple[type[nn.Module], str]]]:
    """Classes of modules and attributes of their instances -> those that are read while the block runs.

    What the class itself has by that name counts as read.
    """
    read = {(kind, name) for kind, name in asked if any(name in vars(base) for base in kind.__mro__)}
    watched = set(asked) - read
    for kind, name in watched:
        setattr(kind, name, _Watched(kind, name, read))
    try:
        yield read
    finally:
        for kind, name in watched:
            delattr(kind, name)


class _Watched:
    """Stands in a class for an attribute that its instances hold, and notes that it is read."""

    def __init__(self, kind: type[nn.Module], name: str, read: set[tuple[type[nn.Module], str]]) -> None:
        self.kind, self.name, self.read = kind, name, read

    def __get__(self, module: nn.Module | None, kind: Any = None) -> Any:
        if module is None or self.name not in vars(module):
            raise AttributeError(f"{self.kind.__name__} has no attribute {self.name!r}")
        self.read.add((self.kind, self.name))
        return vars(module)[self.name]

    def __set__(self, module: nn.Module, value: Any) -> None:
        vars(module)[self.name] = value

    def __delete__(self, module: nn.Module) -> None:
        if self.name not in vars(module):
            raise AttributeError(self.name)
        del vars(module)[self.name]


def apply_mends(model: nn.Module, mends: list[Mend] | tuple[Mapping[str, Any], ...]) -> None:
    """Set attributes; lists from JSON become tuples where the attribute is a tuple."""
    modules = dict(walk(model)) if mends else {}
    for mend in mends:
        module, value = modules[mend["module"]], mend["value"]
        now = getattr(module, mend["attribute"])
        if now is None:  # only a forward sets it
            continue
        if not (_whole(now) and _whole(value)):
            raise TypeError(f"{mend['module']}.{mend['attribute']} = {value!r} is no mend of a whole number")
        setattr(
            module,
            mend["attribute"],
            type(now)(value) if isinstance(now, (list, tuple)) and not isinstance(value, type(now)) else value,
        )


def _whole(value: Any) -> bool:
    """A whole number, or a list or tuple of them."""
    if isinstance(value, (list, tuple)):
        return all(type(item) is int for item in value)
    return type(value) is int
