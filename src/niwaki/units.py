"""The data types of the channel graph's public face, and the one way to call a model on an example."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from niwaki.errors import Setting

SMALLEST = 1e-6
"""Outputs below this may be what is left of larger numbers that cancelled, with their rounding."""
ROUNDING = 1e-9
"""By how much, in counts, a product of a share and a count may be beside the whole number that is meant."""
Example = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]


@final
class Needed(str):
    """A name to protect that the source of a network gave, not its user; says who, and why.

    Examples:
        >>> name = Needed("head.2", "protected by the zoo: its loss counts on all 16")
        >>> name == "head.2", name.why
        (True, 'protected by the zoo: its loss counts on all 16')
    """

    why: str

    def __new__(cls, name: str, why: str = "protected by the network's source") -> "Needed":
        made = super().__new__(cls, name)
        made.why = why
        return made


def run(model: nn.Module, example: Any) -> Any:
    """Call `model` on `example`: a tensor or a list is one argument, a tuple several, a dict keyword arguments."""
    if isinstance(example, dict):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)


def share_up(share: float, count: float) -> int:
    """A share of so many, rounded up; what rounding in binary adds to a whole number counts for nothing.

    Examples:
        >>> 0.07 * 100, share_up(0.07, 100), share_up(0.071, 100), share_up(0.5, 3)
        (7.000000000000001, 7, 8, 2)
    """
    product = share * count
    return math.ceil(product - max(ROUNDING, 4 * math.ulp(product)))


def share_down(share: float, count: float) -> int:
    """A share of so many, rounded down, alike.

    Examples:
        >>> 0.29 * 100, share_down(0.29, 100), share_down(0.289, 100), share_down(0.5, 3)
        (28.999999999999996, 29, 28, 1)
    """
    product = share * count
    return math.floor(product + max(ROUNDING, 4 * math.ulp(product)))


def map_tensors(value: Any, change: Any) -> Any:
    """`value` with `change` applied to every tensor inside nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        items = {key: map_tensors(item, change) for key, item in value.items()}
        try:
            return type(value)(items)  # type: ignore[call-arg]
        except TypeError:
            return type(value)(**items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor inside nested tuples, lists, mappings and dataclass-like outputs, in order.

    What a model keeps for its next call in an object of its own (a key/value cache) is its state and no output.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in tensors_in(getattr(value, name))]
    return []


@final
@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one parameter or buffer, and which of its positions belong to the units of a group.

    `index[i]` is a position along the axis and `unit[i]` the number (within the group) of the unit that owns it.
    With `blocks > 1` (grouped convolutions) the axis of size `s` is listed once per block: position `b * s + j`.
    """

    tensor: str
    axis: int
    role: str
    """"out" produces the units, "in" consumes them, "scale"/"shift"/"stat" belong to a normalisation, else "other"."""
    blocks: int
    index: np.ndarray = field(repr=False)
    unit: np.ndarray = field(repr=False)


@final
@dataclass(frozen=True, eq=False)
class Group:
    """Units (slices that live or die together) with the same parameter axes, decided together."""

    name: str
    units: int
    members: tuple[Member, ...]
    fixed: str | None = None
    """Why nothing here can be removed, or None."""
    exact: bool = True
    """Whether removing units equals zeroing them, whatever the values."""
    inexact: str | None = None
    """Why not exact."""
    kind: str = "channels"
    """"channels", or "grid" where what stays must again be a grid (heads x head size, groups x channels)."""
    rows: int = 1
    """Rows of the grid (heads, convolution groups); 1 for plain channels."""
    multiple: int = 1
    """A kernel takes only multiples of this many units."""
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32), repr=False)
    """Numbers of the units in the graph's own count; `unit` of a member indexes this array."""


@final
@dataclass(frozen=True)
class Unknown:
    """An operation the graph has no rule for; what touched it is fixed."""

    operation: str
    module: str
    where: str


@final
@dataclass(frozen=True)
class DataRead:
    """A place where forward reads numbers out of a tensor. What it does then may depend on them: a branch that the
    example did not take was not seen.
    """

    operation: str
    module: str
    where: str

    def __str__(self) -> str:
        return f"{self.operation} in {self.module or 'the model'}, {self.where}"


def _said(name: str, value: Any) -> Setting:
    return Setting(name, value, f"Budget({name}={value!r})")


def _at_most(amount: Any, of: str) -> Setting:
    return Setting("budget", f"at_most={amount},of={of}", f"Budget.at_most({amount!r}, {of!r})")


@final
@dataclass(frozen=True)
class Budget:
    """How much stays. Several budgets given together hold jointly.

    Examples:
        >>> Budget(keep=0.5, of="macs")
        Budget(keep=0.5, of='macs', floor=1, multiple=1, absolute=False)
        >>> Budget.at_most(12.5, "latency")
        Budget(keep=12.5, of='latency', floor=1, multiple=1, absolute=True)
    """

    keep: float | int
    """A share in (0, 1] (float), or a count (int) of what stays, in the unit of `of`."""
    of: str = "macs"
    """"macs" (multiply-adds of the example), "params", "units", "bytes" (of parameters and buffers, as on disk),
    "memory" (bytes at the peak of a forward), or of a forward on a measured target "latency" (milliseconds) or "energy"
    (joules)."""
    floor: float | int = 1
    """What every group keeps at least: a count of units (int) or a share of the group (float)."""
    multiple: int = 1
    """Every cut group keeps a multiple of this many units, where it has that many."""
    absolute: bool = False
    """Whether `keep` is an amount in the unit of `of` whatever its type: what `at_most` sets."""

    @classmethod
    def at_most(cls, amount: float, of: str, *, floor: float | int = 1, multiple: int = 1) -> "Budget":
        """A budget of this many milliseconds, bytes, MACs, ...: `Budget.at_most(12.5, "latency")`.

        Raises:
            BudgetError: the amount is not above 0, or another part is wrong.
        """
        return cls(keep=amount, of=of, floor=floor, multiple=multiple, absolute=True)

    def __post_init__(self) -> None:
        from niwaki.errors import BudgetError

        share = isinstance(self.keep, float) and not self.absolute
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or self.keep != self.keep:
            raise BudgetError((_said("keep", self.keep),), found=type(self.keep).__name__, do="give a share or a count")
        if type(self.absolute) is not bool or (self.absolute and not 0 < self.keep < float("inf")):
            raise BudgetError((_at_most(self.keep, self.of),), found="no amount above 0", do="give what may be spent")
        if not self.absolute and ((share and not 0 < self.keep <= 1) or (not share and self.keep < 1)):
            raise BudgetError(
                (_said("keep", self.keep),),
                found="keep is what stays: a share in (0, 1] as a float or a count from 1 as an int",
                do=(
                    "to remove 30 % write ",
                    Setting("keep", 0.7),
                    "; for an amount such as 12.5 ms write ",
                    _at_most(12.5, "latency"),
                ),
            )
        if self.of not in BUDGET_KINDS:
            raise BudgetError((_said("of", self.of),), found=f"known: {', '.join(BUDGET_KINDS)}", do="use one of them")
        known = type(self.floor) in (int, float) and self.floor == self.floor
        if not known or (isinstance(self.floor, float) and not 0 < self.floor <= 1) or self.floor <= 0:
            raise BudgetError(
                (_said("floor", self.floor),), found="a count from 1 or a share in (0, 1]", do="change it"
            )
        if type(self.multiple) is not int or self.multiple < 1:
            raise BudgetError(
                (_said("multiple", self.multiple),), found="not a whole number from 1", do="use 1, 8, ..."
            )

    def limit(self, before: float) -> float:
        """The largest allowed cost, given the uncut cost; 0.29 of 100 are 29, though binary makes it a little less."""
        if self.absolute or not isinstance(self.keep, float):
            return float(self.keep)
        share = self.keep * before
        return float(round(share)) if math.isclose(share, round(share), rel_tol=2**-50) else share


def budgets_of(given: Any) -> tuple[Budget, ...]:
    """One budget or several as a tuple.

    Raises:
        BudgetError: something else, or none at all.
    """
    from niwaki.errors import BudgetError

    listed = (given,) if isinstance(given, Budget) else tuple(given) if isinstance(given, (list, tuple)) else ()
    if not listed or not all(isinstance(one, Budget) for one in listed):
        raise BudgetError(f"budget {given!r}", found=type(given).__name__, do="give a Budget, or a tuple of Budgets")
    return listed


BUDGET_KINDS = ("macs", "params", "units", "bytes", "memory", "latency", "energy")


def unit_of(kind: str) -> str:
    """The unit of a budget's kind, to be written behind an amount; nothing for counts, whose kind says it.

    Examples:
        >>> f"12.5{unit_of('latency')}", f"40{unit_of('units')}"
        ('12.5 ms', '40')
    """
    return {"bytes": " bytes", "memory": " bytes", "latency": " ms", "energy": " J"}.get(kind, "")


@final
@dataclass(frozen=True)
class Receipt:
    """What the judge found: the cut model against the masked original, in float64, on fresh inputs."""

    difference: float
    """Largest absolute difference of any output."""
    scale: float
    """Largest absolute value of the masked model's outputs, to judge the difference by."""
    exact: bool
    """Whether every removed unit is declared exact."""
    inexact: tuple[str, ...]
    """Groups whose removal changes values beyond zeroing, with the reason."""
    door: str
    """"eager" (the user's own class) or "exported" (a rewritten torch.export graph)."""
    inputs: int
    """How many fresh inputs were tried."""
    tolerance: float = 1e-9
    physical: bool = True
    """Whether the saving is real (fewer bytes, fewer operations) and not zeros in unchanged tensors."""
    numbers: int | None = None
    """How many numbers were compared, where they were counted: of the outputs, or, of a detector that found nothing,
    of what its parts put out in shapes that the cut left alone."""

    @property
    def passed(self) -> bool:
        """Exact plans must agree to `tolerance`, relative to `scale`; inexact ones must at least be finite.

        Where nothing could be compared, nothing passes.
        """
        if self.numbers == 0:
            return False
        finite = self.difference == self.difference and self.difference != float("inf")
        return finite and (not self.exact or agrees(self.difference, self.scale, self.tolerance))

    def to_json(self) -> dict[str, Any]:
        names = (
            "difference",
            "scale",
            "exact",
            "inexact",
            "door",
            "inputs",
            "tolerance",
            "physical",
            "numbers",
            "passed",
        )
        return {name: getattr(self, name) for name in names}


def agrees(difference: float, scale: float, tolerance: float) -> bool:
    """Whether a difference is rounding, beside numbers up to `scale`.

    Examples:
        >>> agrees(1e-10, 1.0, 1e-9), agrees(1e-10, 1e-3, 1e-9)
        (True, False)
    """
    return difference <= tolerance * max(SMALLEST, scale)


def need_module(model: Any, asked: str) -> None:
    """Refuse what is no network.

    Raises:
        InputError: `model` is not an nn.Module.
    """
    from niwaki.errors import InputError

    if not isinstance(model, nn.Module):
        raise InputError(
            asked,
            found=f"a {type(model).__name__}, not an nn.Module",
            do="give the network itself; wrap a function in a module whose forward calls it",
        )


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
