"""Removed and damaged channels rebuilt behind the non-linearity, from batch-norm statistics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from niwaki.errors import InputError, NotFiniteError, UnknownNameError
from niwaki.repair.filters import Layer, checked, inner_products
from niwaki.repair.mixing import Mixing, reconstruct
from niwaki.repair.moments import Gaussians, Moments, expanded, linear, rectified, sampled

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "identity": lambda values: values,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
CLOSED = {"relu": rectified, "identity": linear}


@final
@dataclass(frozen=True)
class ActivationSpace:
    """Every channel as the combination of kept channels that is nearest behind the activation: form B.

    Minimises the expected square of `f(y_j) - sum_i m_i f(z_i)` where targets y and damaged channels z are jointly
    normal: means and deviations are the batch norm's, correlations the cosines of folded filters (as if the layer's
    input were white). Kept channels that are undamaged stay exactly themselves.

    Source: none; the step that Bai et al. 2023, arXiv:2308.07209 take before the non-linearity, taken behind it.
    Moments of rectified normals by Owen 1956, of others by Mehler 1866.
    """

    ridge: float = 1e-3
    """Price of leaving m0 (a kept channel is itself, others are left out), as a share of the mean second moment."""
    activation: str | Callable[[Tensor], Tensor] = "relu"
    """Name or function of the activation; element by element."""
    non_negative: bool = False
    """Whether coefficients may not be negative."""
    samples: int | None = None
    """Draws of the Gaussian model; None: no draws, but the closed form of relu and identity, a series for others."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise InputError(f"ActivationSpace(ridge={self.ridge!r})", found="a negative ridge", do="use 0 or more")
        if isinstance(self.activation, str) and self.activation not in ACTIVATIONS:
            raise UnknownNameError.of("activation", self.activation, list(ACTIVATIONS))
        if self.samples is not None and self.samples < 1:
            raise InputError(
                f"ActivationSpace(samples={self.samples!r})", found="no draws", do="use 1 or more, or None"
            )

    def __call__(
        self,
        target: Layer,
        damaged: Layer,
        kept: Int[Tensor, " kept"],
        *,
        mean: Float[Tensor, " targets"],
        deviation: Float[Tensor, " targets"],
    ) -> Mixing:
        """The mixture for `target` channels from `damaged` ones; `damaged[i]` is what became of `target[kept[i]]`.

        A damaged channel keeps its mean, and its deviation changes as its filter's norm does. A channel whose filter is
        zero is constant.

        Args:
            target, damaged: `Filters` or `Composite`, with the same batch norm folded in.
            mean: of what goes into the activation: beta of the batch norm.
            deviation: its standard deviation: |gamma|.

        Raises:
            InputError: nothing kept, sizes that do not fit, or a singular matrix with a ridge of 0.
            NotFiniteError: a NaN or an infinity.
        """
        return self.solve(_model(target, damaged, kept, mean, deviation))

    def covariance(
        self, layer: Layer, *, mean: Float[Tensor, " units"], deviation: Float[Tensor, " units"]
    ) -> Float[Tensor, "units units"]:
        """Covariance of a layer's activations under the model: what colours the filters of the layer that reads them.

        Raises:
            InputError: sizes that do not fit.
            NotFiniteError: a NaN or an infinity.
        """
        moments = self.moments(layer, mean=mean, deviation=deviation)
        return moments.gram - moments.means[:, None] * moments.means

    def moments(self, layer: Layer, *, mean: Float[Tensor, " units"], deviation: Float[Tensor, " units"]) -> Moments:
        """Moments of an undamaged layer's activations under the model.

        Raises:
            InputError: sizes that do not fit.
            NotFiniteError: a NaN or an infinity.
        """
        everyone = torch.arange(len(layer), device=layer.bias.device)
        return self._moments(_model(layer, layer, everyone, mean, deviation))

    def solve(self, model: Gaussians) -> Mixing:
        """The same from means, deviations and cosines.

        Raises:
            InputError: cosines that no vectors have, or a singular matrix with a ridge of 0.
            NotFiniteError: the activation gave a NaN or an infinity.
        """
        moments = self._moments(model)
        level = float(moments.gram.diagonal().mean())
        remarks = ("no kept channel ever passes the activation",) if level == 0 else ()
        return reconstruct(
            moments.cross,
            moments.gram,
            moments.squares,
            kept=model.kept,
            ridge=self.ridge * level if level > 0 else 1.0,
            non_negative=self.non_negative,
            remarks=remarks,
        )

    def _moments(self, model: Gaussians) -> Moments:
        function = ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation
        if self.samples is not None:
            moments = sampled(model, function, samples=self.samples, seed=self.seed)
        elif isinstance(self.activation, str) and self.activation in CLOSED:
            moments = CLOSED[self.activation](model)
        else:
            moments = expanded(model, function)
        if not bool(moments.squares.isfinite().all() & moments.gram.isfinite().all()):
            raise NotFiniteError(
                "reconstruct activations",
                found="NaN or infinity from the activation",
                where=str(self.activation),
                do="use an activation that is finite on all numbers",
            )
        return moments


def _model(target: Layer, damaged: Layer, kept: Tensor, mean: Tensor, deviation: Tensor) -> Gaussians:
    """Means and deviations of batch norm, correlations of filters."""
    kept = checked(kept, len(target), len(damaged), device=mean.device)
    if mean.shape != (len(target),) or deviation.shape != (len(target),):
        raise InputError(
            "reconstruct activations",
            found=f"{len(target)} filters, mean {list(mean.shape)}, deviation {list(deviation.shape)}",
            do="give one mean and one deviation per filter",
        )
    products = inner_products(target, damaged, kept)
    norms, own = products.squares.sqrt(), products.gram.diagonal().sqrt()
    inverse, own_inverse = (torch.where(n > 0, 1 / n, 0.0) for n in (norms, own))
    # the same order of factors for both: what is undamaged has the same bits
    cosine = products.cross * inverse[:, None] * own_inverse
    own_cosine = products.gram * own_inverse[:, None] * own_inverse
    own_cosine.fill_diagonal_(1.0)
    same = (products.cross[kept] == products.gram).all(1)
    cosine[kept[same]] = own_cosine[same]
    mean = mean.detach().double()
    deviation = deviation.detach().double().masked_fill(norms == 0, 0.0)
    return Gaussians(
        mean=mean,
        deviation=deviation,
        damaged_mean=mean[kept],
        damaged_deviation=torch.where(same, deviation[kept], deviation[kept] * (own * inverse[kept])),
        cosine=cosine,
        damaged_cosine=own_cosine,
        kept=kept,
    )
