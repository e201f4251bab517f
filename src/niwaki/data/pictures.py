"""Pictures in files: how large they are, and their pixels."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from niwaki.errors import FileDamagedError, MissingExtraError

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"])
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)
"""The tag of EXIF that says how a camera was held, and its values of pictures that lie on their side."""
BILINEAR = 2
"""What pillow calls it: with antialias where a picture shrinks."""
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, ImportError)
"""What pillow raises of what is no picture. ImportError: ultralytics puts an `open` of its own in the place of
pillow's, which then looks for one more package."""
Size = tuple[int, int]
"""Width and height, in pixels."""


def pillow() -> Any:
    """The package that reads pictures.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as cause:
        raise MissingExtraError("reading pictures needs pillow", do='pip install "niwaki[data]"') from cause
    return PIL


def read_picture(path: Path, mode: str, *, near: int, stored: bool = False) -> "Image":
    """The pixels of a picture, upright unless `stored`; a JPEG is decoded no larger than needed for `near` pixels.

    Args:
        mode: "RGB" or "L".

    Raises:
        FileDamagedError: no readable picture.
        MissingExtraError: pillow is not installed.
    """
    PIL = pillow()
    try:
        with PIL.Image.open(path) as opened:
            opened.draft(mode, (near, near))
            picture = opened.copy() if stored else PIL.ImageOps.exif_transpose(opened)
            if "transparency" in picture.info:
                picture = picture.convert("RGBA")
            return picture.convert(mode)
    except (*UNREADABLE, PIL.Image.DecompressionBombError) as cause:
        raise _damaged(path, cause) from cause


def sizes_of(path: Path) -> tuple[Size, Size]:
    """Width and height of a picture, upright and as its pixels are stored; only the file's head is read.

    Raises:
        FileDamagedError: no picture.
        MissingExtraError: pillow is not installed.
    """
    PIL = pillow()
    try:
        with PIL.Image.open(path) as opened:
            stored = opened.size
            tagged = opened.format != "PNG" or "exif" in opened.info  # else pillow decodes all of it to look for tags
            lies = tagged and opened.getexif().get(ORIENTATION) in SIDEWAYS
    except (*UNREADABLE, PIL.Image.DecompressionBombError) as cause:
        raise _damaged(path, cause) from cause
    return (stored[::-1] if lies else stored), stored


def _damaged(path: Path, cause: BaseException) -> FileDamagedError:
    do = "replace it or take it out of the data"
    said = cause.__context__ if isinstance(cause, ImportError) and cause.__context__ is not None else cause
    return FileDamagedError("read a picture", found=str(said), where=str(path), do=do)
