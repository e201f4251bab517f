"""Damaged channels rescaled, each by one number."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from niwaki.errors import InputError
from niwaki.repair.filters import InnerProducts, Layer, checked, inner_products
from niwaki.repair.mixing import Mixing, share, start_squares, unit_rows


@final
@dataclass(frozen=True)
class Diagonal:
    """Each kept channel times the number that brings its damaged filter nearest to the old one; no channels are mixed.

    `m_jj = 1 + [v.(w - v) + bias_weight c (b - c)] / (|v|^2 + bias_weight c^2 + ridge)`, w and b of the target, v
    and c of the damaged channel. Removed channels are left out. The only repair where a layer cannot mix, as in front
    of a depthwise one.

    Source: Bai et al. 2023, arXiv:2308.07209 (quantisation alone); derived, as for `FilterSpace`.
    """

    bias_weight: float = 0.01
    """What an error of the bias counts beside one of the filter; 0 or more."""
    ridge: float = 0.008
    """Price of leaving 1; 0 or more."""

    def __post_init__(self) -> None:
        if not (self.bias_weight >= 0 and self.ridge >= 0):
            raise InputError(
                f"Diagonal(bias_weight={self.bias_weight!r}, ridge={self.ridge!r})",
                found="a negative weight",
                do="use 0 or more",
            )

    def __call__(self, target: Layer, damaged: Layer, kept: Int[Tensor, " kept"]) -> Mixing:
        """The scales for `damaged` channels; `damaged[i]` is what became of `target[kept[i]]`.

        Raises:
            InputError: nothing kept, or `kept` does not fit.
        """
        return self.solve(inner_products(target, damaged, kept), kept)

    def solve(self, products: InnerProducts, kept: Int[Tensor, " kept"]) -> Mixing:
        """The same from inner products.

        Raises:
            InputError: nothing kept, or `kept` does not fit.
        """
        kept = checked(kept, *products.cross.shape, device=products.cross.device)
        bias, own = products.bias, products.damaged_bias
        # [targets, kept], [kept, kept], [targets]
        cross = products.cross + (self.bias_weight * bias)[:, None] * own
        gram = products.gram + (self.bias_weight * own)[:, None] * own
        squares = products.squares + self.bias_weight * bias * bias
        residual = cross[kept].diagonal() - gram.diagonal()  # [kept]
        # a dead channel under a ridge of 0 stays as it is
        change = residual / (gram.diagonal() + self.ridge).clamp_min(torch.finfo(torch.float64).tiny)
        before = start_squares(cross, gram, squares, kept)
        after = before.clone()
        after[kept] -= residual * change
        matrix = unit_rows(kept, cross)
        matrix[kept, torch.arange(len(kept), device=kept.device)] += change
        return Mixing(matrix, kept, share(before, squares), share(after, squares), squares)
