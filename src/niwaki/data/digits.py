"""The handwritten digits that come with scikit-learn: nothing to download."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import torch

from niwaki.data import Part, Reader, Source
from niwaki.errors import MissingExtraError


@final
@dataclass(frozen=True)
class Digits(Reader):
    """1797 grey pictures of 8 x 8 pixels with 17 levels, ten classes.

    Source: Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits" (its test part), as bundled with
    scikit-learn. Differs: levels 0 to 16 are stretched to 0 to 255.
    Raises: MissingExtraError without scikit-learn.
    """

    place: Path = Path()
    """Not used: the pictures are inside scikit-learn."""
    takes: ClassVar[str | None] = None

    def read(self, *, size: int | None, channels: int | None) -> Source:
        try:
            from sklearn.datasets import load_digits
        except ImportError as cause:
            raise MissingExtraError("the built-in digits need scikit-learn", do='pip install "niwaki[data]"') from cause
        pictures, labels = load_digits(return_X_y=True)
        levels = torch.from_numpy(pictures).reshape(-1, 1, 8, 8)  # [n, 1, 8, 8], 0 to 16
        pixels = (levels * (255 / 16)).round().to(torch.uint8)
        numbers = torch.from_numpy(labels).to(torch.int64)
        return Source(tuple("0123456789"), "digits", Part(pixels, numbers), notes={"layout": "8x8 grey, scikit-learn"})
