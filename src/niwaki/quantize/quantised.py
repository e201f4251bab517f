"""A tensor as whole numbers: codes, and the grid that gives them back their values."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from niwaki.errors import InputError


@final
@dataclass(frozen=True, eq=False)
class Quantised:
    """Codes of a weight and their grid: `value = (code - zero) * scale`, slice by slice of `axis`.

    Scales are float32 numbers, as files and runtimes hold them, so that every copy gives the same values bit by bit.
    """

    codes: Tensor
    """Whole numbers of the weight's shape: int8 on the symmetric grid (`zero` is 0), else uint8."""
    scale: Tensor
    """Step of the grid, above 0 (or 0 where every value is 0), float32 `[slices]`, or `[]` for the whole tensor."""
    zero: Tensor
    """Code of the value 0, float32, shaped as `scale`; a half on the literal grid, which has no 0."""
    bits: int
    """Bits of a code, 2 to 8."""
    axis: int | None
    """Axis of the slices; None where the whole tensor has one scale."""
    dtype: torch.dtype
    """Type of the weight, and of `values()`."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.codes.shape

    @property
    def signed(self) -> bool:
        """Whether codes have a sign."""
        return self.codes.dtype == torch.int8

    def values(self) -> Tensor:
        """The weight on its grid: computed in float64, cast back to the weight's type."""
        steps = self.codes.double() - self.along(self.zero)
        return (steps * self.along(self.scale) + 0.0).to(self.dtype)  # + 0.0 turns -0 into 0

    def along(self, numbers: Tensor) -> Tensor:
        """One number per slice (or one for all) in float64, shaped to broadcast against the weight."""
        if self.axis is None:
            return numbers.double()
        shape = [1] * self.codes.dim()
        shape[self.axis] = -1
        return numbers.double().reshape(shape)

    def centred(self) -> tuple[Tensor, Tensor]:
        """Whole numbers whose zero is 0, in int8, with their scales: the form that integer kernels take.

        On a grid without a 0 they are the odd numbers, at half the scale. Every grid up to 7 bits fits, and the
        symmetric one of 8.

        Raises:
            InputError: a number lies outside -128 .. 127.
        """
        odd = bool((self.zero != self.zero.round()).any())
        steps = (self.codes.double() - self.along(self.zero)) * (2 if odd else 1)
        if steps.numel() and (float(steps.min()) < -128 or float(steps.max()) > 127):
            raise InputError(
                "whole numbers around 0 in 8 bits",
                found=f"{int(steps.min())} .. {int(steps.max())} from codes of {self.bits} bits",
                do="quantise symmetrically, or to 7 bits at most",
            )
        return steps.to(torch.int8), self.scale / (2 if odd else 1)
