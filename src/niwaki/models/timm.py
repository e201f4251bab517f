"""Networks of timm, by name."""

import difflib
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from niwaki.errors import MissingExtraError, UnknownNameError
from niwaki.models import IMAGENET_SHAPE, USUAL, Built, ModelSource, call_builder, refuse_downloads


@final
@dataclass(frozen=True)
class Timm(ModelSource):
    """`timm:NAME`, untrained; arguments go to `timm.create_model` (`timm:resnet26?in_chans=1`).

    Raises:
        UnknownNameError: a name that timm does not have (places on a hub are none); the nearest are listed.
        InputError: arguments that the model does not take, or that would download.
        MissingExtraError: timm is not installed.
    """

    counting: ClassVar[str] = "num_classes"

    def build(self, *, stored: bool) -> Built:
        try:
            import timm
        except ImportError as cause:
            raise MissingExtraError("timm models need timm", do='pip install "niwaki[vision]"') from cause
        refuse_downloads(self)
        if ":" in self.name or "/" in self.name or not timm.is_model(self.name):
            known = timm.list_models()
            near = difflib.get_close_matches(self.name, known, n=8, cutoff=0.4)
            raise UnknownNameError(
                f"unknown timm model {self.name!r}",
                found=f"{len(known)} known, nearest: {', '.join(near) or 'none is near'}",
                do="use a name of timm.list_models(); niwaki never downloads from a hub",
            )
        model = call_builder(self, timm.create_model, model_name=self.name, pretrained=False).eval()
        facts = getattr(model, "pretrained_cfg", None) or {}
        shape = self.shape or self._shape(facts.get("input_size", IMAGENET_SHAPE))
        mean, std = facts.get("mean"), facts.get("std")
        published = (tuple(mean), tuple(std)) if mean and std and len(mean) == shape[0] else None
        bound = facts.get("fixed_input_size") or "img_size" in self.arguments
        return Built(model, torch.zeros(1, *shape), published, assumed="" if self.shape or bound else USUAL)

    def _shape(self, usual: tuple[int, ...]) -> tuple[int, ...]:
        """The published input shape, with the channels and the size that the arguments ask for."""
        channels = self.arguments.get("in_chans", usual[0])
        size = self.arguments.get("img_size", usual[1:])
        return (channels, size, size) if isinstance(size, int) else (channels, *size)
