"""Pictures with several targets each: arrays of one NumPy archive, or of a folder of .npy files."""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from niwaki.errors import FileDamagedError, InputError

INPUTS = "x"
"""The array of pictures."""
DAMAGED = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, MemoryError)


@final
@dataclass(frozen=True, eq=False)
class Samples:
    """Pictures and targets of one split, handed out in batches."""

    arrays: Mapping[str, np.ndarray]
    """"x" and one array for each target; all of one length. Files may be mapped and are read batch by batch."""
    index: Int[Tensor, " n"]
    """Which entries are of this split."""

    def __len__(self) -> int:
        return len(self.index)

    def batches(
        self, size: int, *, shuffle_seed: int | None = None, whole: bool = False
    ) -> Iterator[tuple[Float[Tensor, "batch ..."], dict[str, Tensor]]]:
        """All samples once, `size` at a time: in order, or shuffled by `shuffle_seed`. uint8 pictures are divided by
        255; targets keep their type. `whole` leaves out a last batch that is not full, unless it is the only one.

        Raises:
            InputError: `size` below 1.
        """
        if size < 1:
            raise InputError(f"batches of {size} samples", do="give a batch size of at least 1")
        count, generator = len(self), torch.Generator().manual_seed(shuffle_seed or 0)
        order = torch.arange(count) if shuffle_seed is None else torch.randperm(count, generator=generator)
        stop = count - count % size if whole and count >= size else count
        return (self._batch(self.index[order[first : first + size]].numpy()) for first in range(0, stop, size))

    def _batch(self, at: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        taken = {name: torch.from_numpy(np.ascontiguousarray(array[at])) for name, array in self.arrays.items()}
        pixels = taken.pop(INPUTS)
        full = 255.0 if pixels.dtype == torch.uint8 else 1.0
        return pixels.float() / full, taken


@final
@dataclass(frozen=True, eq=False)
class SampleSplits:
    """The three splits, and how they came about."""

    train: Samples
    val: Samples
    test: Samples
    record: dict[str, Any] = field(default_factory=dict)
    """JSON-able: source, seed, counts, shapes, SHA-256 of the split indices."""


def open_samples(
    place: str | Path, targets: Sequence[str], *, seed: int = 0, val: float = 0.1, test: float = 0.2
) -> SampleSplits:
    """Pictures `x` and the named targets, from an .npz archive or a folder of .npy files (which are mapped, not held).

    `val` and `test` are shares split off by `seed`, whatever the targets are. Object arrays are pickles and are never
    loaded.

    Raises:
        InputError: no such place, an array that is missing, lengths that differ, or shares that leave a split empty.
        FileDamagedError: no plain arrays, or truncated.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = Path(folder.name, "rooms.npz")
        >>> np.savez(file, x=np.zeros((10, 3, 4, 4), np.uint8), depth=np.ones((10, 4, 4), np.float32))
        >>> splits = open_samples(file, ("depth",))
        >>> inputs, found = next(splits.train.batches(2))
        >>> tuple(inputs.shape), tuple(found["depth"].shape), splits.record["counts"]
        ((2, 3, 4, 4), (2, 4, 4), {'train': 7, 'val': 1, 'test': 2})
        >>> folder.cleanup()
    """
    path = Path(place).expanduser()
    names = (INPUTS, *targets)
    arrays = _arrays(path, names)
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    count = lengths[INPUTS]
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"read {path}", found=f"lengths {found}", do="give every picture every target")
    for name, array in arrays.items():
        if array.dtype.kind not in "uifb":
            raise InputError(f"read {name} of {path}", found=f"type {array.dtype}", do="store numbers")
    sizes = [max(1, round(share * count)) for share in (val, test)]
    if not (0 < val < 1 and 0 < test < 1) or sum(sizes) >= count:
        found, do = (
            f"{count} samples, val={val}, test={test}",
            "give more samples, or shares that leave some to train on",
        )
        raise InputError(f"split {path}", found=found, do=do)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = dict(zip(("val", "test", "train"), order.split([*sizes, count - sum(sizes)]), strict=True))
    index = {name: parts[name].sort().values for name in ("train", "val", "test")}
    digest = hashlib.sha256()
    for name, at in index.items():
        digest.update(name.encode() + at.numpy().astype("<i8").tobytes())
    record = {
        "source": path.name,
        "seed": seed,
        "split_by_seed": ["val", "test"],
        "counts": {name: len(at) for name, at in index.items()},
        "split_sha256": digest.hexdigest(),
        "arrays": {name: [list(array.shape), str(array.dtype)] for name, array in arrays.items()},
    }
    made = {name: Samples(arrays, at) for name, at in index.items()}
    return SampleSplits(made["train"], made["val"], made["test"], record)


def _arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    if not path.exists():
        raise InputError(f"samples {path}", found="no such file or folder", do="check the path")
    try:
        if path.is_dir():
            there = {file.stem for file in path.glob("*.npy")}
            found = {n: np.load(path / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names if n in there}
        else:
            with path.open("rb") as stream:
                archive = np.load(stream, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise ValueError("a single array, not an archive")
                there = set(archive.files)
                found = {name: archive[name] for name in names if name in there}
    except DAMAGED as cause:
        said, do = (
            str(cause).partition(" If you trust")[0] or type(cause).__name__,  # no unsafe advice
            "write it again with numpy.savez or numpy.save, plain arrays only",
        )
        raise FileDamagedError("read samples", found=said, where=str(path), do=do) from cause
    if missing := [name for name in names if name not in found]:
        listed = ", ".join(sorted(there)) or "none"
        raise InputError(f"read {missing[0]} of {path}", found=f"arrays: {listed}", do="name targets as the arrays are")
    return found
