"""CIFAR-10 in each of the forms in which it lies on disks."""

import json
import os
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor

from niwaki.data import Part, Reader, Source, label_tensor
from niwaki.errors import FileDamagedError, InputError, MissingExtraError, NiwakiError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PICTURE = 3 * 32 * 32
SHEET_ROWS, SHEET_COLUMNS = 25, 40  # pictures on one sheet, row by row


@final
@dataclass(frozen=True)
class Cifar10(Reader):
    """60 000 colour pictures of 32 x 32 pixels, ten classes, with its own test part.

    Three forms: sheets of 1000 pictures (`train_00.webp` ... `test_09.webp`, with `y_train.npy` and `y_test.npy`), the
    "python version" (`data_batch_1` ... `test_batch`, also inside `cifar-10-batches-py`) and the "binary version"
    (`data_batch_1.bin` ..., also inside `cifar-10-batches-bin`). The python version is made of pickles; they are read
    by an unpickler that knows bytes, numbers, lists, dicts and plain uint8 or integer arrays and cannot call anything
    else. As many batches or sheets are read as are there.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".
    Raises:
        InputError: none of the forms is in the folder.
        FileDamagedError: a file that is truncated, or a pickle that holds anything else.
        MissingExtraError: sheets without pillow.
    """

    place: Path
    takes: ClassVar[str | None] = "a folder with CIFAR-10 (sheets, python batches or binary batches)"
    place_name: ClassVar[str] = "DIR"

    def read(self, *, size: int | None, channels: int | None) -> Source:
        forms: tuple[tuple[str, str, str, Callable[[Path], tuple[Tensor, Tensor]]], ...] = (
            ("python batches", "data_batch_[0-9]+", "test_batch", read_python_batch),
            ("binary batches", r"data_batch_[0-9]+\.bin", r"test_batch\.bin", read_binary_batch),
        )
        folders = [self.place, self.place / "cifar-10-batches-py", self.place / "cifar-10-batches-bin"]
        for folder in filter(Path.is_dir, folders):
            names = sorted(path.name for path in folder.iterdir())
            if (folder / "y_train.npy").exists():
                return self._source(folder, "sheets", read_sheets(folder, "train"), read_sheets(folder, "test"))
            for form, train, test, read in forms:
                train_files = [folder / name for name in names if re.fullmatch(train, name)]
                test_files = [folder / name for name in names if re.fullmatch(test, name)]
                if train_files and test_files:
                    return self._source(folder, form, _joined(train_files, read), _joined(test_files, read))
        raise InputError(
            "read CIFAR-10",
            found="no train and test sheets, no python batches, no binary batches",
            where=str(self.place),
            do="name the folder that holds train_00.webp, data_batch_1 or data_batch_1.bin, and its test files",
        )

    def _source(self, folder: Path, form: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Source:
        names = tuple(_class_names(folder / "meta.json")) if (folder / "meta.json").exists() else CLASSES
        return Source(names, "cifar10", Part(*train), Part(*test), notes={"layout": f"CIFAR-10 {form}"})


def read_sheets(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Pictures and labels of one part from its sheets."""
    try:
        from PIL import Image
    except ImportError as cause:
        raise MissingExtraError("reading CIFAR-10 sheets needs pillow", do='pip install "niwaki[data]"') from cause

    def sheet(path: Path) -> Tensor:
        try:
            with Image.open(path) as opened:
                pixels = np.array(opened.convert("RGB"))  # [25 * 32, 40 * 32, 3]
        except (OSError, ValueError, SyntaxError, EOFError) as cause:
            raise _damaged(path, f"not a readable picture: {cause}") from cause
        if pixels.shape != (SHEET_ROWS * 32, SHEET_COLUMNS * 32, 3):
            raise _damaged(path, f"a picture of {pixels.shape[1]} x {pixels.shape[0]} pixels, not 1280 x 800")
        cells = torch.from_numpy(pixels.reshape(SHEET_ROWS, 32, SHEET_COLUMNS, 32, 3))
        return cells.permute(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)  # [1000, 3, 32, 32]

    paths = sorted(folder.glob(f"{part}_[0-9]*.webp"))
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        pixels = torch.cat([*pool.map(sheet, paths)]) if paths else torch.empty(0, 3, 32, 32, dtype=torch.uint8)
    file = folder / f"y_{part}.npy"
    try:
        labels = label_tensor(np.load(file, allow_pickle=False), str(file))
    except NiwakiError:
        raise
    except (OSError, ValueError, EOFError) as cause:
        raise _damaged(file, f"not a readable array: {cause}") from cause
    if len(labels) != len(pixels):
        raise _damaged(folder, f"{len(pixels)} pictures on {len(paths)} {part} sheets, but {len(labels)} labels")
    return pixels, labels


def read_binary_batch(path: Path) -> tuple[Tensor, Tensor]:
    """One file of the binary version: a byte for the label, then red, green and blue planes, again and again."""
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    if not len(raw) or len(raw) % (1 + PICTURE):
        raise _damaged(path, f"{len(raw)} bytes, not a multiple of {1 + PICTURE}")
    rows = torch.from_numpy(raw.reshape(-1, 1 + PICTURE).copy())
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].to(torch.int64)


def read_python_batch(path: Path) -> tuple[Tensor, Tensor]:
    """One file of the python version, without ever calling what the pickle names."""
    try:
        with path.open("rb") as file:
            batch = PlainUnpickler(file, encoding="bytes").load()
        fields = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        pixels, labels = array_of(fields["data"]), fields["labels"]
        labels = array_of(labels) if isinstance(labels, _Array) else np.array(labels)
        shaped = torch.from_numpy(pixels).reshape(-1, 3, 32, 32)
    except Exception as cause:  # a damaged pickle can fail in any way at all
        found = f"{type(cause).__name__}: {cause}"
        raise _damaged(path, found, "get the file again; pickles with anything but arrays are not read") from cause
    if shaped.dtype != torch.uint8 or len(shaped) != len(labels):
        raise _damaged(path, f"{len(labels)} labels for pixels of shape {pixels.shape} and type {pixels.dtype}")
    return shaped, label_tensor(labels, str(path))


@final
@dataclass
class _Type:
    """Stands for numpy.dtype while unpickling."""

    code: str
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


@final
@dataclass
class _Array:
    """Stands for numpy.ndarray while unpickling: only remembers what it was told."""

    state: tuple[Any, ...] = field(default=())

    def __setstate__(self, state: Any) -> None:
        self.state = state


@final
class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of bytes, numbers, lists, dicts and plain arrays; every other name is refused.

    Nothing that a pickle names is looked up: the four names by which numpy writes arrays, and the one by which Python
    3 writes bytes for old protocols, are answered with recorders of our own, made afresh for each use.
    """

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")  # since numpy 2
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return lambda *_: _Array()
        if (module, name) == ("numpy.core.numeric", "_frombuffer"):
            return lambda raw, kind, shape, order: _Array((1, shape, kind, order == "F", bytes(raw)))
        if (module, name) == ("numpy", "dtype"):
            return lambda code, *_: _Type(_text(code))
        if (module, name) == ("numpy", "ndarray"):
            return None  # only ever the first argument of _reconstruct
        if (module, name) == ("_codecs", "encode"):
            return lambda value, *_: _text(value).encode("latin1")
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}")


def array_of(recorded: _Array) -> np.ndarray:
    """The array that a recorder was told about; only uint8 and integers."""
    _, shape, kind, fortran, raw = recorded.state
    if kind.code not in ("u1", "i8", "i4", "i2"):
        raise pickle.UnpicklingError(f"an array of type {kind.code}")
    order = ">" if kind.state and _text(kind.state[1]) == ">" else "<"
    raw = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
    values = np.frombuffer(raw, np.dtype(order + kind.code)).reshape(shape, order="F" if fortran else "C")
    return np.array(values, dtype=kind.code)


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _joined(paths: list[Path], read: Callable[[Path], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    pixels, labels = zip(*map(read, paths), strict=True)
    return torch.cat(pixels), torch.cat(labels)


def _class_names(file: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(file.read_text())["classes"]]
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise _damaged(file, f"no list of classes: {cause}") from cause


def _damaged(path: Path, found: str, do: str = "get the file again") -> FileDamagedError:
    return FileDamagedError("read CIFAR-10", found=found, where=str(path), do=do)
