"""Training pictures of detectors, changed as their users expect: mosaics, flips, zooms, shifts and colours, by seed."""

from dataclasses import dataclass, fields
from typing import Any, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from niwaki.boxes import Boxes, areas_of
from niwaki.errors import InputError, MissingExtraError
from niwaki.tasks.framing import GREY, BoxPictures, Framing

SMALLEST = 2.0
"""Pixels of width and height below which a box that was cut off is no box any more (ultralytics)."""
VISIBLE = 0.1
"""Share of a box's area that must still be seen (ultralytics)."""
TILES = 4


@final
@dataclass(frozen=True)
class Augmentation:
    """How training pictures are changed; the defaults are those of ultralytics' YOLO.

    Source: mosaic of Bochkovskiy et al. 2020, arXiv:2004.10934, sec. 3.3; ranges of ultralytics' default settings.
    Differs: saturation and brightness are scaled by torchvision's operations, not in HSV; no rotation, shear or mixup;
    boxes that were small before stay as long as nothing of them is cut off, and thin ones stay; short trainings.

    Raises:
        InputError: a share out of [0, 1], a hue above 0.5, or epochs below 0.
    """

    mosaic: float = 1.0
    """Share of the pictures that are four of them around a point drawn near the middle."""
    flip: float = 0.5
    """Share that is mirrored, left to right."""
    scale: float = 0.5
    """Zoom, drawn from 1 - scale to 1 + scale."""
    translate: float = 0.1
    """Shift, drawn up to this share of a side, to all sides."""
    hue: float = 0.015
    """Turn of the hue, drawn up to this share of the circle, both ways."""
    saturation: float = 0.7
    """Factor of the saturation, drawn from 1 - saturation to 1 + saturation."""
    brightness: float = 0.4
    """Factor of the brightness, drawn alike."""
    close_mosaic: int = 10
    """Epochs at the end of a training without mosaics, so that it ends on pictures as they will be seen; a training
    that is not longer than that has mosaics throughout (in ultralytics it has none)."""

    def __post_init__(self) -> None:
        if type(self.close_mosaic) is not int or self.close_mosaic < 0:
            raise InputError(f"Augmentation(close_mosaic={self.close_mosaic!r})", do="give 0 or more epochs")
        for one in fields(self):
            if one.name == "close_mosaic":
                continue
            value, most = getattr(self, one.name), 0.5 if one.name == "hue" else 1.0
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
                raise InputError(f"Augmentation({one.name}={value!r})", do=f"give a share from 0 to {most:g}")
        if self.scale >= 1:
            raise InputError(f"Augmentation(scale={self.scale})", do="give a zoom below 1: nothing is left at 0")

    def __call__(
        self, pictures: BoxPictures, number: int, frame: Framing, generator: torch.Generator
    ) -> tuple[UInt8[Tensor, "3 h w"], Boxes]:
        """Picture `number` in the frame, changed as `generator` says and as nothing else does.

        Raises:
            MissingExtraError: torchvision is not installed.
        """
        change = _torchvision()
        draw = (2 * torch.rand(6, generator=generator, dtype=torch.float64) - 1).tolist()  # in [-1, 1)
        chance = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        if chance[0] < self.mosaic:
            picture, boxes = mosaic(pictures, number, frame, generator)
        else:
            picture, boxes = frame.framed(pictures, number)
        middle = picture.shape[-1] / 2, picture.shape[-2] / 2
        centre = middle[0] + self.translate * draw[0] * frame.width, middle[1] + self.translate * draw[1] * frame.height
        picture, boxes = zoomed(picture, boxes, frame, centre=centre, zoom=1 + self.scale * draw[2])
        if chance[1] < self.flip:
            picture, boxes = change.horizontal_flip(picture), mirrored(boxes, frame.width)
        if self.brightness:
            picture = change.adjust_brightness(picture, 1 + self.brightness * draw[3])
        if self.saturation:
            picture = change.adjust_saturation(picture, 1 + self.saturation * draw[4])
        if self.hue:
            # pillow turns hues in half the time
            turned = change.adjust_hue(change.to_pil_image(picture), self.hue * draw[5])
            picture = change.pil_to_tensor(turned)
        return picture, boxes


def mosaic(
    pictures: BoxPictures, number: int, frame: Framing, generator: torch.Generator
) -> tuple[UInt8[Tensor, "3 h2 w2"], Boxes]:
    """Picture `number` and three drawn ones around a point, on twice the frame's width and height.

    Each is fitted to the frame's size first; what lies beyond the edge is cut off, boxes too. The point is drawn from
    the middle half of either side.
    """
    others = torch.randint(len(pictures), (TILES - 1,), generator=generator).tolist()
    at = 0.5 + torch.rand(2, generator=generator, dtype=torch.float64)  # of a side of the frame
    x, y = round(float(at[0]) * frame.width), round(float(at[1]) * frame.height)
    canvas = torch.full((3, 2 * frame.height, 2 * frame.width), GREY, dtype=torch.uint8)
    found: list[Boxes] = []
    for tile, one in enumerate((number, *others)):
        place = frame.place(pictures[one].width, pictures[one].height)
        inner, boxes = frame.framed(pictures, one)
        # without the grey around, so that pictures touch
        inner = inner[:, place.top : place.top + place.height, place.left : place.left + place.width]
        left = x if tile % 2 else x - place.width
        top = y if tile // 2 else y - place.height
        rows = slice(max(top, 0), min(top + place.height, 2 * frame.height))
        columns = slice(max(left, 0), min(left + place.width, 2 * frame.width))
        canvas[:, rows, columns] = inner[
            :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
        ]
        shift = boxes.corners.new_tensor([left - place.left, top - place.top] * 2)
        found.append(Boxes(boxes.corners + shift, boxes.labels))
    limits = found[0].corners.new_tensor([2 * frame.width, 2 * frame.height] * 2)
    corners = torch.cat([one.corners for one in found]).clamp(min=0).minimum(limits)
    seen = (corners[:, 2:] > corners[:, :2]).all(dim=1)
    return canvas, Boxes(corners[seen], torch.cat([one.labels for one in found])[seen])


def zoomed(
    picture: UInt8[Tensor, "3 h w"], boxes: Boxes, frame: Framing, *, centre: tuple[float, float], zoom: float
) -> tuple[UInt8[Tensor, "3 h2 w2"], Boxes]:
    """The part of a picture around `centre` (x, y) that fills the frame at this zoom; grey where there is nothing.

    Boxes are clipped to the frame; those of which too little is seen go.
    """
    change = _torchvision()
    wide, high = max(1, round(frame.width / zoom)), max(1, round(frame.height / zoom))
    left, top = round(centre[0] - wide / 2), round(centre[1] - high / 2)
    height, width = picture.shape[-2:]
    sides = [max(0, -left), max(0, -top), max(0, left + wide - width), max(0, top + high - height)]
    if any(sides):
        picture = change.pad(picture, sides, fill=GREY)
    shifted = left + sides[0], top + sides[1]
    if (high, wide) == (frame.height, frame.width):
        seen = change.crop(picture, shifted[1], shifted[0], high, wide)
    else:
        size = [frame.height, frame.width]
        seen = change.resized_crop(picture, shifted[1], shifted[0], high, wide, size=size, antialias=True)
    scale = boxes.corners.new_tensor([frame.width / wide, frame.height / high] * 2)
    corners = (boxes.corners - boxes.corners.new_tensor([left, top] * 2)) * scale
    return seen, visible(corners, boxes.labels, frame)


def visible(corners: Float[Tensor, "n 4"], labels: Tensor, frame: Framing) -> Boxes:
    """Boxes clipped to the frame, those of which enough is seen."""
    limits = corners.new_tensor([frame.width, frame.height] * 2)
    inside = corners.clamp(min=0).minimum(limits)
    sides = inside[:, 2:] - inside[:, :2]
    whole = areas_of(corners)
    stay = (sides >= SMALLEST).all(dim=1) & (areas_of(inside) >= VISIBLE * whole)
    unchanged = (inside == corners).all(dim=1)  # small things stay as long as nothing was cut off
    stay |= unchanged & (sides > 0).all(dim=1)
    return Boxes(inside[stay], labels[stay])


def mirrored(boxes: Boxes, width: int) -> Boxes:
    """Boxes of a mirrored picture."""
    left, top, right, bottom = boxes.corners.unbind(dim=1)
    return Boxes(torch.stack([width - right, top, width - left, bottom], dim=1), boxes.labels)


def _torchvision() -> Any:
    try:
        from torchvision.transforms.v2 import functional
    except ImportError as cause:
        do = 'pip install "niwaki[detection]"'
        raise MissingExtraError("changing training pictures of detectors needs torchvision", do=do) from cause
    return functional
