"""Features as they are: squared differences, at equal widths or through a trained linear map."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from niwaki.distill.loss import Loss, Widths, laid_out, need_equal


@final
@dataclass(frozen=True)
class Features(Loss):
    """Mean squared difference between student and teacher.

    Source: Romero et al. 2015, arXiv:1412.6550 (FitNets), eq. 3. Differs: the mean over everything in place of half the
    sum; the map from the student's width to the teacher's is linear at each position (a 1x1 convolution), and is
    trained beside the student, not before it. It is always on the student's side: on the teacher's, the loss could be
    lowered by flattening the target. With `adapter=True`, `Distilled(..., student=model)` tells the map's width.

    Raises:
        InputError: different widths that nothing joins, or different positions.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])
        >>> Features()(student, teacher).item()
        2.0
        >>> round(Features(normalise=True)(student, 3 * student).item(), 4)
        0.0
    """

    adapter: bool = False
    """A trained linear map with bias, from the student's channels to the teacher's; False: widths must be equal."""
    normalise: bool = False
    """Compare directions: the channels at each position are scaled to length 1, and the squared distance of these unit
    vectors, 2 (1 - cosine), is averaged over batch and positions."""
    axis: int | None = None
    """Of the channels; None: the second of [batch, channels, height, width], the last of fewer axes."""

    @property
    def widths(self) -> Widths:
        return "adapted" if self.adapter else "equal"

    @property
    def channels(self) -> int | None:
        return self.axis

    def __call__(self, student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
        """The difference of features of one width, the student's adapted already where it is to be."""
        ours, theirs = laid_out(student, teacher, self.axis)  # [batch, channels, positions]
        need_equal(ours, theirs, "features")
        if not self.normalise:
            return functional.mse_loss(ours, theirs)
        apart = functional.normalize(ours, dim=1) - functional.normalize(theirs, dim=1)
        return apart.square().sum(1).mean()
