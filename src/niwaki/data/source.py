"""What a reader of data hands over: pictures and labels as the files have them, before any split."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, final

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from niwaki.errors import FileDamagedError, InputError


class Pixels(Protocol):
    """A stack of pictures, [n, c, h, w]: a tensor, or anything that is indexed like one (files decoded on demand)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, index: Any) -> Tensor: ...


@final
@dataclass(frozen=True, eq=False)
class Part:
    """Pictures with one class number each.

    Raises:
        InputError: the shapes do not fit, the pixels are neither uint8 nor floating, or there is nothing.
    """

    pixels: Pixels
    """[n, c, h, w]; uint8 counts 0 to 255, floating values are taken as they are."""
    labels: Int[Tensor, " n"]

    def __post_init__(self) -> None:
        shape = tuple(self.pixels.shape)
        if len(shape) != 4:
            raise InputError("read pictures", found=f"shape {shape}", do="give [pictures, channels, height, width]")
        if self.pixels.dtype != torch.uint8 and not self.pixels.dtype.is_floating_point:
            raise InputError("read pictures", found=f"pixels of type {self.pixels.dtype}", do="give uint8 or floats")
        if self.labels.dim() != 1 or len(self.labels) != shape[0]:
            found = f"{shape[0]} pictures and labels of shape {tuple(self.labels.shape)}"
            raise InputError("read labelled pictures", found=found, do="give one label for each picture")
        if 0 in shape:
            raise InputError("read pictures", found=f"an empty data set, shape {shape}", do="give at least one picture")


@final
@dataclass(frozen=True, eq=False)
class Source:
    """What the files hold: either one undivided part, or the publisher's own training and test parts."""

    classes: tuple[str, ...]
    normalisation: str
    """Name of the normalisation that is usual for this source."""
    train: Part
    test: Part | None = None
    """None where the publisher made no test part: then one is split off `train`."""
    val: Part | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    """What a reader of the record should know (layout, what was taken as the test part)."""

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise InputError("classify", found=f"classes: {list(self.classes)}", do="give at least two classes")
        for name, part in (("train", self.train), ("val", self.val), ("test", self.test)):
            if part is None:
                continue
            low, high = int(part.labels.min()), int(part.labels.max())
            if low < 0 or high >= len(self.classes):
                raise InputError(
                    f"read the labels of the {name} part",
                    found=f"labels from {low} to {high}, but {len(self.classes)} classes",
                    do=f"number the classes 0 to {len(self.classes) - 1}",
                )
            if part.pixels.shape[1:] != self.train.pixels.shape[1:]:
                raise InputError(
                    f"read the {name} part",
                    found=f"pictures {tuple(part.pixels.shape[1:])}, in train {tuple(self.train.pixels.shape[1:])}",
                    do="give all parts one size",
                )
        present = torch.bincount(self.train.labels, minlength=len(self.classes))
        if missing := [name for name, count in zip(self.classes, present.tolist(), strict=True) if count == 0]:
            raise InputError(
                "train on every class",
                found=f"no training picture of {some(missing)}",
                do="add pictures of it, or take the class out",
            )


@dataclass(frozen=True)
class Reader(ABC):
    """Reads one kind of data set from `place`."""

    place: Path
    takes: ClassVar[str | None]
    """What `place` is, in words ("a folder of ..."), or None where nothing has to be named."""
    place_name: ClassVar[str] = "FILE"
    """How a place is written in lists: FILE or DIR."""

    @abstractmethod
    def read(self, *, size: int | None, channels: int | None) -> Source:
        """The whole source; `size` and `channels` are for readers that decode to a size, others may ignore them."""


def some(names: Iterable[object], most: int = 8) -> str:
    """The first few of many names, and how many more there are."""
    every = [str(name) for name in names]
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def label_tensor(labels: Shaped[np.ndarray, " n"], where: str) -> Int[Tensor, " n"]:
    """Labels as class numbers; refuses fractions and anything that is not a number."""
    if labels.dtype.kind not in "iu":
        found = f"labels of type {labels.dtype}"
        raise FileDamagedError("read labels", found=found, where=where, do="give whole class numbers")
    return torch.from_numpy(labels.astype(np.int64))
