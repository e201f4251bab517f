"""One class for each picture: cross-entropy and accuracy."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from niwaki.errors import InputError, NotFiniteError, Setting, UnknownNameError
from niwaki.measure import Measurement
from niwaki.measure.measurement import device_name, evaluating
from niwaki.tasks import Task
from niwaki.tasks.outputs import logits_of, outputs_of
from niwaki.tasks.parts import part_of
from niwaki.units import device_of

Batch = tuple[Tensor, Tensor]
AUGMENT = ("none", "flip_crop")


class Labelled(Protocol):
    """Pictures with labels, in batches; `niwaki.data.Images` is one."""

    def __len__(self) -> int: ...

    def batches(
        self, size: int, *, shuffle_seed: int | None = None, augment: bool = False, whole: bool = False
    ) -> Iterator[Batch]: ...


class LabelledSplits(Protocol):
    """Three labelled splits and their classes; `niwaki.data.Splits` is one."""

    @property
    def train(self) -> Labelled: ...

    @property
    def val(self) -> Labelled: ...

    @property
    def test(self) -> Labelled: ...

    @property
    def classes(self) -> tuple[str, ...]: ...


def refuse_settings(augment: str, label_smoothing: float) -> None:
    """Refuse settings that no pictures could have.

    Raises:
        UnknownNameError: another augmentation.
        InputError: a share outside [0, 1).
    """
    if augment not in AUGMENT:
        raise UnknownNameError.of("augmentation", augment, AUGMENT)
    if not 0 <= label_smoothing < 1:
        said = Setting("label_smoothing", label_smoothing, f"Classification(label_smoothing={label_smoothing})")
        raise InputError((said,), do="give a share in [0, 1)")


@final
@dataclass(frozen=True, eq=False)
class Classification(Task):
    """Which of the classes a picture shows. A batch is (inputs, labels).

    Raises:
        InputError: an empty training split, or a setting out of its range.

    Examples:
        >>> import niwaki.data
        >>> task = Classification(niwaki.data.open("digits"), batch=32)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> with torch.no_grad():
        ...     nothing = [parameter.zero_() for parameter in model.parameters()]
        >>> round(task.loss(model, task.calibration(1, 0)[0]).item(), 4)  # the logarithm of ten classes
        2.3026
    """

    splits: LabelledSplits
    """Where the pictures come from; see `niwaki.data.open`."""
    batch: int = 128
    """Pictures in a batch, in training and in evaluation; 128 is usual for CIFAR."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, in [0, 1); 0 is plain cross-entropy."""
    augment: str = "none"
    """"none", or "flip_crop": half of the pictures mirrored, each shifted by up to an eighth (not for digits)."""

    def __post_init__(self) -> None:
        refuse_settings(self.augment, self.label_smoothing)
        if self.batch < 1:
            raise InputError(f"Classification(batch={self.batch})", do="give a batch of at least 1")
        if not len(self.splits.train):
            raise InputError("train a classifier", found="an empty training split", do="give some training pictures")

    @property
    def classes(self) -> int:
        return len(self.splits.classes)

    @property
    def nonnegative(self) -> bool:
        return True

    @property
    def steps(self) -> int:
        return max(1, len(self.splits.train) // self.batch)

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """One shuffled pass; a last batch that is not full is left out, so that batch statistics stay comparable."""
        augment = self.augment == "flip_crop"
        return self.splits.train.batches(self.batch, shuffle_seed=seed, augment=augment, whole=True)

    def calibration(self, n_batches: int, seed: int) -> list[Batch]:
        if n_batches < 1:
            raise InputError(f"{n_batches} calibration batches", do="ask for at least 1")
        return list(islice(self.splits.train.batches(self.batch, shuffle_seed=seed, whole=True), n_batches))

    def inputs(self, batch: Batch) -> Tensor:
        return batch[0]

    def example(self) -> Tensor:
        inputs, _ = next(self.splits.train.batches(1))
        return inputs

    def loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """Mean cross-entropy over the batch."""
        logits, labels = self._logits(model, batch)
        return functional.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement:
        """Top-1 accuracy in percent; `spread` is its binomial standard error.

        Raises:
            InputError: an unknown or empty split, or a model whose output does not fit the classes.
            NotFiniteError: the model puts out NaN or infinite values.
            OutOfMemoryError: the device is too small for a batch.
        """
        part, count = part_of(self.splits, split, limit, of="pictures")
        images: Labelled = part
        right = torch.zeros((), dtype=torch.int64, device=device_of(model))
        finite = torch.ones((), dtype=torch.bool, device=device_of(model))
        with evaluating(model):
            for number, (inputs, labels) in enumerate(images.batches(self.batch)):
                take = count - number * self.batch
                if take <= 0:
                    break
                logits, labels = self._logits(model, (inputs[:take], labels[:take]))
                finite &= logits.isfinite().all()
                right += (logits.argmax(dim=1) == labels).sum()
        if not finite:
            do = "look for NaN in the weights, or for a precision that is too small"
            raise NotFiniteError(f"evaluate on the {split} split", found="NaN or infinite outputs", do=do)
        share = right.item() / count
        return Measurement(
            "accuracy",
            100 * share,
            "%",
            f"top-1 accuracy on {count} of {len(images)} pictures of the {split} split, {len(self.splits.classes)} "
            "classes; spread is the binomial standard error",
            spread=100 * math.sqrt(share * (1 - share) / count),
            device=device_name(device_of(model)),
        )

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "batch classes"], Int[Tensor, " batch"]]:
        inputs, labels = batch
        logits = logits_of(outputs_of(model, inputs))
        wanted = (len(inputs), len(self.splits.classes))
        if tuple(logits.shape) != wanted:
            found, do = f"output of shape {tuple(logits.shape)}", "use a model with as many classes as the data"
            raise InputError(f"class scores of shape {wanted}", found=found, do=do)
        return logits, labels.to(logits.device)
