"""Weights on a uniform grid of 4 to 256 values."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from niwaki.errors import InputError, NotFiniteError
from niwaki.quantize.quantised import Quantised

BITS = range(2, 9)
"""Widths of a code. One bit leaves a symmetric grid nothing but 0; above eight there is no integer kernel."""


@final
@dataclass(frozen=True)
class Uniform:
    """Round to the nearest of 2^bits values (one less where symmetric) that lie evenly between the extremes.

    Source: section 7 of Bai et al. 2023, arXiv:2308.07209, leaves the grid open; `grid="literal"` is that of its
    sibling (Chen et al. 2023, arXiv:2307.00498), the others are the usual ones (Jacob et al. 2018, arXiv:1712.05877,
    sec. 2.1). Differs: scales are rounded to float32 first, ties go to the even code.

    Examples:
        >>> Uniform(bits=3, per="tensor")(torch.tensor([[-1.0, -0.3, 0.24, 1.0]])).codes.tolist()
        [[-3, -1, 1, 3]]
    """

    bits: int = 8
    """Bits of a code, 2 to 8."""
    symmetric: bool = True
    """Step max|W| / (2^(bits-1) - 1) around 0; else the grid spans min to max, 0 included and met exactly."""
    per: Literal["channel", "tensor"] = "channel"
    """One step for each slice of the axis given, or one for all."""
    grid: Literal["zero", "literal"] = "zero"
    """"zero" has the value 0; "literal" is the sibling's 2^bits values from -max|W| to max|W|, which has not."""

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise InputError(f"Uniform(bits={self.bits!r})", found="not a width of 2 to 8", do="give 2 to 8 bits")
        for field, known in (("per", ("channel", "tensor")), ("grid", ("zero", "literal"))):
            if getattr(self, field) not in known:
                raise InputError(
                    f"Uniform({field}={getattr(self, field)!r})", found=f"known: {', '.join(known)}", do="use one"
                )
        if self.grid == "literal" and not self.symmetric:
            raise InputError(
                'Uniform(grid="literal", symmetric=False)',
                found="the literal grid spans -max|W| to max|W|",
                do='leave symmetric=True, or take grid="zero"',
            )

    def __call__(self, weight: Tensor, axis: int = 0, *, name: str = "") -> Quantised:
        """Codes and scales of `weight`, on its device; the weight stays as it is.

        Args:
            axis: whose slices have a step each, with per="channel": 0 of layers, 1 of transposed convolutions. A
                scalar has one step.
            name: what messages call the weight.

        Raises:
            InputError: a weight of whole numbers, or an axis that it does not have.
            NotFiniteError: NaN or infinity in the weight, or a step beyond float32.
        """
        exact = self._checked(weight, name)
        if weight.dim() and not -weight.dim() <= axis < weight.dim():
            raise InputError(
                f"quantise along axis {axis}", found=f"shape {tuple(weight.shape)}", where=name, do="give one it has"
            )
        sliced = self.per == "channel" and weight.dim() > 0
        rows = exact.movedim(axis, 0).flatten(1) if sliced and weight.dim() > 1 else exact.reshape(1, -1)
        rows = exact.reshape(-1, 1) if sliced and weight.dim() == 1 else rows  # [slices, rest]
        scale, zero, least, most = self._grid(rows)
        if not bool(torch.isfinite(scale).all()):
            raise NotFiniteError("quantise a weight", found="a step beyond float32", where=name, do="scale it down")
        whole = Quantised(
            weight.new_empty(weight.shape, dtype=torch.int8),
            scale if sliced else scale.reshape(()),
            zero if sliced else zero.reshape(()),
            self.bits,
            axis % weight.dim() if sliced else None,
            weight.dtype,
        )
        step = whole.along(whole.scale)
        step = torch.where(step > 0, step, torch.ones_like(step))
        if self.grid == "literal":  # halves are met by rounding from the lower end, as the source writes it
            codes = (exact / step + whole.along(whole.zero)).round()
        else:
            codes = (exact / step).round() + whole.along(whole.zero)
        kind = torch.int8 if least < 0 else torch.uint8
        return Quantised(codes.clamp(least, most).to(kind), whole.scale, whole.zero, self.bits, whole.axis, whole.dtype)

    def _grid(self, rows: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """Step and code of 0 of each row of `[slices, rest]`, and the least and the largest code."""
        count = rows.shape[0]
        low = rows.amin(1).clamp(max=0) if rows.numel() else rows.new_zeros(count)
        high = rows.amax(1).clamp(min=0) if rows.numel() else rows.new_zeros(count)
        top, most = torch.maximum(-low, high), 2 ** (self.bits - 1) - 1
        if self.grid == "literal":
            scale = (2 * top / (2**self.bits - 1)).float()
            return scale, torch.full_like(scale, (2**self.bits - 1) / 2), 0, 2**self.bits - 1
        if self.symmetric:
            scale = _above_zero(top / most)
            return scale, torch.zeros_like(scale), -most, most
        scale = _above_zero((high - low) / (2**self.bits - 1))
        return scale, (-low / scale.double()).round().clamp(0, 2**self.bits - 1).float(), 0, 2**self.bits - 1

    def _checked(self, weight: Tensor, name: str) -> Tensor:
        """The weight in float64."""
        if not weight.is_floating_point():
            raise InputError("quantise a weight", found=f"{weight.dtype}", where=name, do="give real numbers")
        exact = weight.detach().double()
        if not bool(torch.isfinite(exact).all()):
            raise NotFiniteError("quantise a weight", found="NaN or infinity", where=name, do="check the weights")
        return exact


def _above_zero(step: Tensor) -> Tensor:
    """Steps in float32; 1 where all is 0, or too small for float32: codes are 0 then, and any step will do."""
    step = step.float()
    return torch.where(step > 0, step, torch.ones_like(step))
