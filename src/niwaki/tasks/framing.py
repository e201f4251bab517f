"""How pictures of any size become pictures of one size, and boxes go there and back."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, final, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from niwaki.boxes import Boxes
from niwaki.errors import InputError, UnknownNameError

Fit = Literal["letterbox", "squash"]
GREY = 114
"""Of 255: what YOLO detectors are trained to see around a picture."""


class Entry(Protocol):
    """A picture in a file, and what is on it; `niwaki.data.Annotated` is one."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def boxes(self) -> Boxes: ...

    @property
    def ignored(self) -> Tensor: ...

    @property
    def areas(self) -> Tensor: ...


class BoxPictures(Protocol):
    """Pictures with boxes; `niwaki.data.BoxPictures` is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Any: ...

    def picture(self, number: int, height: int, width: int) -> Tensor: ...


@final
@dataclass(frozen=True)
class Place:
    """Where in a frame a picture lies, in pixels."""

    left: int
    top: int
    width: int
    height: int
    across: float
    """Pixels of the frame for one of the picture, from left to right."""
    down: float
    """The same from top to bottom."""


@final
@dataclass(frozen=True)
class Framing:
    """A frame that every picture is fitted into.

    Raises:
        InputError: a side below 1.
        UnknownNameError: another fit.
    """

    height: int
    width: int
    fit: Fit = "letterbox"
    """"letterbox" keeps proportions and puts grey around; "squash" fills the frame (darknet)."""

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise InputError(f"a frame of {self.width} x {self.height}", do="give sides of at least 1 pixel")
        if self.fit not in get_args(Fit):
            raise UnknownNameError.of("fit", self.fit, get_args(Fit))

    def place(self, width: int, height: int) -> Place:
        """Of a picture in the frame."""
        if self.fit == "squash":
            return Place(0, 0, self.width, self.height, self.width / width, self.height / height)
        scale = min(self.width / width, self.height / height)
        inner = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (self.width - inner[0]) // 2, (self.height - inner[1]) // 2
        return Place(left, top, *inner, inner[0] / width, inner[1] / height)

    def framed(self, pictures: BoxPictures, number: int) -> tuple[UInt8[Tensor, "3 h w"], Boxes]:
        """A picture in the frame, and the boxes on it that are to be learned, in pixels of the frame."""
        one: Entry = pictures[number]
        place = self.place(one.width, one.height)
        frame = torch.full((3, self.height, self.width), GREY, dtype=torch.uint8)
        rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
        frame[:, rows, columns] = pictures.picture(number, place.height, place.width)
        return frame, moved(learned(one), place)


def learned(one: Entry) -> Boxes:
    """The boxes of a picture that are not to be ignored."""
    return Boxes(one.boxes.corners[~one.ignored], one.boxes.labels[~one.ignored])


def moved(boxes: Boxes, place: Place) -> Boxes:
    """Boxes of a picture, in pixels of the frame."""
    scale, offset = _arithmetic(place, boxes.corners)
    return Boxes(boxes.corners * scale + offset, boxes.labels)


def moved_back(corners: Float[Tensor, "n 4"], place: Place, width: int, height: int) -> Float[Tensor, "n 4"]:
    """Corners in a frame, in pixels of the picture that lies there, none outside of it."""
    scale, offset = _arithmetic(place, corners)
    limits = corners.new_tensor([width, height, width, height])
    return ((corners - offset) / scale).clamp(min=0).minimum(limits)


def _arithmetic(place: Place, like: Tensor) -> tuple[Tensor, Tensor]:
    scale = like.new_tensor([place.across, place.down, place.across, place.down])
    return scale, like.new_tensor([place.left, place.top, place.left, place.top])
