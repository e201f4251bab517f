"""What every source of models gives: an untrained or stored network, and an input that it takes."""

import json
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

from torch import Tensor, nn

from niwaki.errors import InputError, NotFiniteError
from niwaki.models.checkpoint import COUNTERS, fit_state_, read_checkpoint
from niwaki.tasks.detector import Detector
from niwaki.units import Example

log = logging.getLogger(__name__)

USUAL = "the usual one"
"""What is assumed of networks whose builders name no shape, or one that they were published for."""
IMAGENET_SHAPE = (3, 224, 224)  # what image networks are published for, unless they say otherwise
FEW, MANY = 1, 1000
"""Numbers of classes: what differs between networks of so many are the heads."""
SHOWN = 6


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
    drawn: tuple[str, ...] = ()
    """Tensors that the stored weights have for another number of classes: they are as they were drawn."""


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
    counting: ClassVar[str] = ""
    """The argument for the number of classes; given, weights of another number are taken, and heads drawn anew."""

    @abstractmethod
    def build(self, *, stored: bool) -> Built:
        """The network: with the weights its source holds if `stored` and if there are any, otherwise untrained."""

    def fill_(self, model: nn.Module, file: str | Path) -> tuple[str, ...]:
        """Puts a checkpoint's weights into a network of this source; see `fit_`."""
        return self.fit_(model, self.read(model, file), where=str(file))

    def read(self, model: nn.Module, file: str | Path) -> dict[str, Tensor]:
        """Names and tensors of a checkpoint for `model`; formats of its own are read here."""
        return read_checkpoint(file)

    def fit_(self, model: nn.Module, state: dict[str, Tensor], *, where: str) -> tuple[str, ...]:
        """Puts names and tensors into `model`; all of them or, with an error, none.

        Where the number of classes was given as an argument, tensors whose shapes follow it may come in other shapes:
        they stay as they were drawn, and their names are returned and told.

        Raises:
            InputError, NotFiniteError: see `niwaki.models.load_checkpoint_`.
        """
        own = model.state_dict()
        other = {name for name, tensor in state.items() if name in own and tensor.shape != own[name].shape}
        same = not any(not name.endswith(COUNTERS) for name in own.keys() ^ state.keys())
        heads = bool(other) and same and bool(self.counting) and other <= self._heads(own)
        drawn = tuple(name for name in own if name in other) if heads and self.counting in self.arguments else ()
        try:
            fit_state_(model, {**state, **{name: own[name] for name in drawn}}, where=where)
        except NotFiniteError:
            raise
        except InputError as cause:
            do = self.advice(model, state)
            if heads:
                do = f"weights for another number of classes: write ?{self.counting}=N after the model's name (N of "
                do += "your data) to take them all the same, with heads that are drawn anew"
            raise InputError(cause.asked, found=cause.found, where=where, do=do or cause.do) from cause
        if drawn:
            listed = ", ".join(drawn[:SHOWN]) + (f", ... ({len(drawn)} in all)" if len(drawn) > SHOWN else "")
            asked = f"{self.counting}={json.dumps(self.arguments[self.counting])}"
            log.warning(
                "%s: weights for another number of classes than %s: drawn anew, to be trained: %s", where, asked, listed
            )
        return drawn

    def alike(self) -> nn.Module:
        """The network alone, untrained, to compare shapes with."""
        return self.build(stored=False).model

    def advice(self, model: nn.Module, state: dict[str, Tensor]) -> str:
        """What to do about weights that do not fit, where more is known than that."""
        return ""

    def _heads(self, own: dict[str, Tensor]) -> set[str]:
        """Names of the tensors whose shapes follow the number of classes; none where it can't be changed."""
        found: set[str] = set()
        for classes in (FEW, MANY):
            try:
                other = replace(self, arguments={**self.arguments, self.counting: classes}).alike()
            except InputError:  # networks that count no classes
                return set()
            shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
            found |= {name for name, tensor in own.items() if name in shapes and shapes[name] != tensor.shape}
        return found


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
