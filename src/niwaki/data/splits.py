"""Training, validation and test pictures: split once by seed, normalised and augmented batch by batch."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from niwaki.data import Part, Pixels, Source, some
from niwaki.errors import InputError, UnknownNameError

KNOWN: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    # The three below: means and standard deviations over the training pictures, on pixels from 0 to 1.
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "digits": ((0.3053,), (0.3760,)),
}
LUMA = (0.299, 0.587, 0.114)  # grey from red, green, blue: ITU-R BT.601, as PIL's convert("L")


@final
@dataclass(frozen=True)
class Normalisation:
    """Pixels from 0 to 1, less `mean`, over `std`, channel by channel; one value stands for all channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or not all(std > 0 for std in self.std):
            found = f"mean {self.mean}, std {self.std}"
            raise InputError("normalise pictures", found=found, do="give as many positive std as means")

    @classmethod
    def of(cls, value: "str | Normalisation | tuple[Any, Any]") -> "Normalisation":
        """A normalisation by name, or from a pair (mean, std)."""
        if isinstance(value, Normalisation):
            return value
        if isinstance(value, str):
            if value not in KNOWN:
                raise UnknownNameError.of("normalisation", value, list(KNOWN))
            return cls(*KNOWN[value])
        mean, std = value
        return cls(tuple(float(x) for x in mean), tuple(float(x) for x in std))

    def __call__(self, pixels: Shaped[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Normalised float32 pictures; uint8 pixels are divided by 255 first."""
        full = 255.0 if pixels.dtype == torch.uint8 else 1.0
        mean = torch.tensor(self.mean, dtype=torch.float32, device=pixels.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=pixels.device).view(1, -1, 1, 1)
        return (pixels.to(torch.float32) - mean * full).div_(std * full)


@final
@dataclass(frozen=True, eq=False)
class Images:
    """Labelled pictures of one split, handed out in batches; what is held in memory stays uint8.

    Examples:
        >>> pixels, labels = torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 1])
        >>> images = Images(pixels, labels, normalisation=Normalisation.of("half"), size=8, channels=3)
        >>> [tuple(inputs.shape) for inputs, labels in images.batches(4)]
        [(4, 3, 8, 8), (1, 3, 8, 8)]
    """

    pixels: Pixels
    labels: Int[Tensor, " n"]
    normalisation: Normalisation
    size: int
    """Height and width, in pixels, to which batches are resized (bilinear, antialiased) where the pictures differ."""
    channels: int
    """1 (grey) or as many as the pictures have; a grey picture is repeated into 3."""

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, size: int, *, shuffle_seed: int | None = None, augment: bool = False, whole: bool = False
    ) -> Iterator[tuple[Float[Tensor, "batch c h w"], Int[Tensor, " batch"]]]:
        """All pictures once, `size` at a time: in order, or shuffled by `shuffle_seed`.

        `augment` mirrors half of the pictures and shifts each by up to an eighth of its size (black outside), both
        drawn from `shuffle_seed`. `whole` leaves out a last batch that is not full, unless it is the only one.

        Raises:
            InputError: `size` below 1, or `augment` without a seed.
        """
        if size < 1:
            raise InputError(f"batches of {size} pictures", do="give a batch size of at least 1")
        if augment and shuffle_seed is None:
            raise InputError("augment pictures", found="no seed", do="give shuffle_seed=0 or another number")
        return self._batches(size, shuffle_seed, augment, whole)

    def _batches(self, size: int, seed: int | None, augment: bool, whole: bool) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed or 0)
        count = len(self)
        order = torch.arange(count) if seed is None else torch.randperm(count, generator=generator)
        stop = count - count % size if whole and count >= size else count
        for first in range(0, stop, size):
            index = order[first : first + size]
            pixels = fit(self.pixels[index], size=self.size, channels=self.channels)
            if augment:
                pixels = flip_crop(pixels, generator, reach=max(1, self.size // 8))
            yield self.normalisation(pixels), self.labels[index]


@final
@dataclass(frozen=True, eq=False)
class Splits:
    """The three splits of one data set, and how they came about."""

    train: Images
    val: Images
    test: Images
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    """Of one input: channels, height, width."""
    normalisation: Normalisation
    record: dict[str, Any]
    """JSON-able: source, seed, counts, SHA-256 of the split indices, normalisation."""


def fit(
    pixels: Shaped[Tensor, "batch c h w"], *, size: int, channels: int
) -> Shaped[Tensor, "batch channels size size"]:
    """Pictures with the wanted channels and size; unchanged (and still uint8) where they have them already."""
    have = pixels.shape[1]
    if channels != have and not (channels == 1 and have == 3) and have != 1:
        raise InputError(f"pictures with {channels} channels", found=f"{have} channels", do="ask for 1 or for these")
    resize = pixels.shape[2:] != (size, size)
    grey = channels == 1 and have == 3
    if (resize or grey) and pixels.dtype == torch.uint8:
        pixels = pixels.to(torch.float32).div_(255)
    if grey:
        pixels = torch.einsum("bchw,c->bhw", pixels, torch.tensor(LUMA, dtype=pixels.dtype)).unsqueeze(1)
    if resize:
        pixels = functional.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return pixels.expand(-1, channels, -1, -1) if channels != pixels.shape[1] else pixels


def flip_crop(
    pixels: Shaped[Tensor, "batch c h w"], generator: torch.Generator, *, reach: int
) -> Shaped[Tensor, "batch c h w"]:
    """Each picture mirrored with probability one half and shifted by up to `reach` pixels, black coming in.

    One gather for the whole batch. Source: He et al. 2016, arXiv:1512.03385, sec. 4.2 (4 pixels on 32).
    """
    batch, _, height, width = pixels.shape
    padded = functional.pad(pixels, (reach, reach, reach, reach))
    top = torch.randint(2 * reach + 1, (batch, 1), generator=generator)
    left = torch.randint(2 * reach + 1, (batch, 1), generator=generator)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)  # [batch, h]
    columns = left + torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width))  # [batch, w]
    picked = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [batch, h, w, c]
    return picked.permute(0, 3, 1, 2).contiguous()


def split_indices(
    labels: Int[Tensor, " n"], *, shares: tuple[float, ...], seed: int, classes: tuple[str, ...]
) -> list[Int[Tensor, " part"]]:
    """Sorted positions of one part per share, then of all the rest; every class gives its share to each part.

    A class gives at least one picture to every part whose share is above zero.

    Raises:
        InputError: shares that leave nothing, or a class with too few pictures.
    """
    if not all(0 <= share < 1 for share in shares) or sum(shares) >= 1:
        raise InputError(f"split off {shares}", do="give shares from 0 to below 1 that leave something to train on")
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(len(shares) + 1)]
    for number, name in enumerate(classes):
        of_class = torch.nonzero(labels == number).flatten()
        shuffled = of_class[torch.randperm(len(of_class), generator=generator)]
        sizes = [max(1, round(share * len(shuffled))) if share else 0 for share in shares]
        if sum(sizes) >= len(shuffled):
            raise InputError(
                f"split class {name!r} into {sum(size > 0 for size in sizes) + 1} parts",
                found=f"{len(shuffled)} pictures of it",
                do="add pictures, or split less off",
            )
        for part, piece in zip(parts, shuffled.split([*sizes, len(shuffled) - sum(sizes)]), strict=True):
            part.append(piece)
    return [torch.cat(part).sort().values for part in parts]


def assemble(
    source: Source,
    *,
    name: str,
    size: int | None,
    channels: int | None,
    normalisation: "str | Normalisation | tuple[Any, Any] | None",
    seed: int,
    val: float,
    test: float,
) -> Splits:
    """The splits of a source: its own test and validation parts where it has them, the rest by seed."""
    shape = source.train.pixels.shape
    channels = channels or shape[1]
    normalise = _normalisation(source, normalisation, channels)
    if channels not in (1, shape[1]) and not (shape[1] == 1 and channels == 3):
        raise InputError(f"pictures with {channels} channels", found=f"{shape[1]} channels", do="use 1 or 3")
    if size is None and shape[2] != shape[3]:
        raise InputError("use pictures as they are", found=f"{shape[2]} x {shape[3]} pixels", do="give a size")
    size = size or shape[2]
    if size < 1:
        raise InputError(f"pictures of size {size}", do="give a size of at least 1 pixel")

    shares = (0.0 if source.test else test, 0.0 if source.val else val)
    test_at, val_at, train_at = split_indices(source.train.labels, shares=shares, seed=seed, classes=source.classes)
    own = {"train": (source.train, train_at)}
    for part_name, part, index in (("val", source.val, val_at), ("test", source.test, test_at)):
        own[part_name] = (part, torch.arange(len(part.labels))) if part else (source.train, index)
    images = {key: _images(part, index, normalise, size, channels) for key, (part, index) in own.items()}
    digest = hashlib.sha256()
    for key in ("train", "val", "test"):
        digest.update(key.encode() + own[key][1].numpy().astype("<i8").tobytes())
    record = {
        "source": name,
        "seed": seed,
        "counts": {key: len(value) for key, value in images.items()},
        "split_sha256": digest.hexdigest(),
        "split_by_seed": [key for key, share in (("val", shares[1]), ("test", shares[0])) if share],
        "classes": len(source.classes),
        "shape": [channels, size, size],
        "normalisation": {"mean": list(normalise.mean), "std": list(normalise.std)},
        **source.notes,
    }
    return Splits(
        images["train"], images["val"], images["test"], source.classes, (channels, size, size), normalise, record
    )


def _normalisation(
    source: Source, asked: "str | Normalisation | tuple[Any, Any] | None", channels: int
) -> Normalisation:
    """The asked normalisation, or the source's usual one; for grey versions of colour sources "half"."""
    usual = Normalisation.of(source.normalisation)
    if asked is None:
        return usual if len(usual.mean) in (1, channels) else Normalisation.of("half")
    chosen = Normalisation.of(asked)
    if len(chosen.mean) not in (1, channels):
        raise InputError(
            f"normalisation {asked!r}",
            found=f"{len(chosen.mean)} means for pictures with {channels} channels",
            do=f"give {channels}, or a name with one mean: {some(k for k, v in KNOWN.items() if len(v[0]) == 1)}",
        )
    return chosen


def _images(part: Part, index: Tensor, normalisation: Normalisation, size: int, channels: int) -> Images:
    if len(index) == len(part.labels):
        return Images(part.pixels, part.labels, normalisation, size, channels)
    held = isinstance(part.pixels, Tensor)
    pixels = part.pixels[index] if held else Chosen(part.pixels, index)
    return Images(pixels, part.labels[index], normalisation, size, channels)


@final
@dataclass(frozen=True, eq=False)
class Chosen:
    """Some pictures of a stack that is decoded on demand."""

    pixels: Pixels
    index: Int[Tensor, " chosen"]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index), *self.pixels.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.pixels.dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self.pixels[self.index[index]]
