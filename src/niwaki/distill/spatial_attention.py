"""Attention maps: where the teacher's channels are strong together, the student's shall be, however many it has."""

from dataclasses import dataclass
from typing import Literal, final, get_args

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from niwaki.distill.loss import Located, Widths, laid_out, need_positions
from niwaki.errors import InputError, UnknownNameError

Over = Literal["mean", "sum"]


@final
@dataclass(frozen=True)
class SpatialAttention(Located):
    """Squared distance of maps of attention: mean of |feature|^p over channels, scaled to length 1 over positions.

    Needs no equal widths. Factors, copies of channels and channels of zeros change nothing; an all-zero feature has an
    all-zero map. With `things` the maps are the same, and distances count at the cells that a thing covers only.

    Source: Chu et al. 2022, arXiv:2306.01526, official code (`things`: its tenth strategy, of which only is known that
    the cells are those that are covered by ground truth); the map is of Zagoruyko and Komodakis 2017,
    arXiv:1612.03928, eq. 2. Differs: the weights of places are the caller's.

    Raises:
        InputError: a power that is not above 0, or a single position.
        UnknownNameError: an unknown `over`.

    Examples:
        >>> import torch
        >>> student = torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]])
        >>> teacher = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]])
        >>> round(SpatialAttention()(student, teacher).item(), 6)
        0.064212
    """

    power: float = 2.0
    """p, above 0; 2 in both sources."""
    over: Over = "mean"
    """Over positions: the sources' mean, whose size falls with the resolution, or the sum, which does not."""
    axis: int | None = None
    """Of the channels; None: the second of [batch, channels, height, width], the last of [batch, tokens, width]."""
    things: bool = False
    """Count where things lie only, of tasks that say where (detection). The mean stays one over all cells: things that
    cover all of them change nothing, a picture without things has no distance."""

    def __post_init__(self) -> None:
        if self.over not in get_args(Over):
            raise UnknownNameError.of("way to join positions", self.over, get_args(Over))
        if type(self.things) is not bool:
            raise InputError(f"SpatialAttention(things={self.things!r})", do="give true or false")
        if not 0 < self.power < float("inf"):
            raise InputError(f"SpatialAttention(power={self.power!r})", do="give a power above 0")

    @property
    def widths(self) -> Widths:
        return "any"

    @property
    def channels(self) -> int | None:
        return self.axis

    @property
    def on_things(self) -> bool:
        return self.things

    def __call__(self, student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
        """The distance of features [batch, channels, height, width] or [batch, tokens, width] everywhere; widths may
        differ."""
        return self._joined(self._apart(student, teacher))

    def among(
        self,
        student: Float[Tensor, "batch ..."],
        teacher: Float[Tensor, "batch ..."],
        covered: Bool[Tensor, "batch rows columns"],
    ) -> Float[Tensor, ""]:
        return self._joined(self._apart(student, teacher) * covered.flatten(1))

    def _apart(self, student: Tensor, teacher: Tensor) -> Float[Tensor, "batch positions"]:
        ours, theirs = laid_out(student, teacher, self.axis)  # [batch, channels, positions]
        need_positions(ours, "spatial_attention")
        return (self._map(ours) - self._map(theirs)).square()

    def _joined(self, apart: Float[Tensor, "batch positions"]) -> Float[Tensor, ""]:
        return apart.mean() if self.over == "mean" else apart.sum(1).mean()

    def _map(self, feature: Float[Tensor, "batch channels positions"]) -> Float[Tensor, "batch positions"]:
        even = self.power == 2.0  # a square has a gradient at 0, where |x|^p may have none
        strength = feature.square() if even else feature.abs().pow(self.power)
        return functional.normalize(strength.mean(1), dim=1, eps=1e-12)
