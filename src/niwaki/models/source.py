"""What every source of models gives: an untrained or stored network, and an input that it takes."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from torch import nn

from niwaki.errors import InputError
from niwaki.models.checkpoint import load_checkpoint_
from niwaki.tasks.detector import Detector
from niwaki.units import Example

USUAL = "the usual one"
"""What is assumed of networks whose builders name no shape, or one that they were published for."""
IMAGENET_SHAPE = (3, 224, 224)  # what image networks are published for, unless they say otherwise


@final
@dataclass(frozen=True, eq=False)
class Built:
    """A network in evaluation mode, an example input, and how its pictures are normalised where that is known."""

    model: nn.Module
    example: Example
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """(mean, std) of pixels from 0 to 1."""
    stored: bool = False
    """Whether the weights came with the source (and were not drawn at random)."""
    assumed: str = ""
    """Where the example's shape came from, if neither the user nor the network says it: a guess, a usual one."""
    detector: Detector | None = None
    """How it is trained and read, if it finds boxes and its family is known here."""
    protect: tuple[str, ...] = ()
    """Modules whose outputs have to keep their width, for `compress`: nothing in a forward shows why."""


@dataclass(frozen=True)
class ModelSource(ABC):
    """Builds one named network, without ever downloading."""

    name: str
    """What stands after the colon: a model's name, a folder, a place in Python."""
    arguments: dict[str, Any]
    """Settings for the builder: what stands after the question mark, JSON values."""
    shape: tuple[int, ...] | None = None
    """Of one input without the batch, where the usual one does not fit."""
    weights: ClassVar[frozenset[str]] = frozenset({"pretrained", "weights", "weights_backbone"})
    """Arguments of foreign builders that would download."""
    runs: ClassVar[bool] = False
    """Whether its builders run the network, so that parameters must be there until it is built."""

    @abstractmethod
    def build(self, *, stored: bool) -> Built:
        """The network: with the weights its source holds if `stored` and if there are any, otherwise untrained."""

    def fill_(self, model: nn.Module, file: str | Path) -> None:
        """Puts a checkpoint's weights into a network of this source; formats of its own are read here."""
        load_checkpoint_(model, file)


def refuse_downloads(source: ModelSource) -> None:
    """Arguments that would fetch weights are the user's mistake."""
    if asked := sorted(source.weights & set(source.arguments)):
        raise InputError(
            f"model argument {asked[0]!r}",
            found="niwaki never downloads weights",
            where=source.name,
            do="fetch the file yourself and give it as checkpoint",
        )


def call_builder(source: ModelSource, builder: Any, **given: Any) -> Any:
    """`builder(**given, **arguments)`; an argument that it does not take is the user's mistake."""
    try:
        return builder(**given, **source.arguments)
    except (TypeError, ValueError, AssertionError) as cause:
        if not source.arguments:
            raise
        raise InputError(
            f"build {source.name} with {json.dumps(source.arguments)}",
            found=f"{type(cause).__name__}: {cause}",
            do="check the names and values after the question mark",
        ) from cause
