"""What a batch means: the abstract type that scores, repair and training rely on."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from niwaki.measure import Measurement


@final
@dataclass(frozen=True)
class Shown:
    """A small picture for a report."""

    row: str
    """What it stands beside: pictures of one row are of one thing."""
    words: str
    """What it shows."""
    jpeg: bytes


class Task(ABC):
    """A loss, a metric and batches. What a batch is made of only the task knows.

    So detection fits as it is: a batch of pictures of several sizes with lists of boxes, a loss that calls the model on
    both (torchvision's detectors want `model(images, targets)`), and mean average precision as metric.
    """

    @property
    def extra(self) -> nn.Module | None:
        """Parameters of the task's own that are trained with the model; None where it has none."""
        return None

    @property
    def classes(self) -> int | None:
        """Of how many classes the labels are, where a batch is (inputs, labels [batch]) and labels may also be shares
        [batch, classes]: then pictures can be mixed (`niwaki.train.Mix`). None for other tasks.
        """
        return None

    @property
    def nonnegative(self) -> bool:
        """Whether no part of the loss is ever below 0 on any batch: a search may then refuse a network by some of them.
        False of tasks that do not say so."""
        return False

    @property
    @abstractmethod
    def steps(self) -> int:
        """Batches in one pass of `train_batches`."""

    @abstractmethod
    def train_batches(self, seed: int) -> Iterator[Any]:
        """One pass over the training split, in an order (and with augmentation) that only `seed` decides."""

    @abstractmethod
    def calibration(self, n_batches: int, seed: int) -> list[Any]:
        """Up to `n_batches` training batches without augmentation, drawn by `seed`; fewer where there are fewer."""

    @abstractmethod
    def inputs(self, batch: Any) -> Any:
        """What of a batch the model is called on (see `niwaki.units.run`)."""

    @abstractmethod
    def example(self) -> Any:
        """One input, to trace and measure with."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The scalar to minimise, differentiable; the batch is moved to the model's device and precision."""

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The parts of the loss that are judged apart, by name: scalars, means over the batch; by default one."""
        return {"loss": self.loss(model, batch)}

    @abstractmethod
    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement:
        """The task's metric on a split or its first `limit` samples, higher is better; the model stays as it was."""

    def metrics(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> dict[str, Measurement]:
        """Every metric by its name, that of `evaluate` last."""
        found = self.evaluate(model, split=split, limit=limit)
        return {found.name: found}

    def shown(self, models: Mapping[str, nn.Module], *, limit: int | None = None) -> list[Shown]:
        """A few small pictures of what each model, by its name, does on the test split; none of most tasks."""
        return []
