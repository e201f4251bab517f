"""Pictures and labels in one NumPy archive."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from niwaki.data import Part, Reader, Source, label_tensor, some
from niwaki.errors import FileDamagedError, InputError, NotFiniteError

PARTS = {"all": ("x", "y"), "train": ("x_train", "y_train"), "val": ("x_val", "y_val"), "test": ("x_test", "y_test")}


@final
@dataclass(frozen=True)
class Npz(Reader):
    """Arrays `x` and `y`, or `x_train`, `y_train`, `x_test`, `y_test`, `x_val`, `y_val`; `classes` may name classes.

    Pictures are [n, h, w], [n, h, w, c] or [n, c, h, w] with 1 or 3 channels, uint8 or floating (then taken as they
    are). Object arrays are never loaded, since they are pickles.

    Raises:
        FileDamagedError: not an archive of plain arrays, or truncated.
        InputError: arrays missing, or of a shape that is no picture.
        NotFiniteError: NaN or infinite pixels.
    """

    place: Path
    takes: ClassVar[str | None] = "a NumPy archive (.npz)"

    def read(self, *, size: int | None, channels: int | None) -> Source:
        arrays = self._arrays()
        parts = {}
        for name, (x, y) in PARTS.items():
            if (x in arrays) != (y in arrays):
                lone, other = (x, y) if x in arrays else (y, x)
                found = f"{lone} without {other}"
                raise InputError(f"read {x} and {y}", found=found, where=str(self.place), do=f"add {other}")
            if x in arrays:
                labels = label_tensor(arrays[y], f"{self.place}, array {y}")
                parts[name] = Part(self._pixels(arrays[x], x), labels)
        train = parts.get("train") or parts.get("all")
        if train is None or ("all" in parts and len(parts) > 1):
            raise InputError(
                "read pictures from a NumPy archive",
                found=f"arrays: {some(arrays)}",
                where=str(self.place),
                do="store x and y, or x_train, y_train, x_test and y_test",
            )
        highest = max(int(part.labels.max()) for part in parts.values())
        names = arrays.get("classes")
        classes = tuple(map(str, names.tolist() if names is not None else range(highest + 1)))
        return Source(classes, "none", train, parts.get("test"), parts.get("val"), {"layout": "npz"})

    def _arrays(self) -> dict[str, np.ndarray]:
        known = {"classes", *(name for pair in PARTS.values() for name in pair)}
        try:
            with self.place.open("rb") as stream:
                archive = np.load(stream, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise ValueError("a single array, not an archive")
                return {name: archive[name] for name in archive.files if name in known}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, MemoryError) as cause:
            raise FileDamagedError(
                "read a NumPy archive",
                found=str(cause).partition(" If you trust")[0] or type(cause).__name__,  # no unsafe advice
                where=str(self.place),
                do="write it again with numpy.savez, plain arrays only",
            ) from cause

    def _pixels(self, array: np.ndarray, name: str) -> Tensor:
        where = f"{self.place}, array {name}"
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            found = f"pixels of type {array.dtype}"
            raise InputError("read pictures", found=found, where=where, do="store uint8 or floats")
        if array.ndim == 3:
            array = array[:, None]
        elif array.ndim == 4:
            first, last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
            if first == last:
                found = f"shape {array.shape}: {'either of two axes' if first else 'no axis'} can be the channels"
                raise InputError("read pictures", found=found, where=where, do="store [n, c, h, w], c 1 or 3")
            array = array if first else array.transpose(0, 3, 1, 2)
        else:
            do = "store [n, h, w], [n, h, w, c] or [n, c, h, w]"
            raise InputError("read pictures", found=f"shape {array.shape}", where=where, do=do)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NotFiniteError("read pictures", found="NaN or infinite pixels", where=where, do="repair the file")
        as_float = array if array.dtype == np.uint8 else array.astype(np.float32)
        return torch.from_numpy(np.ascontiguousarray(as_float))
