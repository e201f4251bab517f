"""Where things are on pictures, and what they are: the detector's own losses, and mean average precision."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from niwaki.boxes import Boxes, Found
from niwaki.errors import InputError, NotFiniteError, OutOfMemoryError
from niwaki.measure import Measurement
from niwaki.measure.measurement import device_name, evaluating
from niwaki.tasks import Detector, Task
from niwaki.tasks.augmentation import Augmentation
from niwaki.tasks.average_precision import DRAWS, MOST, average_precision
from niwaki.tasks.drawing import drawing, drawn_size
from niwaki.tasks.framing import BoxPictures, Fit, Framing, learned, moved_back
from niwaki.tasks.parts import part_of
from niwaki.tasks.task import Shown
from niwaki.units import device_of, run, tensors_in

Batch = tuple[Tensor, tuple[Boxes, ...]]
"""Pictures in a frame, RGB from 0 to 1, and the boxes on each in pixels of the frame."""
AHEAD = 2
"""Batches that are made before they are asked for."""
WORKERS = 8
T = TypeVar("T")


class BoxSplits(Protocol):
    """Three splits of pictures with boxes, and their classes; `niwaki.data.BoxSplits` is one."""

    @property
    def train(self) -> BoxPictures: ...

    @property
    def val(self) -> BoxPictures: ...

    @property
    def test(self) -> BoxPictures: ...

    @property
    def classes(self) -> tuple[str, ...]: ...


@final
@dataclass(frozen=True)
class Reading:
    """Which of a detector's boxes count in an evaluation; the defaults are YOLOv5's.

    Raises:
        InputError: a share out of [0, 1], or no box.
    """

    confidence: float = 0.001
    """Boxes below this score are left out; low, since precision is averaged over all recalls."""
    overlap: float = 0.6
    """Of two boxes of one class whose intersection over union is above this the less sure one goes."""
    most: int = MOST
    """Boxes of a picture; COCO counts the 100 surest."""

    def __post_init__(self) -> None:
        for name in ("confidence", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"Reading({name}={getattr(self, name)})", do="give a share from 0 to 1")
        if self.most < 1:
            raise InputError(f"Reading(most={self.most})", do="give at least 1 box")


SHOWN, SURE = 4, Reading(confidence=0.25, overlap=0.45)
"""Pictures in a report, and which boxes are drawn there: those that YOLO's users see."""


@final
@dataclass(frozen=True, eq=False)
class Detection(Task):
    """Boxes and classes of what is on a picture. A batch is (pictures, the boxes on each).

    Pictures are RGB from 0 to 1 in a frame of one size. Losses and decoding are the detector's own; precision is
    counted in pixels of the original pictures.

    Raises:
        InputError: an empty training split, another number of classes than the detector's, a setting out of its range.
    """

    splits: BoxSplits
    """Where the pictures come from; see `niwaki.data.open_boxes`."""
    detector: Detector
    """How the network's family is trained and read; `niwaki.models.load(...).detector`."""
    size: int | tuple[int, int] = 640
    """Of the frame in pixels: one side, or height and width."""
    fit: Fit | None = None
    """"letterbox" keeps proportions and puts grey around; "squash" fills the frame; None: as the detector's family has
    it (darknet's networks squash)."""
    batch: int = 16
    """Pictures in a batch, in training and in evaluation."""
    augment: Augmentation | None = field(default_factory=Augmentation)
    """How training pictures are changed; None leaves them as they are."""
    reading: Reading = field(default_factory=Reading)
    """Which boxes count in an evaluation."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"Detection(batch={self.batch})", do="give a batch of at least 1")
        if not isinstance(self.detector, Detector):
            raise InputError(
                f"detect with a {type(self.detector).__name__}",
                found="nothing that trains and reads a network; load(...).detector is None where no family is known",
                do="give a Detector: classes, fit, losses and found",
            )
        if not len(self.splits.train):
            raise InputError("train a detector", found="an empty training split", do="give some training pictures")
        if self.detector.classes != len(self.splits.classes):
            found = f"the network tells {self.detector.classes}, the data have {len(self.splits.classes)}"
            count = len(self.splits.classes)
            do = (
                f"build the network for them: ultralytics:NAME?nc={count}, darknet:FILE.cfg?classes={count} or "
                f"torchvision:NAME?num_classes={count + 1} (weights for others are taken but for the heads)"
            )
            raise InputError("detect as many classes as there are", found=found, do=do)
        assert self.frame.height  # refuses sizes and fits that are none

    @property
    def frame(self) -> Framing:
        """What every picture is fitted into."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return Framing(height, width, self.fit or self.detector.fit)

    @property
    def steps(self) -> int:
        return max(1, len(self.splits.train) // self.batch)

    def late(self, epoch: int, epochs: int) -> "Detection":
        """The task as it is in an epoch (from 0) of so many: without mosaics in the last ones."""
        change = self.augment
        if change is None or not change.mosaic or not 0 < epochs - change.close_mosaic <= epoch:
            return self
        return replace(self, augment=replace(change, mosaic=0.0))

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """One shuffled pass; a last batch that is not full is left out. What is drawn for a picture depends on `seed`
        and its place in the pass alone.
        """
        pictures, frame, change = self.splits.train, self.frame, self.augment
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(pictures), generator=generator).tolist()
        seeds = torch.randint(2**62, (len(order),), generator=generator).tolist()

        def make(place: int) -> tuple[Tensor, Boxes]:
            if change is None:
                return frame.framed(pictures, order[place])
            return change(pictures, order[place], frame, torch.Generator().manual_seed(seeds[place]))

        stop = len(order) - len(order) % self.batch if len(order) >= self.batch else len(order)
        return self._batches(range(stop), make)

    def calibration(self, n_batches: int, seed: int) -> list[Batch]:
        if n_batches < 1:
            raise InputError(f"{n_batches} calibration batches", do="ask for at least 1")
        pictures, frame = self.splits.train, self.frame
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed)).tolist()
        count = max(1, min(n_batches, len(order) // self.batch)) * self.batch
        return list(self._batches(order[:count], lambda number: frame.framed(pictures, number)))

    def inputs(self, batch: Batch) -> Tensor:
        return batch[0]

    def example(self) -> Tensor:
        return self.frame.framed(self.splits.train, 0)[0][None].float() / 255

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The parts of the detector's loss, as its family names and weights them."""
        pictures, targets = batch
        like = _like(model, pictures)
        with _memory(like, len(pictures)):
            moved = [boxes.to(like.device) for boxes in targets]
            return self.detector.losses(model, pictures.to(like.device, like.dtype), moved)

    def loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """The sum of the parts."""
        return torch.stack([part.reshape(()) for part in self.losses(model, batch).values()]).sum()

    def covered(self, batch: Batch, cells: tuple[int, int]) -> Bool[Tensor, "batch rows columns"]:
        """Which cells of a grid over each picture a box reaches into, however little."""
        pictures, targets = batch
        size = (pictures.shape[2], pictures.shape[3])
        return torch.stack([boxes.covered(size, cells) for boxes in targets])

    def found(self, model: nn.Module, pictures: BoxPictures, numbers: Sequence[int]) -> Iterator[Found]:
        """What the model sees on some pictures, in pixels of the originals; the model stays as it was.

        Raises:
            NotFiniteError: scores or corners are NaN or infinite.
            OutOfMemoryError: the device is too small for a batch.
        """
        reading, frame = self.reading, self.frame
        at = 0
        for inputs, _ in self._batches(numbers, lambda number: frame.framed(pictures, number)):
            like = _like(model, inputs)
            with evaluating(model), _memory(like, len(inputs)):
                seen = self.detector.found(
                    model,
                    inputs.to(like.device, like.dtype),
                    confidence=reading.confidence,
                    overlap=reading.overlap,
                    most=reading.most,
                )
                if not any(map(len, seen)):  # where scores are NaN nothing is above a threshold
                    _refuse_not_finite(tensors_in(run(model, inputs.to(like.device, like.dtype))))
            for number, one in zip(numbers[at : at + len(seen)], seen, strict=True):
                _refuse_not_finite([one.scores, one.corners])
                entry = pictures[number]
                place = frame.place(entry.width, entry.height)
                corners = moved_back(one.corners.float().cpu(), place, entry.width, entry.height)
                yield Found(corners, one.labels.cpu(), one.scores.float().cpu())
            at += len(seen)

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement:
        """AP50 in percent; see `metrics`."""
        return self.metrics(model, split=split, limit=limit)["AP50"]

    def metrics(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> dict[str, Measurement]:
        """COCO's average precision in percent: AP, AP_small, AP_medium, AP_large as far as there are such objects, and
        AP50, whose spread is the standard deviation over resamplings of the pictures.

        Raises:
            InputError: an unknown or empty split, or one without objects.
            NotFiniteError: the model puts out NaN or infinite values.
            OutOfMemoryError: the device is too small for a batch.
            MissingExtraError: pycocotools is not installed.
        """
        part, count = part_of(self.splits, split, limit, of="pictures")
        pictures: BoxPictures = part
        truth = [pictures[number] for number in range(count)]
        seen = list(self.found(model, pictures, range(count)))
        figures = average_precision(truth, seen, self.splits.classes)
        asked = sum(int((~one.ignored).sum()) for one in truth)
        read = self.reading
        where = (
            f"{asked} objects on {count} of {len(pictures)} pictures of the {split} split, in a frame of "
            f"{self.frame.width} x {self.frame.height} ({self.frame.fit}); boxes of score {read.confidence:g} or more, "
            f"non-maximum suppression at {read.overlap:g}, {min(read.most, MOST)} of a picture at most"
        )
        made = {}
        for name, figure in figures.items():
            said = (
                f"COCO's average precision (101 recalls, mean over classes with objects) {figure.definition}; {where}"
            )
            spread = None if figure.spread is None else 100 * figure.spread
            if spread is not None:
                said += f"; spread is the standard deviation over {DRAWS} resamplings of the pictures"
            device = device_name(device_of(model))
            made[name] = Measurement(name, 100 * figure.value, "%", said, spread=spread, device=device)
        return made

    def shown(self, models: Mapping[str, nn.Module], *, limit: int | None = None) -> list[Shown]:
        """The objects on a few test pictures, and what each model is rather sure of there."""
        pictures, count = part_of(self.splits, "test", limit, of="pictures")
        numbers = sorted({round(at * (count - 1) / max(1, SHOWN - 1)) for at in range(SHOWN)})
        sure = replace(self, reading=SURE)
        found = {name: list(sure.found(model, pictures, numbers)) for name, model in models.items()}
        shown = []
        for place, number in enumerate(numbers):
            one: Any = pictures[number]
            height, width = drawn_size(one.width, one.height)
            pixels = pictures.picture(number, height, width)
            scale = torch.tensor([width / one.width, height / one.height] * 2)

            def drawn(boxes: Boxes | Found, signs: list[str]) -> bytes:
                return drawing(pixels, (boxes.corners * scale).tolist(), boxes.labels.tolist(), signs)  # noqa: B023

            row, real = one.path.name, learned(one)
            named = [self.splits.classes[label] for label in real.labels.tolist()]
            shown.append(Shown(row, f"{len(real)} object{'' if len(real) == 1 else 's'}", drawn(real, named)))
            for name, seen in found.items():
                here = seen[place]
                signs = [
                    f"{self.splits.classes[label]} {score:.2f}"
                    for label, score in zip(here.labels.tolist(), here.scores.tolist(), strict=True)
                ]
                words = f"{name}: {len(here)} found with a score of {SURE.confidence:g} or more"
                shown.append(Shown(row, words, drawn(here, signs)))
        return shown

    def _batches(self, numbers: Sequence[int], make: Callable[[int], tuple[Tensor, Boxes]]) -> Iterator[Batch]:
        """What `make` gives for each number, in batches, made ahead by a few threads."""
        taken: list[tuple[Tensor, Boxes]] = []
        for done, sample in enumerate(in_order(make, numbers, ahead=AHEAD * self.batch), start=1):
            taken.append(sample)
            if len(taken) == self.batch or done == len(numbers):
                pictures = torch.stack([picture for picture, _ in taken])
                yield pictures.float() / 255, tuple(boxes for _, boxes in taken)
                taken = []


def in_order(make: Callable[[Any], T], items: Sequence[Any], *, ahead: int) -> Iterator[T]:
    """`make(item)` of each item, in their order; up to `ahead` of them are made before they are asked for."""
    pool = ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1))  # pillow decodes without the interpreter's lock
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _like(model: nn.Module, default: Tensor) -> Tensor:
    """A tensor of the model's device and kind of number."""
    return next((p for p in model.parameters() if p.is_floating_point()), default)


@contextmanager
def _memory(like: Tensor, count: int) -> Iterator[None]:
    """Inside, a device that is too small says so in our words."""
    try:
        yield
    except torch.OutOfMemoryError as cause:
        found = f"no memory left on {like.device} for a batch of {count}"
        raise OutOfMemoryError("run the model", found=found, do="use a smaller batch") from cause


def _refuse_not_finite(tensors: Sequence[Tensor]) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        do = "look for NaN in the weights, or for a precision that is too small"
        raise NotFiniteError("detect things", found="NaN or infinite outputs", do=do)
