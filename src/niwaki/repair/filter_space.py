"""Removed and damaged channels rebuilt before the non-linearity, from filters alone."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Int
from torch import Tensor

from niwaki.errors import InputError
from niwaki.repair.filters import InnerProducts, Layer, checked, inner_products
from niwaki.repair.mixing import Mixing, reconstruct


@final
@dataclass(frozen=True)
class FilterSpace:
    """Every channel as the combination of kept channels whose folded filter and bias are nearest: form A.

    Minimises, for target j, `|w_j - V m|^2 + bias_weight (b_j - b.m)^2 + ridge |m - m0|^2`, V and b the kept channels
    as they are after the damage, m0 the channel itself where it is kept and zero where it is not. Kept channels that
    are undamaged stay exactly themselves.

    Source: Bai et al. 2023, arXiv:2308.07209; the closed form follows from the stated assumption, the paper's own
    equations could not be read. Differs: ridge and bias weight are our reading of its alpha_2 and alpha_1.
    """

    bias_weight: float = 0.01
    """What an error of the bias counts beside one of the filter; 0 or more."""
    ridge: float = 0.008
    """Price of leaving m0; 0 or more."""
    relative: bool = False
    """Whether the ridge is a share of the Gram matrix's mean diagonal."""
    non_negative: bool = False
    """Whether coefficients may not be negative (a positive multiple of one channel passes a ReLU unchanged)."""

    def __post_init__(self) -> None:
        if not (self.bias_weight >= 0 and self.ridge >= 0):
            raise InputError(
                f"FilterSpace(bias_weight={self.bias_weight!r}, ridge={self.ridge!r})",
                found="a negative weight",
                do="use 0 or more",
            )

    def __call__(self, target: Layer, damaged: Layer, kept: Int[Tensor, " kept"]) -> Mixing:
        """The mixture for `target` channels from `damaged` ones; `damaged[i]` is what became of `target[kept[i]]`.

        Both are `Filters` (of one layer) or `Composite` (expanding and depthwise), with the same batch norm folded in.

        Raises:
            InputError: nothing kept, filters of different sizes, or a singular matrix with a ridge of 0.
        """
        return self.solve(inner_products(target, damaged, kept), kept)

    def solve(self, products: InnerProducts, kept: Int[Tensor, " kept"]) -> Mixing:
        """The same from inner products.

        Raises:
            InputError: nothing kept, `kept` does not fit, or a singular matrix with a ridge of 0.
        """
        kept = checked(kept, *products.cross.shape, device=products.cross.device)
        own, bias = self.bias_weight * products.damaged_bias, self.bias_weight * products.bias
        gram = products.gram + own[:, None] * products.damaged_bias
        remarks: tuple[str, ...] = ()
        if products.rank is not None and products.rank < len(kept):
            remarks = (
                f"badly posed: {len(kept)} kept channels, filters of {products.rank} numbers; the ridge alone decides",
            )
        return reconstruct(
            products.cross + bias[:, None] * products.damaged_bias,
            gram,
            products.squares + bias * products.bias,
            kept=kept,
            ridge=self.ridge * ((float(gram.diagonal().mean()) or 1.0) if self.relative else 1.0),
            non_negative=self.non_negative,
            remarks=remarks,
        )
