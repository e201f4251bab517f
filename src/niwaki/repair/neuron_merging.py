"""Neuron Merging as it was published, for comparison."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from niwaki.errors import InputError
from niwaki.repair.filters import Filters, checked, folded, inner_products
from niwaki.repair.mixing import Mixing
from niwaki.repair.partners import merged


@final
@dataclass(frozen=True)
class NeuronMerging:
    """`Merge` with the arithmetic of its authors' public code, slips included: a baseline, not advice.

    The code has the running variance where the standard deviation belongs, and takes the kept channel for the removed
    one in the batch norm's part of scale and bias. With `s = |W_j| / |W_i|` of raw filters, j removed, i kept, v the
    running variances: scale `s gamma_i v_j / (gamma_j v_i)`, mismatch
    `|gamma_i / v_i (s (mean_j - v_j beta_j / gamma_j) - mean_i) + beta_i|`, cosines of raw filters.

    Source: Kim et al. 2020, "Neuron Merging" (NeurIPS), as its public code computes it. Differs: a scale that is not a
    number (gamma or variance 0) is no partner.
    """

    threshold: float = 0.1
    """Least cosine of a partner; below it a channel is left out. From 0 to 1."""
    balance: float = 0.85
    """What the cosine counts beside the bias, from 0 to 1."""

    def __post_init__(self) -> None:
        if not (0 <= self.threshold <= 1 and 0 <= self.balance <= 1):
            raise InputError(
                f"NeuronMerging(threshold={self.threshold!r}, balance={self.balance!r})",
                found="a share outside 0 .. 1",
                do="use 0 to 1 for both",
            )

    def __call__(
        self,
        weight: Float[Tensor, "targets ..."],
        kept: Int[Tensor, " kept"],
        *,
        gamma: Float[Tensor, " targets"],
        beta: Float[Tensor, " targets"],
        mean: Float[Tensor, " targets"],
        variance: Float[Tensor, " targets"],
        eps: float = 1e-5,
    ) -> Mixing:
        """Partners for the channels that are not kept, from raw weights and the batch norm behind them.

        Args:
            eps: the batch norm's; only the errors of the result need it.

        Raises:
            InputError: nothing kept, or `kept` does not fit.
        """
        kept = checked(kept, len(weight), len(kept), device=weight.device)
        raw = Filters(weight, torch.zeros_like(beta))
        gamma, beta, mean, variance = (values.detach().double() for values in (gamma, beta, mean, variance))
        tiny = torch.finfo(torch.float64).tiny
        norms = raw.squares.sqrt()
        own = norms[kept]
        cosine = raw.dot(raw[kept]) / (norms[:, None] * own).clamp_min(tiny)
        size = norms[:, None] / own
        # variance where sigma belongs, and kept for removed: as published
        scale = size * (gamma[kept] / variance[kept]) * (variance / gamma)[:, None]
        shift = size * (mean - variance * beta / gamma)[:, None] - mean[kept]
        mismatch = (gamma[kept] / variance[kept] * shift + beta[kept]).abs()
        whole = folded(weight, gamma=gamma, beta=beta, mean=mean, variance=variance, eps=eps)
        products = inner_products(whole, whole[kept], kept)
        return merged(products, kept, cosine, scale, mismatch, threshold=self.threshold, balance=self.balance)
