"""Pictures in folders, one folder a class."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor

from niwaki.data import Part, Reader, Source, some
from niwaki.data.pictures import BILINEAR, ENDINGS, read_picture
from niwaki.errors import InputError

IN_MEMORY_BYTES = 1 << 30  # decoded pictures up to here are kept; more are decoded for every batch
MARGIN = 0.875  # the usual evaluation crop of ImageNet models: 224 of 256 pixels


@final
@dataclass(frozen=True)
class ImageFolder(Reader):
    """`DIR/CLASS/picture`, or with the publisher's own parts `DIR/train/CLASS/...`, `DIR/val/...` and `DIR/test/...`.

    Pictures are turned upright, cropped to a centred square and resized (bilinear, with antialias). A short side above
    `size` loses up to an eighth, as in the usual evaluation of ImageNet models. With `train` and `val` but no `test`,
    `val` is the test part, since that is where published accuracies are measured.

    Raises:
        InputError: no class folders, a class without pictures, parts with different classes.
        FileDamagedError: a file that is no readable picture.
        MissingExtraError: pillow is not installed.
    """

    place: Path
    takes: ClassVar[str | None] = "a folder with one folder of pictures for each class"
    place_name: ClassVar[str] = "DIR"

    def read(self, *, size: int | None, channels: int | None) -> Source:
        size, channels = size or 224, channels or 3
        if channels not in (1, 3):
            raise InputError(f"pictures with {channels} channels", do="use 1 (grey) or 3 (colour)")
        folders = {part: self.place / part for part in ("train", "val", "test") if (self.place / part).is_dir()}
        if "train" not in folders:
            folders = {"train": self.place}
        elif "test" not in folders and "val" in folders:
            folders["test"] = folders.pop("val")
        classes = _classes(folders["train"])
        parts = {name: _part(folder, classes, size, channels) for name, folder in folders.items()}
        used = {name: str(folder.relative_to(self.place)) for name, folder in folders.items()}
        notes = {"layout": "image folder", "folders": used}
        return Source(classes, "imagenet", parts["train"], parts.get("test"), parts.get("val"), notes)


@final
@dataclass(frozen=True, eq=False)
class Files:
    """A stack of pictures that is decoded when it is indexed, several files at a time."""

    paths: Sequence[Path]
    size: int
    channels: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.paths), self.channels, self.size, self.size)

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def __getitem__(self, index: Any) -> Tensor:
        wanted = torch.arange(len(self.paths))[index].flatten().tolist()
        out = torch.empty(len(wanted), self.channels, self.size, self.size, dtype=torch.uint8)
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # pillow decodes without the interpreter's lock
            for row, picture in enumerate(pool.map(self._decode, wanted)):
                out[row] = picture
        return out

    def _decode(self, number: int) -> Tensor:
        return decode(self.paths[number], size=self.size, channels=self.channels)


def decode(path: Path, *, size: int, channels: int) -> Tensor:
    """One upright, centred, square picture, uint8 [channels, size, size]."""
    picture = read_picture(path, "RGB" if channels == 3 else "L", near=size * 2)
    width, height = picture.size
    short = min(width, height)
    side = short if short <= size else max(size, MARGIN * short)
    left, top = (width - side) / 2, (height - side) / 2
    square = picture.resize((size, size), BILINEAR, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(square, dtype=np.uint8)).reshape(size, size, channels).permute(2, 0, 1)


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise InputError("read an image folder", found="not a folder", where=str(folder), do="name the folder")
    classes = tuple(sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")))
    if not classes:
        raise InputError(
            "read an image folder", found="no class folders", where=str(folder), do="make one folder for each class"
        )
    return classes


def _part(folder: Path, classes: tuple[str, ...], size: int, channels: int) -> Part:
    if (here := _classes(folder)) != classes:
        differing = sorted(set(here) ^ set(classes))
        raise InputError(
            f"read {folder.name} with the classes of train",
            found=f"classes in only one of the two: {some(differing)}",
            where=str(folder),
            do="give every part the same class folders",
        )
    paths: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        files = (folder / name).rglob("*")
        found = sorted(file for file in files if file.suffix.lower() in ENDINGS and not file.name.startswith("."))
        if not found:
            raise InputError(
                f"read class {name!r}",
                found="no pictures",
                where=str(folder / name),
                do=f"add pictures ({', '.join(sorted(ENDINGS))}) or take the folder out",
            )
        paths += found
        labels += [number] * len(found)
    stack = Files(tuple(paths), size, channels)
    in_memory = len(paths) * channels * size * size <= IN_MEMORY_BYTES
    return Part(stack[:] if in_memory else stack, torch.tensor(labels))
