"""Pictures with boxes as a reader gives them, and what becomes of boxes that are not right."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from niwaki.boxes import Boxes
from niwaki.data import some
from niwaki.data.pictures import Size, sizes_of
from niwaki.errors import FileDamagedError

log = logging.getLogger(__name__)
ROUNDING = 0.5
"""Pixels by which a box may reach over the edge without being counted: shares are written with few digits."""


class Drawn(NamedTuple):
    """One box as somebody drew it."""

    corners: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""
    label: int
    where: str
    """File and line, or what else leads to it."""
    ignored: bool = False
    """A crowd, or an object too hard to ask for: not learned, and no error whether found or not."""
    area: float | None = None
    """Square pixels of the object, where somebody says so; those of the box unless said."""


@final
@dataclass(frozen=True, eq=False)
class Annotated:
    """A picture in a file, and what is on it."""

    path: Path
    width: int
    height: int
    boxes: Boxes
    """In pixels of the picture as it is, however large it is used later."""
    ignored: Bool[Tensor, " n"]
    """Boxes that are not learned, and no error whether found or not."""
    areas: Float[Tensor, " n"]
    """Square pixels of the objects, to tell small from large."""
    stored: bool = False
    """Whether the annotations are of the pixels as stored, where the camera's tag would turn them upright."""


@dataclass
class Tally:
    """What was not right in the data and was put right; told once, kept with the record."""

    clipped: list[str] = field(default_factory=list)
    """Boxes that reached over the edge of their picture."""
    without_area: list[str] = field(default_factory=list)
    """Boxes of no width or height."""
    without_labels: list[str] = field(default_factory=list)
    """Pictures without a file of labels: they count as background."""
    without_pictures: list[str] = field(default_factory=list)
    """Files of labels whose picture is not there."""

    def tell(self, name: str) -> None:
        """Say it where warnings go."""
        for found, words in (
            (self.clipped, "boxes reached over the edge of their picture and were clipped"),
            (self.without_area, "boxes had no area and were left out"),
            (self.without_labels, "pictures have no file of labels and count as background"),
            (self.without_pictures, "files of labels have no picture and were left out"),
        ):
            if found:
                log.warning("%s: %d %s: %s", name, len(found), words, some(found, 3))

    def record(self) -> dict[str, int]:
        return {name: len(found) for name, found in vars(self).items() if found}


@final
@dataclass(frozen=True, eq=False)
class BoxSource:
    """What a reader of boxes found."""

    classes: tuple[str, ...]
    train: Sequence[Annotated]
    val: Sequence[Annotated] | None = None
    """The publisher's own validation part, where there is one."""
    test: Sequence[Annotated] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    """JSON-able, for the record."""


@dataclass(frozen=True)
class BoxReader(ABC):
    """Reads pictures with boxes from `place`."""

    place: Path
    takes: ClassVar[str]
    """What `place` is, in words."""
    place_name: ClassVar[str] = "FILE"

    @abstractmethod
    def read(self, tally: Tally, **more: Path) -> BoxSource:
        """The whole source. `more` are other places that the user named; those it has no use for are refused."""


def annotated(path: Path, drawn: Sequence[Drawn], tally: Tally, *, size: Size | None, where: str) -> Annotated:
    """A picture with its boxes put right: clipped to the picture; those without area are left out. Both are counted.

    Args:
        size: as the annotations say it, None where they don't; the picture must have it, upright or as stored.
        where: the annotations.

    Raises:
        FileDamagedError: no picture there; one of another size; a box that is no box, or that lies wholly outside: such
            labels belong to another picture, or are in another unit.
    """
    upright, stored = sizes_of(path)
    if size not in (None, upright, stored):
        found = f"{size[0]} x {size[1]} in the annotations, {upright[0]} x {upright[1]} in {path}"
        do = "give the picture that was annotated"
        raise FileDamagedError("read boxes of a picture", found=found, where=where, do=do)
    width, height = upright if size is None else size
    kept = [one for one in drawn if _has_area(one, tally)]
    corners = torch.tensor([one.corners for one in kept], dtype=torch.float32).view(-1, 4)
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    for number in torch.nonzero((corners[:, :2] >= limits[:2]) | (corners[:, 2:] <= 0))[:1, 0].tolist():
        one = kept[number]
        found = f"a box from {one.corners[:2]} to {one.corners[2:]} outside of the picture, {width} x {height}"
        do = "look whether the labels are this picture's and in the unit of their format, or take the box out"
        raise FileDamagedError("read a box", found=found, where=one.where, do=do)
    inside = corners.clamp(min=0).minimum(limits)
    over = ((inside - corners).abs() > ROUNDING).any(dim=1)
    tally.clipped += [kept[number].where for number in torch.nonzero(over).flatten().tolist()]
    boxes = Boxes(inside, torch.tensor([one.label for one in kept], dtype=torch.int64))
    areas = boxes.areas.clone()
    for number, one in enumerate(kept):
        if one.area is not None:
            areas[number] = one.area
    ignored = torch.tensor([one.ignored for one in kept], dtype=torch.bool)
    return Annotated(path, width, height, boxes, ignored, areas, stored=(width, height) != upright)


def _has_area(one: Drawn, tally: Tally) -> bool:
    left, top, right, bottom = one.corners
    if not all(map(math.isfinite, one.corners)) or right < left or bottom < top:
        do = "give left < right and top < bottom"
        raise FileDamagedError("read a box", found=f"corners {one.corners}", where=one.where, do=do)
    if right == left or bottom == top:
        tally.without_area.append(one.where)
        return False
    return True
