"""What the calls of an ATen operator have in common: its rule, and what its schema says of it."""

from functools import cache
from typing import Any, NamedTuple

from niwaki.graph.rules import RULES
from niwaki.graph.rules.pointwise import is_pointwise, meet

TRAINED = ("native_batch_norm",)
NORMS = ("_native_batch_norm_legit_no_training", *TRAINED)
"""Shape-preserving on the meta device, with two empty results besides."""

SILENT = (
    "_assert_async",
    "_assert_tensor_metadata",
    "sym_size",
    "is_same_size",
    "_assert_scalar",
    "_has_compatible_shallow_copy_type",
)
READS = ("_local_scalar_dense", "equal", "is_nonzero", "allclose")
"""Calls whose answer is a number."""


class Operator(NamedTuple):
    """What calls of an operator have in common."""

    func: Any
    name: str
    rule: Any
    kind: str
    """The module that its rule is from, or nothing where there is none."""
    norm: bool
    """Whether it is a norm whose result is like its input."""
    reads: bool
    """Whether its answer is a number."""
    view: bool
    """Whether a result shares the memory of the first tensor given."""
    slots: tuple[tuple[int | None, str], ...]
    """Place and name of every argument that it writes to; no place where it is given by name only."""

    @classmethod
    def of(cls, func: Any) -> "Operator":
        name = func.overloadpacket.__name__
        rule = find_rule(func, name)
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        slots = tuple(
            (None if argument.kwarg_only else i, argument.name)
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        return cls(func, name, rule, "" if rule is None else rule.__module__, name in NORMS, name in READS, view, slots)


def trains(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a norm takes the statistics of what comes in."""
    return name in TRAINED and len(args) > 5 and bool(args[5])


_is_pointwise = cache(is_pointwise)


def find_rule(func: Any, name: str) -> Any:
    """The rule of an operator; an in-place variant takes the rule of the operator it is a variant of."""
    for known in (name, name.removesuffix("_")):
        if known in RULES:
            return RULES[known]
    return meet if _is_pointwise(func, name) else None
