"""Settings of training that belong together, as small frozen values, and how they are read from plain data."""

import math
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, final, get_args, get_origin, get_type_hints

import torch

from niwaki.errors import InputError, UnknownNameError

PRECISIONS = ("fp32", "bf16", "fp16")
Made = TypeVar("Made")


def in_range(block: Any, limits: dict[str, tuple[bool, str]]) -> None:
    """Refuse the first setting of a block that is out of its range.

    Raises:
        InputError: names the setting, its value and what it may be.
    """
    for name, (right, wanted) in limits.items():
        if not right:
            value = getattr(block, name)
            asked, found = f"{type(block).__name__}({name}={value!r})", f"{value!r}, which is out of range"
            raise InputError(asked, found=found, do=f"give a value {wanted}")


@final
@dataclass(frozen=True)
class Drops:
    """Where the schedule "step" lets the rate fall, and how far.

    Source: He et al. 2016, arXiv:1512.03385, sec. 4.2 (a tenth, at half and three quarters of the training).

    Raises:
        InputError: shares that do not rise within (0, 1), a factor outside (0, 1).
    """

    at: tuple[float, ...] = (0.5, 0.75)
    """Shares of all steps, rising."""
    factor: float = 0.1
    """What the rate is multiplied by at each."""

    def __post_init__(self) -> None:
        rising = bool(self.at) and all(a < b for a, b in zip((0.0, *self.at), (*self.at, 1.0), strict=True))
        in_range(
            self,
            {"at": (rising, "of rising shares between 0 and 1"), "factor": (0 < self.factor < 1, "between 0 and 1")},
        )


@final
@dataclass(frozen=True)
class Ema:
    """An exponential moving average of the weights: a = d a + (1 - d) w after each step t, d = min(decay, t / (t + 9)).

    Buffers that count (of batch norm) are taken as they are; floating ones are averaged too.

    Source: Polyak and Juditsky 1992, doi:10.1137/0330046, in the exponential form of Tarvainen and Valpola 2017,
    arXiv:1703.01780, eq. 1. The rising decay is that of TensorFlow's ExponentialMovingAverage: (1 + n) / (10 + n) for
    n = t - 1.

    Raises:
        InputError: a decay outside (0, 1).
    """

    decay: float = 0.999
    """Weight of the past, in (0, 1); 0.999 looks back some thousand steps."""
    ramp: bool = True
    """Let the decay rise as t / (t + 9), so that short trainings are not mostly their start."""
    returned: bool = True
    """Whether the model ends with the averages, and is validated with them."""

    def __post_init__(self) -> None:
        in_range(self, {"decay": (0 < self.decay < 1, "between 0 and 1")})

    def at(self, step: int) -> float:
        """The decay of a step, counted from 1.

        Examples:
            >>> Ema(0.5).at(1), Ema(0.5).at(100), Ema(0.5, ramp=False).at(1)
            (0.1, 0.5, 0.5)
        """
        return min(self.decay, step / (step + 9)) if self.ramp else self.decay


@final
@dataclass(frozen=True)
class Mix:
    """Pictures of a batch mixed in pairs, and their labels with them; for tasks that say how many `classes` there are.

    Where both are given, each batch takes one or the other, as probable.

    Source: mixup of Zhang et al. 2018, arXiv:1710.09412, eq. 1; cutmix of Yun et al. 2019, arXiv:1905.04899, eq. 1, 2.
    Differs: one share for the whole batch, which is mixed with itself in another order (as in the authors' code).

    Raises:
        InputError: a setting below 0, or nothing to mix by.
    """

    mixup: float = 0.2
    """Both parameters of the beta distribution of the share; 0 is no mixup."""
    cutmix: float = 0.0
    """Both parameters of the beta distribution of the rectangle's share; 0 is no cutmix, 1 is usual."""
    probability: float = 1.0
    """Share of batches that are mixed, in (0, 1]."""

    def __post_init__(self) -> None:
        limits = {name: (0 <= getattr(self, name) < math.inf, "0 or more") for name in ("mixup", "cutmix")}
        in_range(self, limits | {"probability": (0 < self.probability <= 1, "in (0, 1]")})
        if self.mixup == 0 and self.cutmix == 0:
            raise InputError(
                "Mix(mixup=0, cutmix=0)", found="nothing to mix by", do="leave it out, or give one of them"
            )


@final
@dataclass(frozen=True)
class Speed:
    """How a step is computed; the weights themselves stay as they are (float32 as a rule).

    Source: Micikevicius et al. 2018, arXiv:1710.03740 (half precision with a scaled loss).

    Raises:
        UnknownNameError: an unknown precision or backend.
    """

    precision: str = "fp32"
    """"fp32", "bf16", or "fp16" with a scaled loss: of the operations that torch.autocast knows to bear it."""
    channels_last: bool = False
    """Weights and pictures in the memory order that convolutions like on GPUs, while training."""
    compile: str | bool | None = None
    """A backend of torch.compile; True is "inductor", None or False none. Another order of sums: not the same bits."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UnknownNameError.of("precision", self.precision, PRECISIONS)
        if isinstance(self.compile, bool):
            object.__setattr__(self, "compile", "inductor" if self.compile else None)
        if self.compile is not None and self.compile not in torch.compiler.list_backends(exclude_tags=()):
            # those for debugging are taken, and not advised
            raise UnknownNameError.of("backend of torch.compile", str(self.compile), torch.compiler.list_backends())


@final
@dataclass(frozen=True)
class Validation:
    """The task's metric on its validation split while training, to stop by and to keep the best checkpoint by.

    Source: stopping with patience as in Prechelt 1998, doi:10.1007/3-540-49430-8_3.

    Raises:
        InputError: a setting below 1.
    """

    every: int = 1
    """Epochs between two looks; there is always one after the last epoch."""
    patience: int | None = None
    """Stop after this many looks in a row without a better value; None never stops early."""
    lower: bool = False
    """Whether lower is better (perplexity), not higher (accuracy)."""
    limit: int | None = None
    """Samples to look at; None for the whole split."""

    def __post_init__(self) -> None:
        limits = {name: (getattr(self, name) is None or getattr(self, name) >= 1, "of at least 1")
                  for name in ("every", "patience", "limit")}  # fmt: skip
        in_range(self, limits)


@final
@dataclass(frozen=True)
class Checkpoints:
    """What a killed run goes on from, in `checkpoints` of the training's folder; see `niwaki.train.checkpoints`.

    Raises:
        InputError: a count below 1, or fewer best ones than 0.
    """

    every_steps: int | None = None
    """Steps from one to the next, besides after the last epoch; None writes one after each epoch."""
    keep_last: int = 2
    """How many of the newest stay; two, so that one is left where the newest turns out damaged."""
    keep_best: int = 1
    """How many of those with the best validation stay besides; 0 keeps none for being good."""

    def __post_init__(self) -> None:
        every, last, best = self.every_steps, self.keep_last, self.keep_best
        limits = {
            "every_steps": (every is None or every >= 1, "of at least 1, or None"),
            "keep_last": (last >= 1, "of at least 1"),
            "keep_best": (type(best) is int and best >= 0, "of 0 or more: how many stay"),
        }
        in_range(self, limits)


def from_plain(kind: type[Made], data: Any, where: str) -> Made:
    """A settings value from JSON-like data; `true` for a group stands for its defaults.

    Raises:
        UnknownNameError: a setting that does not exist; the known ones are listed.
        InputError: a value of another type.
    """
    if data is True:
        data = {}
    if not isinstance(data, dict):
        raise InputError(f"{where} = {data!r}", found=f"a {type(data).__name__}", do="give its settings by name")
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            raise UnknownNameError.of(f"setting of {where}", name, known)
    return kind(**{name: _read(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _read(hint: Any, value: Any, where: str) -> Any:
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for choice in choices:
        if choice is NoneType:
            if value is None:
                return None
        elif is_dataclass(choice):
            if value is not None:
                return from_plain(choice, value, where)  # type: ignore[arg-type]
        elif get_origin(choice) is tuple:
            if isinstance(value, (list, tuple)) and all(_number(item) for item in value):
                return tuple(float(item) for item in value)
        elif choice is float:
            if _number(value):
                return float(value)
        elif isinstance(value, choice) and (choice is bool or not isinstance(value, bool)):
            return value
    wanted = " or ".join(map(_said, choices))
    raise InputError(f"{where} = {value!r}", found=f"a {type(value).__name__}", do=f"give a value of type {wanted}")


def _said(kind: Any) -> str:
    """A type as a message calls it; of several numbers how they are written."""
    if kind is NoneType:
        return "none"
    return "numbers, written [0.3,0.6]" if get_origin(kind) is tuple else str(getattr(kind, "__name__", kind))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
