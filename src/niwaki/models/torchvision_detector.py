"""How torchvision's detectors are trained and read: by their own losses and decoding."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from niwaki.boxes import Boxes, Found
from niwaki.errors import InputError
from niwaki.models.targets import refuse_targets
from niwaki.tasks.framing import Fit

KINDS = ("FasterRCNN", "RetinaNet", "FCOS", "SSD")
"""Classes of torchvision whose targets are boxes and labels and nothing else."""
LIMITS = {"confidence": "score_thresh", "overlap": "nms_thresh", "most": "detections_per_img"}
"""What they call the limits of what is found."""


@final
@dataclass(frozen=True)
class TorchvisionDetector:
    """Faster R-CNN, RetinaNet, FCOS, SSD and SSDlite.

    Their label 0 is background, also where the head has none apart, as with torchvision's own weights: class 0 of the
    data is label 1. They resize and normalise pictures themselves (`?min_size=320&max_size=320`).
    """

    classes: int
    """Of the head, without background: one less than the builder's `num_classes`."""

    @property
    def fit(self) -> Fit:
        return "letterbox"

    def losses(self, model: nn.Module, pictures: Tensor, targets: Sequence[Boxes]) -> dict[str, Tensor]:
        """The model's own parts of its loss, of `[batch, 3, rows, columns]` pictures from 0 to 1.

        Batch norms and dropout stay in the mode they are in.

        Raises:
            InputError: another network, labels out of range, or as many targets as pictures are not there.
        """
        refuse_targets(targets, pictures=len(pictures), classes=self.classes)
        told = [{"boxes": one.corners.to(pictures), "labels": one.labels.to(pictures.device) + 1} for one in targets]
        with _telling_losses(_parts(model)):
            found = model(list(pictures), told)
        return {str(name): part for name, part in found.items()}

    @torch.no_grad()
    def found(self, model: nn.Module, pictures: Tensor, *, confidence: float, overlap: float, most: int) -> list[Found]:
        """Boxes as the model decodes and suppresses them, with these limits in the place of its own."""
        with _limited(_parts(model), confidence=confidence, overlap=overlap, most=most):
            seen = model(list(pictures))
        return [self._found(one) for one in seen]

    def _found(self, one: dict[str, Tensor]) -> Found:
        real = one["labels"] > 0  # heads without a background of their own may name it
        order = one["scores"][real].argsort(descending=True, stable=True)
        return Found(one["boxes"][real][order], one["labels"][real][order] - 1, one["scores"][real][order])


def detector_of(model: nn.Module, classes: int) -> TorchvisionDetector | None:
    """How a network of torchvision is trained and read; None where its targets are more than boxes, or it is none.

    Args:
        classes: with background.
    """
    return TorchvisionDetector(classes - 1) if type(model).__name__ in KINDS and classes > 1 else None


def _parts(model: nn.Module) -> list[Any]:
    """The modules that ask for their mode: the network itself, and of two-stage ones the stages."""
    network: Any = getattr(model, "module", model)  # inside a data-parallel wrapper
    if type(network).__name__ not in KINDS:
        found = f"a {type(network).__name__}"
        do = "give the network itself; one that was cut by `torch.export` is only run"
        raise InputError("a detector of torchvision", found=found, do=do)
    stages = [getattr(network, name) for name in ("rpn", "roi_heads") if hasattr(network, name)]
    return [network, *stages]


@contextmanager
def _telling_losses(parts: list[Any]) -> Iterator[None]:
    """Inside, these modules are in training mode, and nothing below them."""
    before = [part.training for part in parts]
    try:
        for part in parts:
            part.training = True
        yield
    finally:
        for part, mode in zip(parts, before, strict=True):
            part.training = mode


@contextmanager
def _limited(parts: list[Any], **limits: float) -> Iterator[None]:
    """Inside, these limits hold."""
    last, modes = parts[-1], [part.training for part in parts]
    before = {LIMITS[name]: getattr(last, LIMITS[name]) for name in limits}
    try:
        for part in parts:
            part.training = False
        for name, value in limits.items():
            setattr(last, LIMITS[name], value)
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
        for name, value in before.items():
            setattr(last, name, value)
