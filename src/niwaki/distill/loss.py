"""What a distillation loss is, and how it lays out outputs and features of any shape."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from niwaki.errors import InputError

Widths = Literal["equal", "any", "adapted"]


class Loss(ABC):
    """How far a student is from its teacher, in one number: 0 where they agree, never negative.

    It takes what both put out at one place: [batch, channels, height, width], [batch, tokens, width] or
    [batch, width]. Only the student's side gets gradients.
    """

    @property
    @abstractmethod
    def widths(self) -> Widths:
        """Whether both must have equally many channels, may differ, or are joined by a trained linear map."""

    @property
    @abstractmethod
    def channels(self) -> int | None:
        """The axis of the channels; None for the second of four or five axes, the last of two or three."""

    @abstractmethod
    def __call__(self, student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
        """The distance, in float32 at least."""


class Located(Loss):
    """A loss that can count where things lie only."""

    @property
    @abstractmethod
    def on_things(self) -> bool:
        """Whether it shall."""

    @abstractmethod
    def among(
        self,
        student: Float[Tensor, "batch ..."],
        teacher: Float[Tensor, "batch ..."],
        covered: Bool[Tensor, "batch rows columns"],
    ) -> Float[Tensor, ""]:
        """The distance at the cells that things cover, in the size of the distance everywhere."""


def cells_of(feature: Tensor, asked: int | None) -> tuple[int, int]:
    """Rows and columns of a feature.

    Raises:
        InputError: it has none, as tokens.
    """
    shape = tuple(feature.shape)
    at = channel_axis(shape, asked)
    rest = shape[1:at] + shape[at + 1 :]
    if len(rest) != 2:
        found, do = f"a feature of shape {shape}", "tap a place that puts out [batch, channels, rows, columns]"
        raise InputError("distil where things lie", found=found, do=do)
    return rest


def channel_axis(shape: tuple[int, ...], asked: int | None) -> int:
    """Where the channels of a feature of this shape lie.

    Raises:
        InputError: the shape has no such axis, or no channels at all.
    """
    if len(shape) < 2:
        raise InputError(
            "distil a feature", found=f"shape {shape}", do="tap a place that puts out [batch, channels, ...]"
        )
    if asked is None:
        return 1 if len(shape) > 3 else len(shape) - 1
    if not -len(shape) <= asked < len(shape) or asked % len(shape) == 0:
        do = "give the axis of the channels, from 1; the batch is axis 0"
        raise InputError(f"channels on axis {asked}", found=f"shape {shape}", do=do)
    return asked % len(shape)


def laid_out(
    student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."], axis: int | None
) -> tuple[Float[Tensor, "batch channels positions"], Float[Tensor, "batch theirs positions"]]:
    """Both with the channels second and all else last, in float32 at least; the teacher's without gradients.

    Raises:
        InputError: they differ in something else than the number of channels.
    """
    ours, theirs = tuple(student.shape), tuple(teacher.shape)
    if len(ours) != len(theirs):
        raise InputError("distil a feature", found=f"student {ours}, teacher {theirs}", do="tap places of one kind")
    at = channel_axis(ours, axis)
    if ours[:at] + ours[at + 1 :] != theirs[:at] + theirs[at + 1 :]:
        raise InputError(
            "distil a feature",
            found=f"student {ours}, teacher {theirs}; channels on axis {at}",
            do="tap places of the same batch and positions (nothing is resized), or give the axis of the channels",
        )
    return _laid(student, at), _laid(teacher.detach(), at)


def need_temperature(loss: Loss, temperature: float) -> None:
    """Refuse a temperature that is not above 0.

    Raises:
        InputError: it is not.
    """
    if not 0 < temperature < math.inf:
        raise InputError(f"{type(loss).__name__}(temperature={temperature!r})", do="give a temperature above 0")


def divergence(ours: Tensor, theirs: Tensor, temperature: float, *, axis: int) -> Tensor:
    """T^2 times the mean of KL(softmax(theirs / T) || softmax(ours / T)), softmax and divergence along an axis."""
    soft, target = (functional.log_softmax(scores / temperature, dim=axis) for scores in (ours, theirs))
    apart = functional.kl_div(soft, target, reduction="none", log_target=True).sum(axis)
    return temperature**2 * apart.mean()


def need_equal(student: Tensor, teacher: Tensor, what: str) -> None:
    """Refuse features `[batch, channels, positions]` with different numbers of channels.

    Raises:
        InputError: they differ.
    """
    if student.shape[1] != teacher.shape[1]:
        raise InputError(
            f"distil by {what}",
            found=f"{student.shape[1]} channels in the student, {teacher.shape[1]} in the teacher",
            do="give the plan the student was cut by, or Features(adapter=True) in Distilled(..., student=model)",
        )


def need_positions(feature: Tensor, what: str) -> None:
    """Refuse a feature `[batch, channels, positions]` of a single position.

    Raises:
        InputError: there is one position only.
    """
    if feature.shape[2] < 2:
        raise InputError(
            f"distil by {what}",
            found="one position: what is compared over positions is constant there",
            do="tap a place before the pooling, or use Features",
        )


def _laid(feature: Tensor, at: int) -> Tensor:
    wide = feature if feature.dtype == torch.float64 else feature.float()
    return wide.movedim(at, 1).flatten(2) if wide.dim() > 2 else wide.unsqueeze(2)
