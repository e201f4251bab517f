"""Removed channels merged into one kept channel each."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from niwaki.errors import InputError
from niwaki.repair.filters import InnerProducts, Layer, checked, inner_products
from niwaki.repair.mixing import Mixing
from niwaki.repair.partners import merged


@final
@dataclass(frozen=True)
class Merge:
    """Each removed channel becomes a positive multiple of the one kept channel most like it, or is left out.

    The multiple `|w_j| / |w_i|` of folded filters passes a ReLU unchanged. The partner is the kept i with the least
    `balance (1 - cosine) + (1 - balance) mismatch`, the mismatch `|b_j - m b_i|` brought to 0 .. 1 over the kept.

    Source: Kim et al. 2020, "Neuron Merging" (NeurIPS), the conv-with-batch-norm case. Differs: cosines, scales and
    mismatches are of folded filters, so that norm scales of either sign and of zero count as what they do;
    `NeuronMerging` has the published arithmetic.
    """

    threshold: float = 0.1
    """Least cosine of a partner; below it a channel is left out. From 0 to 1."""
    balance: float = 0.85
    """What the cosine counts beside the bias, from 0 to 1."""

    def __post_init__(self) -> None:
        if not (0 <= self.threshold <= 1 and 0 <= self.balance <= 1):
            raise InputError(
                f"Merge(threshold={self.threshold!r}, balance={self.balance!r})",
                found="a share outside 0 .. 1",
                do="use 0 to 1 for both",
            )

    def __call__(self, target: Layer, damaged: Layer, kept: Int[Tensor, " kept"]) -> Mixing:
        """Partners for the `target` channels that are not kept; `damaged[i]` is what became of `target[kept[i]]`.

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
        tiny = torch.finfo(torch.float64).tiny
        norms, own = products.squares.sqrt(), products.gram.diagonal().sqrt()
        alive = (norms > 0)[:, None] & (own > 0)  # [targets, kept]
        cosine = torch.where(alive, products.cross / (norms[:, None] * own).clamp_min(tiny), -1.0)
        scale = torch.where(alive, norms[:, None] / own.clamp_min(tiny), 0.0)
        mismatch = (products.bias[:, None] - scale * products.damaged_bias).abs()
        return merged(products, kept, cosine, scale, mismatch, threshold=self.threshold, balance=self.balance)
