"""What a score is, and the verb that applies one to every group."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, ClassVar, Literal, final, get_args, get_origin, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from niwaki.errors import InputError, NotFiniteError, Setting
from niwaki.evidence import Checked, Evidence, GroupView, Need, need_numbers, views
from niwaki.graph import ChannelGraph

Merge = Literal["joint", "sum", "mean", "max"]
Over = Literal["all", "out", "in"]


class Score(ABC):
    """One number per unit from the unit's slices; higher = keep. Knows no layer types."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.WEIGHT})
    deterministic: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, view: GroupView) -> Float[Tensor, " units"]:
        """Scores of the units of one group."""


@final
@dataclass(frozen=True, eq=False)
class Scores:
    """One number per unit for every group that can be cut; higher = keep."""

    values: dict[str, Tensor]
    """Group name -> `[units]`, float64 on the CPU."""
    how: dict[str, Any]
    """Which score with which settings."""
    missing: tuple[str, ...] = ()
    """Groups the score can't judge (say, no batch norm for its scale); they are left whole."""


def score(graph: ChannelGraph, evidence: Evidence, *, how: Score) -> Scores:
    """Apply `how` to every group that can be cut.

    Raises:
        InputError: the score needs gradients or curvature that the evidence does not have, or weights of a model on
            the meta device.
        NotFiniteError: a score is NaN.

    Examples:
        >>> import torch, niwaki
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 1, bias=False))
        >>> graph = niwaki.trace(net, torch.zeros(1, 2))
        >>> evidence = niwaki.collect(net, graph, frozenset())
        >>> list(niwaki.score(graph, evidence, how=niwaki.scores.Magnitude()).values)
        ['0#2']
    """
    for need, held, what in (
        (Need.GRADIENT, evidence.gradients, "gradients"),
        (Need.CURVATURE, evidence.curvature, "curvature"),
    ):
        if need in how.needs and held is None:
            found = f"the evidence has no {what}"
            raise InputError(f"score by {type(how).__name__}", found=found, do="collect(..., how.needs)")
    weights = evidence.weights.weights if isinstance(evidence.weights, Checked) else evidence.weights
    if how.needs and isinstance(weights, dict):  # what is on disk holds numbers
        used = {axis.tensor for axis in graph.axes}
        need_numbers({n: t for n, t in weights.items() if n in used}, f"score by {type(how).__name__}")
    values: dict[str, Tensor] = {}
    missing = []
    for view in views(graph, evidence):
        numbers = how(view)
        if numbers.numel() == 0:
            missing.append(view.group.name)
            continue
        numbers = numbers.detach().to("cpu", torch.float64)
        if bool(torch.isnan(numbers).any()):
            raise NotFiniteError(
                f"score {type(how).__name__}", found="NaN", where=f"group {view.group.name}", do="check the weights"
            )
        values[view.group.name] = numbers
    return Scores(values, describe(how), tuple(missing))


def describe(block: Any) -> dict[str, Any]:
    """Name and settings of a block, as plain data."""
    settings = asdict(block) if is_dataclass(block) and not isinstance(block, type) else {}
    return {"name": type(block).__name__, **settings}


def known(block: Any, **choices: tuple[str, ...]) -> None:
    """Refuse settings outside their known values.

    Raises:
        InputError: names the setting and what it may be.
    """
    for name, allowed in choices.items():
        if getattr(block, name) not in allowed:
            raise InputError(
                f"{type(block).__name__}({name}={getattr(block, name)!r})",
                found=f"known: {', '.join(allowed)}",
                do="use one",
            )


KINDS: dict[Any, tuple[str, str]] = {
    bool: ("neither True nor False", "give one of them"),
    int: ("no whole number", "give one"),
    float: ("no number", "give one"),
}
"""What is said of a setting that is of another type."""


def fitting(block: Any) -> None:
    """Refuse settings of another type than their field's, and those outside its known values.

    Of types: `bool`, `int`, `float` (whole numbers fit) and `Literal`; others are not looked at.

    Raises:
        InputError: names the setting, and what it may be.
    """
    for name, kind in get_type_hints(type(block)).items():
        value = getattr(block, name)
        if get_origin(kind) is Literal:
            known(block, **{name: get_args(kind)})
        elif kind in KINDS:
            kinds = (int, float) if kind is float else (kind,)
            if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
                found, do = KINDS[kind]
                said = Setting(name, value, "" if value is not None else f"{name}=None")
                raise InputError((f"{type(block).__name__} with ", said), found=found, do=do)


MERGES = ("joint", "sum", "mean", "max")


def merged(numbers: list[Tensor], how: Merge, power: float) -> Tensor:
    """Combine the numbers of coupled slices, each `[units]`, into one per unit.

    "joint" is the norm of all slices laid end to end: `(sum n^p)^(1/p)`.
    """
    table = torch.stack([n.double() for n in numbers])  # [members, units]
    if how == "joint":
        return table.pow(power).sum(0).pow(1 / power)
    if how == "sum":
        return table.sum(0)
    if how == "mean":
        return table.mean(0)
    return table.amax(0)
