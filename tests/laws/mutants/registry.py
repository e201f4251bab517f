"""What a planted bug is, and how bugs are planted."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from niwaki.graph.rules import RULES

Patch = pytest.MonkeyPatch
MUTANTS: list["Mutant"] = []


@dataclass(frozen=True)
class Mutant:
    """A planted bug: how to plant it, and which law finds it on which networks."""

    name: str
    plant: Callable[[Patch], None]
    law: str
    cases: tuple[str, ...]


def mutant(law: str, *cases: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def register(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS.append(Mutant(plant.__name__, plant, law, cases))
        return plant

    return register


def module(name: str) -> Any:
    """The module object, also where a function of the same name hides it."""
    return importlib.import_module(f"niwaki.{name}")


def wrap(patch: Patch, place: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace `place.name` by `change(original, ...)`."""
    patch.setattr(place, name, partial(change, getattr(place, name)))


def set_rule(patch: Patch, name: str, rule: Callable[..., Any]) -> None:
    """Another rule for the calls of this name: they are looked up anew in every trace."""
    patch.setitem(RULES, name, rule)


def wrap_rule(patch: Patch, names: tuple[str, ...], change: Callable[..., Any]) -> None:
    """Replace the rules of calls by `change(original, call)`."""
    for name in names:
        if name in RULES:
            set_rule(patch, name, partial(change, RULES[name]))


def first_n(tensor: Tensor, cuts: Any) -> Tensor:
    """The right shape, the wrong slice."""
    for cut in cuts:
        if cut.get("blocks", 1) == 1:
            tensor = tensor.narrow(cut["axis"], 0, len(cut["keep"]))
    return tensor.clone()
