"""Boxes drawn on a picture, for reports."""

import io
from collections.abc import Sequence
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from niwaki.errors import MissingExtraError

LONGEST = 400
"""Pixels of the longer side of a drawn picture."""
QUALITY = 75
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#42d4f4", "#f032e6", "#bfef45", "#ffe119")
"""Of the classes, in turns; told apart by most eyes, and named on the box."""


def drawn_size(width: int, height: int) -> tuple[int, int]:
    """Height and width of a picture as it is drawn: no larger than `LONGEST`."""
    scale = min(1.0, LONGEST / max(width, height))
    return max(1, round(height * scale)), max(1, round(width * scale))


def drawing(
    pixels: UInt8[Tensor, "3 h w"],
    corners: Sequence[Sequence[float]],
    labels: Sequence[int],
    words: Sequence[str],
) -> bytes:
    """A JPEG of the picture with a box and its words for each entry; corners in its pixels.

    Raises:
        MissingExtraError: pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as cause:
        raise MissingExtraError("drawing boxes needs pillow", do='pip install "niwaki[detection]"') from cause
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=10)
    for box, label, text in zip(corners, labels, words, strict=True):
        colour = COLOURS[label % len(COLOURS)]
        left, top, right, bottom = (round(side) for side in box)
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2)
        _sign(pen, font, text, (left, top, picture.width), colour)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=QUALITY)
    return content.getvalue()


def _sign(pen: Any, font: Any, text: str, at: tuple[int, int, int], colour: str) -> None:
    """The words of a box on a ground of its colour: above it where there is room, else inside; never over the edge.

    Args:
        at: left and top of the box, and the picture's width.
    """
    left, top, most = at
    _, _, width, height = pen.textbbox((0, 0), text, font=font)
    left = max(0, min(left, most - round(width) - 3))
    above = top - height - 1
    y = above if above >= 0 else top
    pen.rectangle((left, y, left + width + 2, y + height + 1), fill=colour)
    pen.text((left + 1, y), text, fill="black", font=font)
