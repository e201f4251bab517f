"""What one head of several is asked for: its loss, its sums over batches, and the metrics made of them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from niwaki.errors import InputError

NEAR = 1.25
"""Depths whose ratio is below count as right; Eigen et al. 2014, arXiv:1406.2283, sec. 4."""
CLOSE = 11.25
"""Degrees up to which a normal counts as right; the smallest of the usual three."""


class Figure(NamedTuple):
    """One metric of a head."""

    value: float
    unit: str
    definition: str


class Head(ABC):
    """One output of a network with several: of which kind it is, under which name, and what its loss counts."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the output and of its target in a batch."""

    @property
    @abstractmethod
    def weight(self) -> float:
        """What the loss is multiplied by."""

    @property
    def nonnegative(self) -> bool:
        """Whether the loss is never below 0 on any batch; False of heads that do not say so."""
        return False

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss over positions that have a target; 0 where none has."""

    @abstractmethod
    def sums(self, output: Tensor, target: Tensor) -> Float[Tensor, " sums"]:
        """What the metrics are made of, added up over batches; float64."""

    @abstractmethod
    def figures(self, sums: Float[Tensor, " sums"]) -> dict[str, Figure]:
        """Metrics by name: first the usual one, last the one in percent, higher is better."""

    @property
    @abstractmethod
    def higher(self) -> bool:
        """Whether the first of the figures is better when it is higher."""


@final
@dataclass(frozen=True)
class Segmentation(Head):
    """A class for each pixel: output [batch, classes, h, w], target [batch, h, w]. Cross-entropy; mean intersection
    over union, over classes that are there or guessed.

    Raises:
        InputError: fewer than two classes, or shapes that do not fit.
    """

    classes: int
    """How many, from 2."""
    name: str = "segmentation"
    weight: float = 1.0
    """Of the loss, above 0."""
    ignore: int = 255
    """The target of a pixel without a class."""

    def __post_init__(self) -> None:
        _weighted(self)
        if self.classes < 2:
            raise InputError(f"Segmentation(classes={self.classes})", do="give at least two classes")

    @property
    def nonnegative(self) -> bool:
        return True

    @property
    def higher(self) -> bool:
        return True

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        output, target = self._fitted(output, target)
        total = functional.cross_entropy(output.float(), target, ignore_index=self.ignore, reduction="sum")
        return total / (target != self.ignore).sum().clamp(min=1)

    def sums(self, output: Tensor, target: Tensor) -> Float[Tensor, " sums"]:
        output, target = self._fitted(output, target)
        there = target != self.ignore
        if bool((there & ((target < 0) | (target >= self.classes))).any()):
            found = f"targets from {int(target[there].min())} to {int(target[there].max())}"
            raise InputError(f"{self.classes} classes of {self.name}", found=found, do="number them from 0")
        pairs = target[there] * self.classes + output.argmax(1)[there]
        return torch.bincount(pairs, minlength=self.classes**2).double()

    def figures(self, sums: Float[Tensor, " sums"]) -> dict[str, Figure]:
        pairs = sums.view(self.classes, self.classes)  # [target, guessed]
        both, either = pairs.diag(), pairs.sum(0) + pairs.sum(1) - pairs.diag()
        seen = either > 0
        share = (both[seen] / either[seen]).mean().item() if bool(seen.any()) else float("nan")
        said = f"mean intersection over union of {int(seen.sum())} of {self.classes} classes that are there or guessed"
        return {"miou": Figure(100 * share, "%", f"{said}, {int(sums.sum())} pixels")}

    def _fitted(self, output: Tensor, target: Int[Tensor, "batch h w"]) -> tuple[Tensor, Tensor]:
        target = target.to(output.device).long()
        wanted = (len(target), self.classes, *target.shape[1:])
        if tuple(output.shape) != wanted:
            raise _unfit(self.name, output, wanted)
        return output, target


@final
@dataclass(frozen=True)
class Boundary(Head):
    """Whether a pixel lies on a boundary: output [batch, 1, h, w] or [batch, h, w], above 0 for yes; target 1, 0, or
    `ignore`. Binary cross-entropy; the F-measure of pixels on the boundary, at an output of 0, nothing forgiven.

    Raises:
        InputError: a weight of pixels not above 0, shapes that do not fit.
    """

    name: str = "boundary"
    weight: float = 1.0
    """Of the loss, above 0."""
    positive: float = 1.0
    """What a pixel on a boundary counts in the loss beside one off it: boundaries are few."""
    ignore: int = 255
    """The target of a pixel that counts nowhere."""

    def __post_init__(self) -> None:
        _weighted(self)
        if not 0 < self.positive < float("inf"):
            raise InputError(f"Boundary(positive={self.positive!r})", do="give a weight above 0")

    @property
    def nonnegative(self) -> bool:
        return True

    @property
    def higher(self) -> bool:
        return True

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        output, target, there = self._fitted(output, target)
        wanted = (target == 1).float()
        each = functional.binary_cross_entropy_with_logits(output.float(), wanted, reduction="none")
        weights = there * (1 + (self.positive - 1) * wanted)
        return (each * weights).sum() / weights.sum().clamp(min=1e-12)

    def sums(self, output: Tensor, target: Tensor) -> Float[Tensor, " sums"]:
        output, target, there = self._fitted(output, target)
        told, right = (output > 0)[there], (target == 1)[there]
        return torch.stack([(told & right).sum(), told.sum(), right.sum(), there.sum()]).double()

    def figures(self, sums: Float[Tensor, " sums"]) -> dict[str, Figure]:
        both, told, right, count = sums.tolist()
        share = _over(2 * both, told + right)
        where = f"{int(right)} of {int(count)} pixels on a boundary"
        return {"f1": Figure(100 * share, "%", f"F-measure of pixels told to lie on a boundary; {where}")}

    def _fitted(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        target = target.to(output.device).long()
        plain = output.squeeze(1) if output.dim() == 4 and output.shape[1] == 1 else output
        if plain.shape != target.shape:
            raise _unfit(self.name, output, tuple(target.shape))
        return plain, target, target != self.ignore


@final
@dataclass(frozen=True)
class Depth(Head):
    """A distance for each pixel: output [batch, 1, h, w] or [batch, h, w], target alike, above 0 where it is known.
    Mean absolute difference; mean relative difference, and the share of pixels whose ratio is below 1.25.

    Source of the metrics: Eigen et al. 2014, arXiv:1406.2283, sec. 4.

    Raises:
        InputError: shapes that do not fit.
    """

    name: str = "depth"
    weight: float = 1.0
    """Of the loss, above 0."""

    def __post_init__(self) -> None:
        _weighted(self)

    @property
    def nonnegative(self) -> bool:
        return True

    @property
    def higher(self) -> bool:
        return False

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        output, target, there = self._fitted(output, target)
        return _mean((output - target).abs(), there)

    def sums(self, output: Tensor, target: Tensor) -> Float[Tensor, " sums"]:
        output, target, there = self._fitted(output, target)
        guess, right = output[there].double(), target[there].double()
        ratio = torch.maximum(guess / right, right / guess.clamp(min=1e-12))
        parts = (((guess - right).abs() / right).sum(), (ratio < NEAR).sum(), torch.as_tensor(right.numel()))
        return torch.stack([part.double().to(guess.device) for part in parts])

    def figures(self, sums: Float[Tensor, " sums"]) -> dict[str, Figure]:
        apart, near, count = sums.tolist()
        where = f"over {int(count)} pixels with a depth"
        return {
            "abs_rel": Figure(_over(apart, count), "", f"mean of |guess - depth| / depth {where}"),
            "delta1": Figure(
                100 * _over(near, count), "%", f"share with max(guess / depth, inverse) below {NEAR} {where}"
            ),
        }

    def _fitted(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        target = target.to(output.device)
        plain, wanted = [t.squeeze(1) if t.dim() == 4 and t.shape[1] == 1 else t for t in (output, target)]
        if plain.shape != wanted.shape:
            raise _unfit(self.name, output, tuple(target.shape))
        return plain.float(), wanted.float(), (wanted > 0) & wanted.isfinite()


@final
@dataclass(frozen=True)
class Normals(Head):
    """A direction for each pixel: output and target [batch, 3, h, w] of any length; a target of length 0 is unknown.
    One minus the cosine; mean angle in degrees, and the share within 11.25 degrees.

    Raises:
        InputError: shapes that do not fit.
    """

    name: str = "normals"
    weight: float = 1.0
    """Of the loss, above 0."""

    def __post_init__(self) -> None:
        _weighted(self)

    @property
    def higher(self) -> bool:
        return False

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        cosine, there = self._fitted(output, target)
        return _mean(1 - cosine, there)

    def sums(self, output: Tensor, target: Tensor) -> Float[Tensor, " sums"]:
        cosine, there = self._fitted(output.double(), target)
        angle = cosine[there].clamp(-1, 1).acos().rad2deg()
        return torch.stack([angle.sum(), (angle <= CLOSE).sum().double(), there.sum().double()])

    def figures(self, sums: Float[Tensor, " sums"]) -> dict[str, Figure]:
        angles, close, count = sums.tolist()
        where = f"over {int(count)} pixels with a normal"
        return {
            "angle": Figure(_over(angles, count), "degrees", f"mean angle between guess and normal {where}"),
            "within": Figure(100 * _over(close, count), "%", f"share within {CLOSE} degrees {where}"),
        }

    def _fitted(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if output.shape != target.shape or output.dim() != 4 or output.shape[1] != 3:
            raise _unfit(self.name, output, (len(target), 3, *target.shape[2:]))
        wide = output if output.dtype == torch.float64 else output.float()
        target = target.to(wide.device, wide.dtype)
        return functional.cosine_similarity(wide, target, dim=1), target.square().sum(1) > 0


def _mean(apart: Tensor, there: Tensor) -> Tensor:
    """Over the pixels that are there; 0 where none is."""
    return torch.where(there, apart, 0.0).sum() / there.sum().clamp(min=1)


def _over(total: float, count: float) -> float:
    return total / count if count else float("nan")


def _weighted(head: Any) -> None:
    if not 0 < head.weight < float("inf"):
        raise InputError(f"{type(head).__name__}(weight={head.weight!r})", do="give a weight above 0")


def _unfit(name: str, output: Tensor, wanted: tuple[int, ...]) -> InputError:
    do = "put out one value for each pixel of the target (nothing is resized)"
    return InputError(f"{name} of shape {wanted}", found=f"output of shape {tuple(output.shape)}", do=do)
