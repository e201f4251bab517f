"""Channel-wise distillation (CWD): where each channel of the teacher looks, the student's shall look."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from niwaki.distill.loss import Loss, Widths, divergence, laid_out, need_equal, need_positions, need_temperature


@final
@dataclass(frozen=True)
class ChannelWise(Loss):
    """Every channel's map becomes a distribution over positions; divergence of the student's from the teacher's.

    tau^2 / (N C) * sum over samples and channels of KL(softmax(teacher / tau) || softmax(student / tau)), the softmax
    over positions. A constant added to a channel changes nothing.

    Source: Shu et al. 2021, arXiv:2011.13256, sec. 3.2. Differs from public code: log-softmax where softmax, then log,
    underflows; the divergence in place of a cross-entropy that never reaches 0.

    Raises:
        InputError: a temperature that is not above 0, other widths than the teacher's, or a single position.

    Examples:
        >>> import math, torch
        >>> teacher = torch.tensor([[[[0.0, 0.0], [0.0, math.log(3)]]]])
        >>> round(ChannelWise(1.0)(torch.zeros(1, 1, 2, 2), teacher).item(), 4)  # 1/2 ln 4/3
        0.1438
    """

    temperature: float = 4.0
    """tau, above 0: the smaller, the more the teacher's peaks count; 4 for scores of segmentation in the paper's code,
    1 for features of detectors."""
    axis: int | None = None
    """Of the channels; None: the second of [batch, channels, height, width], the last of [batch, tokens, width]."""

    def __post_init__(self) -> None:
        need_temperature(self, self.temperature)

    @property
    def widths(self) -> Widths:
        return "equal"

    @property
    def channels(self) -> int | None:
        return self.axis

    def __call__(self, student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
        """The divergence of features [batch, channels, height, width] or [batch, tokens, width]."""
        ours, theirs = laid_out(student, teacher, self.axis)  # [batch, channels, positions]
        need_equal(ours, theirs, "channel_wise")
        need_positions(ours, "channel_wise")
        return divergence(ours, theirs, self.temperature, axis=2)  # of positions; mean over [batch, channels]
