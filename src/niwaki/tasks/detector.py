"""What the detection task asks of a family of detectors: its own losses, and its own decoding."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from niwaki.boxes import Boxes, Found
from niwaki.tasks.framing import Fit


@runtime_checkable
class Detector(Protocol):
    """How a family of detectors is trained and read.

    It is told the network at each call and keeps no parameters of its own, so that it works for a cut network as for
    the whole one.
    """

    @property
    def classes(self) -> int:
        """Of how many classes it tells boxes."""

    @property
    def fit(self) -> Fit:
        """How the family's users fit pictures into a frame."""

    def losses(
        self, model: nn.Module, pictures: Float[Tensor, "n 3 h w"], targets: Sequence[Boxes]
    ) -> dict[str, Tensor]:
        """The parts of the family's loss by name, differentiable scalars, means over the batch, weighted: their sum is
        what is minimised.

        Works in training and in evaluation mode. `pictures` are RGB from 0 to 1 (the family's own normalisation is its
        own business), on the network's device; boxes are in pixels of the h x w pictures, some pictures have none.
        """

    def found(
        self, model: nn.Module, pictures: Float[Tensor, "n 3 h w"], *, confidence: float, overlap: float, most: int
    ) -> list[Found]:
        """What the network sees on each picture, after non-maximum suppression class by class, the surest first.

        Args:
            confidence: boxes below this score are left out.
            overlap: of two boxes of one class whose intersection over union is above this the less sure one goes.
            most: boxes of one picture at most.
        """
