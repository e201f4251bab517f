"""Networks of torchvision, by name."""

import difflib
import inspect
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch

from niwaki.errors import MissingExtraError, UnknownNameError
from niwaki.models import IMAGENET_SHAPE, USUAL, Built, ModelSource, call_builder, refuse_downloads
from niwaki.models.torchvision_detector import detector_of
from niwaki.units import Example

# What single families take instead of 224 x 224; from their builders' own defaults.
SHAPES: dict[str, tuple[int, ...]] = {
    "inception_v3": (3, 299, 299),
    "r3d_18": (3, 16, 112, 112),
    "mc3_18": (3, 16, 112, 112),
    "r2plus1d_18": (3, 16, 112, 112),
    "raft_large": (3, 128, 128),
    "raft_small": (3, 128, 128),
}
COCO = 91
"""Classes of torchvision's detectors unless said, background among them."""
CLIP = (3, 16, 224, 224)  # frames of video networks


@final
@dataclass(frozen=True)
class Torchvision(ModelSource):
    """`torchvision:NAME`, untrained; arguments go to torchvision's builder (`torchvision:resnet18?num_classes=10`).

    Raises:
        UnknownNameError: a name that torchvision does not have; the nearest are listed.
        InputError: arguments that the builder does not take, or that would download.
        MissingExtraError: torchvision is not installed.
    """

    counting: ClassVar[str] = "num_classes"

    def build(self, *, stored: bool) -> Built:
        try:
            from torchvision import models
        except ImportError as cause:
            do = 'pip install "niwaki[vision]"'
            raise MissingExtraError("torchvision models need torchvision", do=do) from cause
        refuse_downloads(self)
        known = models.list_models()
        if self.name not in known:
            near = difflib.get_close_matches(self.name, known, n=8, cutoff=0.4)
            raise UnknownNameError(
                f"unknown torchvision model {self.name!r}",
                found=f"{len(known)} known, nearest: {', '.join(near) or 'none is near'}",
                do="use a name of torchvision.models.list_models()",
            )
        builder = models.get_model_builder(self.name)
        takes = inspect.signature(builder).parameters
        given: dict[str, Any] = {"weights": None}
        if "weights_backbone" in takes:  # would otherwise be downloaded
            given["weights_backbone"] = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # googlenet and inception on their next default
            model = call_builder(self, builder, **given).eval()
        bound = isinstance(getattr(model, "image_size", None), int)
        return Built(
            model,
            self._example(builder.__module__, model),
            ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            assumed="" if self.shape or bound else USUAL,
            detector=detector_of(model, int(self.arguments.get("num_classes") or COCO)),
        )

    def _example(self, module: str, model: Any) -> Example:
        usual = SHAPES.get(self.name.removeprefix("quantized_"), CLIP if ".video" in module else IMAGENET_SHAPE)
        size = getattr(model, "image_size", None)  # vision transformers are bound to theirs
        if isinstance(size, int):
            usual = (3, size, size)
        shape = self.shape or usual
        if ".detection" in module:
            return [torch.zeros(shape)]
        if ".optical_flow" in module:
            return (torch.zeros(1, *shape), torch.zeros(1, *shape))
        return torch.zeros(1, *shape)
