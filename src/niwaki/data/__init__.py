"""Where data come from: `open` reads a named source of pictures and splits it once, by seed; `open_boxes` pictures with
boxes, `open_text` a text."""

from pathlib import Path
from typing import Any

from niwaki.data.source import Part, Pixels, Reader, Source, label_tensor, some
from niwaki.errors import InputError, UnknownNameError

# isort: split
from niwaki.data.splits import Images, Normalisation, Splits, assemble

# isort: split
from niwaki.data.annotated import Annotated, BoxReader, BoxSource
from niwaki.data.box_splits import BOX_READERS, BoxPictures, BoxSplits, is_boxes, open_boxes, place_of_boxes
from niwaki.data.cifar10 import Cifar10
from niwaki.data.digits import Digits
from niwaki.data.image_folder import ImageFolder
from niwaki.data.npz import Npz
from niwaki.data.samples import Samples, SampleSplits, open_samples
from niwaki.data.text import Text, TextSplits, Tokens, open_text, tokenizer_in

__all__ = [
    "BOX_READERS",
    "READERS",
    "TEXT",
    "Annotated",
    "BoxPictures",
    "BoxReader",
    "BoxSource",
    "BoxSplits",
    "Images",
    "Normalisation",
    "Part",
    "Pixels",
    "Reader",
    "SampleSplits",
    "Samples",
    "Source",
    "Splits",
    "Text",
    "TextSplits",
    "Tokens",
    "is_boxes",
    "kinds",
    "label_tensor",
    "open",
    "open_boxes",
    "open_samples",
    "open_text",
    "place_of_boxes",
    "reader_of",
    "some",
    "tokenizer_in",
]

TEXT = "text"
"""The kind of data that `open_text` reads."""
READERS: dict[str, type[Reader]] = {"digits": Digits, "imagefolder": ImageFolder, "cifar10": Cifar10, "npz": Npz}


def kinds() -> list[str]:
    """Every kind of data that a word names, as it is written: what the command line's --data takes."""
    pictures = [f"{name}:{kind.place_name}" if kind.takes else name for name, kind in READERS.items()]
    return [*pictures, *(f"{name}:{kind.place_name}" for name, kind in BOX_READERS.items()), f"{TEXT}:FILE"]


def open(
    spec: str,
    *,
    size: int | None = None,
    channels: int | None = None,
    normalisation: str | Normalisation | tuple[Any, Any] | None = None,
    seed: int = 0,
    val: float = 0.1,
    test: float = 0.2,
    root: str | Path = ".",
) -> Splits:
    """Training, validation and test pictures of "digits", "imagefolder:DIR", "cifar10:DIR" or "npz:FILE".

    `size` (pixels) and `channels` (1 or 3) default to what the source has (image folders: 224, 3). `normalisation` is
    a name ("none", "half", "imagenet", "cifar10", "digits") or a pair (mean, std), by default the usual one of the
    source. `val` and `test` are shares split off by `seed`, class by class, where the source has no such part of its
    own. `seed` is the seed of the split, not of any training: keep it for the whole life of a model, or test pictures
    will have been trained on. Relative places are looked up in `root`.

    Raises:
        UnknownNameError: a kind of data that is not known.
        InputError: a place that does not exist, an empty or contradictory data set.
        FileDamagedError: a file that cannot be read.
        MissingExtraError: pillow or scikit-learn is needed and not installed.

    Examples:
        >>> splits = open("digits", size=16, channels=3)
        >>> splits.shape, splits.record["counts"]
        ((3, 16, 16), {'train': 1259, 'val': 179, 'test': 359})
    """
    reader = reader_of(spec, root=root)
    for what, value in (("size", size), ("channels", channels)):
        if value is not None and value < 1:
            raise InputError(f"{what} {value}", do=f"give a {what} of at least 1")
    source = reader.read(size=size, channels=channels)
    return assemble(
        source, name=spec, size=size, channels=channels, normalisation=normalisation, seed=seed, val=val, test=test
    )


def reader_of(spec: str, *, root: str | Path = ".") -> Reader:
    """What will read the pictures that `spec` names; nothing is read yet.

    Raises:
        UnknownNameError: a kind of data that is not known.
        InputError: a place that does not exist.
    """
    kind, _, place = spec.partition(":")
    if kind == TEXT:
        raise InputError(f"data {spec!r}", found="a text, not pictures", do="niwaki.data.open_text reads it")
    if kind in BOX_READERS:
        raise InputError(f"data {spec!r}", found="pictures with boxes", do="niwaki.data.open_boxes reads them")
    if kind not in READERS:
        raise UnknownNameError.of("kind of data", kind, kinds())
    reader = READERS[kind]
    if bool(place) != bool(reader.takes):
        do = f"write {kind}:PATH, {reader.takes}" if reader.takes else f"write {kind} alone"
        raise InputError(f"data {spec!r}", found=f"{place or 'nothing'!r} after the colon", do=do)
    path = Path(root) / Path(place).expanduser()
    if reader.takes and not path.exists():
        raise InputError(f"data {spec!r}", found="no such file or folder", where=str(path), do="check the path")
    return reader(path)
