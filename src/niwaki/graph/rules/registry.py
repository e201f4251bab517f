"""What a rule gets (a call with its arguments by name) and where rules are registered."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from niwaki.graph.cost import Term
from niwaki.graph.labels import LabelSpace, varying
from niwaki.graph.values import Labels, Value


@cache
def signature(func: Any) -> dict[str, tuple[int | None, Any]]:
    """Arguments of an operator by name: the place of each, unless it is keyword-only, and its default."""
    return {
        arg.name: (None if arg.kwarg_only else i, arg.default_value) for i, arg in enumerate(func._schema.arguments)
    }


def argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """What a call of `func` gives for the argument of this schema name, or its default."""
    place, default = signature(func)[name]
    given = args[place] if place is not None and place < len(args) else default
    return kwargs.get(name, given)


class Call:
    """One operator call during the trace.

    `call["dim"]` is an argument by its schema name; `call.value(tensor)` is what is known about a tensor.
    """

    def __init__(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, recorder: Any
    ) -> None:
        self.func, self.args, self.kwargs, self.result = func, args, kwargs, result
        self.name = name
        self.space: LabelSpace = recorder.space
        self.recorder = recorder
        self.zero = False
        """Set by the rule: whether removed elements of the result are zero when the parameters are zeroed."""
        self.picked: list[list[np.ndarray]] = []
        """For each moved result, labels of single positions, which lie on no axis any more."""
        self.terms: list[Term] = []
        self.operands: list[Value] | None = None
        self._named = signature(func)
        self._shape: tuple[int, ...] | None = None

    def __getitem__(self, name: str) -> Any:
        place, default = self._named[name]
        if self.kwargs and name in self.kwargs:
            return self.kwargs[name]
        return self.args[place] if place is not None and place < len(self.args) else default

    def has(self, name: str) -> bool:
        return name in self._named

    def value(self, tensor: Tensor) -> Value:
        return self.recorder.value(tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) result."""
        if self._shape is None:
            made = self.result
            first = made if isinstance(made, Tensor) else next(t for t in made if isinstance(t, Tensor))
            self._shape = tuple(first.shape)
        return self._shape

    def fix(self, labels: np.ndarray, reason: str) -> None:
        self.space.fix(labels, reason)

    def drop(self, labels: np.ndarray, axes: tuple[int, ...]) -> np.ndarray | None:
        """What is left of `labels` when `axes` are summed away (kept at size 1): slabs of the others, or nothing."""
        rest = tuple(axis for axis in varying(labels) if axis not in axes)
        if len(rest) == len(varying(labels)):
            return labels
        return self.space.marker(labels, rest) if rest else None


Rule = Callable[[Call], "Labels | list[Labels] | None"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of these names (all overloads)."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register
