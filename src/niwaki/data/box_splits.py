"""Training, validation and test pictures with boxes: split once by seed, decoded when they are asked for."""

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, final

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from niwaki.data import some
from niwaki.data.annotated import Annotated, BoxReader, BoxSource, Tally
from niwaki.data.coco import Coco
from niwaki.data.pictures import BILINEAR, read_picture
from niwaki.data.voc import Voc
from niwaki.data.yolo import Yolo
from niwaki.errors import InputError, UnknownNameError

log = logging.getLogger(__name__)
BOX_READERS: dict[str, type[BoxReader]] = {"voc": Voc, "coco": Coco, "yolo": Yolo}
TOGETHER = ("nothing", "prefix")
KEPT_BYTES = 1 << 28
"""Decoded pictures of a split that are kept, as they were asked for; the others are decoded each time."""
FRAME = re.compile(r"[-_. ]*\d+$")
"""What numbers the frames of a video, at the end of a name."""


class Kept:
    """Decoded pictures, as long as there is room; threads may share it."""

    def __init__(self) -> None:
        self.pictures: dict[tuple[int, int, int], Tensor] = {}
        self.bytes = 0
        self.lock = Lock()

    def get(self, key: tuple[int, int, int], make: Callable[[], Tensor]) -> Tensor:
        """The picture of this key, made if it is not here."""
        held = self.pictures.get(key)
        if held is not None:
            return held
        made = make()
        with self.lock:
            if key not in self.pictures and self.bytes + made.numel() <= KEPT_BYTES:
                self.pictures[key] = made
                self.bytes += made.numel()
        return made


@final
@dataclass(frozen=True, eq=False)
class BoxPictures:
    """Pictures with boxes of one split."""

    entries: tuple[Annotated, ...]
    kept: Kept = field(default_factory=Kept, repr=False)
    """Decoded pictures by number, height and width, up to `KEPT_BYTES`."""

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Annotated:
        return self.entries[number]

    @property
    def boxes(self) -> int:
        """How many boxes there are to be found."""
        return sum(int((~one.ignored).sum()) for one in self.entries)

    def picture(self, number: int, height: int, width: int) -> UInt8[Tensor, "3 h w"]:
        """RGB of a picture, resized (bilinear, with antialias).

        Raises:
            FileDamagedError: it can't be decoded.
        """
        return self.kept.get((number, height, width), lambda: self._decoded(number, height, width))

    def _decoded(self, number: int, height: int, width: int) -> Tensor:
        one = self.entries[number]
        picture = read_picture(one.path, "RGB", near=2 * max(height, width), stored=one.stored)
        if picture.size != (width, height):
            picture = picture.resize((width, height), BILINEAR)
        return torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1).contiguous()


@final
@dataclass(frozen=True, eq=False)
class BoxSplits:
    """The three splits of one data set, and how they came about."""

    train: BoxPictures
    val: BoxPictures
    test: BoxPictures
    classes: tuple[str, ...]
    record: dict[str, Any]
    """JSON-able: source, seed, counts of pictures and boxes, SHA-256 of the splits, what was put right."""


def is_boxes(spec: str) -> bool:
    """Whether data of this name are pictures with boxes."""
    return spec.partition(":")[0] in BOX_READERS


def open_boxes(
    spec: str,
    *,
    seed: int = 0,
    val: float | str | Path = 0.1,
    test: float | str | Path = 0.2,
    images: str | Path | None = None,
    together: str = "nothing",
    root: str | Path = ".",
) -> BoxSplits:
    """Training, validation and test pictures of "voc:DIR", "coco:FILE" or "yolo:FOLDER/data.yaml".

    Args:
        seed: of the split, where the source has no such part of its own: keep it for the whole life of a model.
        val, test: shares to split off, where the source has no such part; or, of COCO, the part's own file.
        images: of COCO, the folder of the pictures, where it is not where COCO has it.
        together: "prefix" keeps pictures in one part whose names differ only in a number at their end (the frames of a
            video); "nothing" takes each by itself.
        root: what relative places are looked up in.

    Raises:
        UnknownNameError: a kind of data that is not known.
        InputError: a place that does not exist, a split that leaves a part empty, an empty or contradictory data set.
        FileDamagedError: a file that cannot be read, a box that is none, a class out of range; says where.
        MissingExtraError: pillow or pyyaml is needed and not installed.
    """
    path = place_of_boxes(spec, root=root)
    reader = BOX_READERS[spec.partition(":")[0]]
    if together not in TOGETHER:
        raise UnknownNameError.of("way to keep pictures together", together, TOGETHER)
    named = {"val": val, "test": test, "images": images}
    more = {name: Path(root) / Path(one).expanduser() for name, one in named.items() if isinstance(one, (str, Path))}
    for where in more.values():
        if not where.exists():
            raise _missing(spec, where)
    tally = Tally()
    source = reader(path).read(tally, **more)
    tally.tell(spec)
    shares = tuple(0.0 if isinstance(one, (str, Path)) else float(one) for one in (test, val))
    return _assembled(source, spec, tally, seed=seed, shares=shares, together=together)


def place_of_boxes(spec: str, *, root: str | Path = ".") -> Path:
    """The file or folder of pictures with boxes; nothing is read yet.

    Raises:
        UnknownNameError: a kind of data that is not known.
        InputError: a place that does not exist, or is not what the kind takes.
    """
    kind, _, place = spec.partition(":")
    if kind not in BOX_READERS:
        known = [f"{name}:{reader.place_name}" for name, reader in BOX_READERS.items()]
        raise UnknownNameError.of("kind of data with boxes", kind, known)
    reader = BOX_READERS[kind]
    if not place:
        raise InputError(f"data {spec!r}", found="nothing after the colon", do=f"write {kind}:PATH, {reader.takes}")
    path = Path(root) / Path(place).expanduser()
    if not path.exists():
        raise _missing(spec, path)
    if path.is_dir() != (reader.place_name == "DIR"):
        found = "a folder" if path.is_dir() else "a file"
        raise InputError(f"data {spec!r}", found=found, where=str(path), do=f"name {reader.takes}")
    return path


def _missing(spec: str, place: Path) -> InputError:
    found = "no such file or folder"
    return InputError(f"data {spec!r}", found=found, where=str(place), do="check the path")


def _assembled(
    source: BoxSource, name: str, tally: Tally, *, seed: int, shares: tuple[float, ...], together: str
) -> BoxSplits:
    """The splits of a source: its own parts where it has them, the others taken from training by seed."""
    wanted = (0.0 if source.test else shares[0], 0.0 if source.val else shares[1])
    test_at, val_at, train_at = split(source.train, wanted, seed=seed, together=together)
    parts = {
        "train": [source.train[at] for at in train_at],
        "val": list(source.val) if source.val else [source.train[at] for at in val_at],
        "test": list(source.test) if source.test else [source.train[at] for at in test_at],
    }
    digest = hashlib.sha256()
    for part, entries in parts.items():
        digest.update("\n".join([part, *(one.path.name for one in entries)]).encode())
    made = {part: BoxPictures(tuple(entries)) for part, entries in parts.items()}
    learned = {one.path.resolve() for one in parts["train"]}
    seen = sum(one.path.resolve() in learned for one in parts["test"])
    if seen:
        log.warning("%s: %d of %d test pictures are training pictures, too", name, seen, len(parts["test"]))
    present = {int(label) for one in parts["train"] for label in one.boxes.labels}
    if missing := [label for number, label in enumerate(source.classes) if number not in present]:
        log.warning("%s: no box of %s in the training part", name, some(missing))
    record = {
        "source": name,
        "seed": seed,
        "counts": {part: len(pictures) for part, pictures in made.items()},
        "boxes": {part: pictures.boxes for part, pictures in made.items()},
        "ignored": sum(int(one.ignored.sum()) for entries in parts.values() for one in entries),
        "background": sum(not len(one.boxes) for entries in parts.values() for one in entries),
        **tally.record(),
        "split_sha256": digest.hexdigest(),
        "split_by_seed": [part for part, share in zip(("test", "val"), wanted, strict=True) if share],
        "together": together,
        **({"test_in_train": seen} if seen else {}),
        "classes": list(source.classes),
        **source.notes,
    }
    return BoxSplits(made["train"], made["val"], made["test"], source.classes, record)


def split(entries: Sequence[Annotated], shares: tuple[float, ...], *, seed: int, together: str) -> list[list[int]]:
    """Positions of one part per share, then of all the rest; a part with a share gets at least one picture.

    Kept together, whole videos go into a part, in an order drawn by `seed`, as long as it comes nearer to its share.

    Raises:
        InputError: shares that leave nothing to train on, or too few pictures or videos.
    """
    if not all(0 <= share < 1 for share in shares) or sum(shares) >= 1:
        raise InputError(f"split off {shares}", do="give shares from 0 to below 1 that leave something to train on")
    groups: dict[Any, list[int]] = {}
    for at, one in enumerate(entries):
        key: Any = at
        if together == "prefix":
            key = (one.path.parent, FRAME.sub("", one.path.stem))
        groups.setdefault(key, []).append(at)
    listed = list(groups.values())
    order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(seed)).tolist()
    left = [listed[at] for at in order]
    if len(left) <= sum(share > 0 for share in shares):
        words = "videos" if together == "prefix" else "pictures"
        do = "give more data, or split less off"
        raise InputError("split off validation and test parts", found=f"{len(left)} {words}", do=do)
    parts: list[list[int]] = []
    for number, share in enumerate(shares):
        taken: list[int] = []
        aim, needed = share * len(entries), sum(later > 0 for later in shares[number + 1 :]) + 1
        for group in list(left):
            nearer = abs(len(taken) + len(group) - aim) < abs(len(taken) - aim)
            if share and nearer and len(left) > needed:
                taken += group
                left.remove(group)
        if share and not taken:
            taken = min(left, key=len)
            left.remove(taken)
        parts.append(sorted(taken))
    return [*parts, sorted(at for group in left for at in group)]
