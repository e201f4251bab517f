"""Softened class scores: the student learns which wrong classes its teacher finds likely."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from niwaki.distill.loss import Loss, Widths, divergence, laid_out, need_equal, need_temperature


@final
@dataclass(frozen=True)
class Logits(Loss):
    """Divergence of the student's class probabilities from the teacher's, both softened by a temperature.

    T^2 * KL(softmax(teacher / T) || softmax(student / T)), summed over classes, mean over the batch and over all
    positions (tokens, pixels), those included that have no label.

    Source: Hinton et al. 2015, arXiv:1503.02531, sec. 2. Differs: the divergence in place of the cross-entropy, which
    has the same gradient and is 0 where both agree.

    Raises:
        InputError: a temperature that is not above 0, or scores of different shapes.

    Examples:
        >>> import math, torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
        >>> round(Logits(1.0)(student, teacher).item(), 4)  # 3/4 ln 3/2 + 1/4 ln 1/2
        0.1308
    """

    temperature: float = 4.0
    """Scores are divided by it, above 0; 1 to 20 in the paper, 4 is what later work settled on."""
    axis: int | None = None
    """Of the classes; None: the second of [batch, classes, height, width], the last of fewer axes."""

    def __post_init__(self) -> None:
        need_temperature(self, self.temperature)

    @property
    def widths(self) -> Widths:
        return "equal"

    @property
    def channels(self) -> int | None:
        return self.axis

    def __call__(self, student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
        """The divergence of scores [batch, classes], [batch, tokens, vocabulary] or [batch, classes, height, width]."""
        ours, theirs = laid_out(student, teacher, self.axis)  # [batch, classes, positions]
        need_equal(ours, theirs, "logits")
        return divergence(ours, theirs, self.temperature, axis=1)  # of classes; mean over [batch, positions]
