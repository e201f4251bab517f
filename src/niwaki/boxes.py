"""Boxes on pictures: where things are, what they are, and how sure a detector is."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from niwaki.errors import InputError


@final
@dataclass(frozen=True, eq=False)
class Boxes:
    """The things on one picture.

    Raises:
        InputError: not four corners and one label for each box.

    Examples:
        >>> boxes = Boxes(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([0]))
        >>> len(boxes), boxes.areas.tolist()
        (1, [800.0])
    """

    corners: Float[Tensor, "n 4"]
    """Left, top, right, bottom of each box, in pixels of the picture; a whole picture is 0, 0, width, height."""
    labels: Int[Tensor, " n"]
    """Numbers of the classes, from 0."""

    def __post_init__(self) -> None:
        refuse_shapes(self.corners, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def areas(self) -> Float[Tensor, " n"]:
        """Square pixels of each box."""
        return areas_of(self.corners)

    def covered(self, size: tuple[int, int], cells: tuple[int, int]) -> Bool[Tensor, "rows columns"]:
        """Which cells of a grid over a picture of `size` (rows, columns) pixels some box reaches into; boxes without
        area reach into none.

        Examples:
            >>> boxes = Boxes(torch.tensor([[10.0, 0.0, 30.0, 5.0]]), torch.tensor([0]))
            >>> boxes.covered((40, 40), (2, 4)).int().tolist()  # cells of 20 rows and 10 columns
            [[0, 1, 1, 0], [0, 0, 0, 0]]
        """
        inside = [
            (torch.arange(count).to(self.corners) * step < self.corners[:, at + 2, None])
            & ((torch.arange(count).to(self.corners) + 1) * step > self.corners[:, at, None])
            for at, count, step in ((0, cells[1], size[1] / cells[1]), (1, cells[0], size[0] / cells[0]))
        ]
        real = (self.corners[:, 2:] > self.corners[:, :2]).all(1)
        return (inside[1][real, :, None] & inside[0][real, None, :]).any(0)

    def to(self, device: torch.device | str) -> "Boxes":
        """The same boxes on another device."""
        return Boxes(self.corners.to(device), self.labels.to(device))

    @classmethod
    def none(cls) -> "Boxes":
        """A picture of nothing but background."""
        return cls(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


@final
@dataclass(frozen=True, eq=False)
class Found:
    """What a detector sees on one picture.

    Raises:
        InputError: not four corners, one label and one score for each box.
    """

    corners: Float[Tensor, "n 4"]
    """Left, top, right, bottom of each box, in pixels of the picture."""
    labels: Int[Tensor, " n"]
    """Numbers of the classes, from 0."""
    scores: Float[Tensor, " n"]
    """How sure the detector is, in [0, 1]; the surest first."""

    def __post_init__(self) -> None:
        refuse_shapes(self.corners, self.labels)
        if self.scores.shape != self.labels.shape:
            found = f"{tuple(self.scores.shape)} scores for {len(self.labels)} boxes"
            raise InputError("what a detector found", found=found, do="give one score for each box")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Found":
        """The same on another device."""
        return Found(self.corners.to(device), self.labels.to(device), self.scores.to(device))


def areas_of(corners: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
    """Square pixels inside the corners."""
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


def refuse_shapes(corners: Tensor, labels: Tensor) -> None:
    """Refuse corners and labels that are no boxes.

    Raises:
        InputError: not `[n, 4]` and `[n]`.
    """
    if labels.dim() != 1 or tuple(corners.shape) != (len(labels), 4):
        found = f"corners {tuple(corners.shape)}, labels {tuple(labels.shape)}"
        raise InputError("boxes", found=found, do="give corners [n, 4] (left, top, right, bottom) and labels [n]")
