"""Second moments of activations under a Gaussian model of what goes into them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import ndtr, owens_t
from torch import Tensor

from niwaki.errors import InputError, NotFiniteError
from niwaki.repair.filters import checked

CHUNK = 2**18
"""Pairs at once: a score of temporaries of 2 MiB each stay in the cache."""
NEARLY_ONE = 1 - 1e-12
"""Correlations are held below this; the moment moves by at most the rest, times the deviations."""
DRAWS = 1024
"""Samples at once."""
TERMS = 64
"""Of a series: cross moments of a ReLU are off by 1e-4 at a correlation of 1, of a GELU by nothing."""
NODES, REACH = 4801, 12.0
"""Points of the grid for a term, and how many deviations it goes: 64 terms times the density end below 1e-15 there."""
Numbers = np.ndarray[Any, np.dtype[np.float64]]


@final
@dataclass(frozen=True, eq=False)
class Gaussians:
    """What goes into the activations of targets and damaged channels, as jointly normal numbers.

    A kept channel counts as undamaged where its mean, deviation and row of cosines equal its target's bit for bit.

    Raises:
        InputError: shapes that do not belong together, a negative deviation, or `kept` that does not fit.
        NotFiniteError: a NaN or an infinity.
    """

    mean: Float[Tensor, " targets"]
    deviation: Float[Tensor, " targets"]
    """Standard deviations, 0 or more; 0 is a constant channel."""
    damaged_mean: Float[Tensor, " kept"]
    damaged_deviation: Float[Tensor, " kept"]
    cosine: Float[Tensor, "targets kept"]
    """Correlations of targets with damaged channels."""
    damaged_cosine: Float[Tensor, "kept kept"]
    """Correlations of damaged channels with each other."""
    kept: Int[Tensor, " kept"]
    """Which of the targets each damaged channel was."""

    def __post_init__(self) -> None:
        targets, kept = self.cosine.shape
        expected = {"mean": (targets,), "deviation": (targets,), "damaged_mean": (kept,), "damaged_deviation": (kept,)}
        for name, shape in {**expected, "cosine": (targets, kept), "damaged_cosine": (kept, kept)}.items():
            values = getattr(self, name).detach().double()
            if tuple(values.shape) != shape:
                raise InputError(
                    "a Gaussian model",
                    found=f"{name} {list(values.shape)}, cosine {list(self.cosine.shape)}",
                    do=f"give {name} of shape {list(shape)}",
                )
            if not bool(values.isfinite().all()):
                raise NotFiniteError("a Gaussian model", found="NaN or infinity", where=name, do="check the batch norm")
            if "deviation" in name and bool((values < 0).any()):
                raise InputError("a Gaussian model", found=f"a negative {name}", do="give |gamma|")
            if "cosine" in name:
                if bool((values.abs() > 1 + 1e-9).any()):
                    raise InputError("a Gaussian model", found=f"a {name} beyond 1", do="give correlations")
                values = values.clamp(-1, 1)
            object.__setattr__(self, name, values)
        # nothing of such a deviation is left once it is added to the mean
        for mean, deviation in (("mean", "deviation"), ("damaged_mean", "damaged_deviation")):
            values = getattr(self, deviation)
            constant = values <= 1e-15 * getattr(self, mean).abs()
            object.__setattr__(self, deviation, values.masked_fill(constant, 0.0))
        object.__setattr__(self, "kept", checked(self.kept, targets, kept, device=self.mean.device))

    @property
    def undamaged(self) -> Int[Tensor, " some"]:
        """Numbers of the damaged channels that are none."""
        same = (self.mean[self.kept] == self.damaged_mean) & (self.deviation[self.kept] == self.damaged_deviation)
        return (same & (self.cosine[self.kept] == self.damaged_cosine).all(1)).nonzero()[:, 0]


@final
@dataclass(frozen=True, eq=False)
class Moments:
    """Expected products of activations."""

    cross: Float[Tensor, "targets kept"]
    gram: Float[Tensor, "kept kept"]
    squares: Float[Tensor, " targets"]
    means: Float[Tensor, " kept"]
    """Of the damaged channels."""


def rectified_mean(mean: Numbers, deviation: Numbers) -> Numbers:
    """E[max(y, 0)]."""
    a = _ratio(mean, deviation)
    return np.where(deviation > 0, mean * ndtr(a) + deviation * _density(a), np.maximum(mean, 0))


def rectified_square(mean: Numbers, deviation: Numbers) -> Numbers:
    """E[max(y, 0)^2]."""
    a = _ratio(mean, deviation)
    square = (mean**2 + deviation**2) * ndtr(a) + mean * deviation * _density(a)
    return np.where(deviation > 0, np.maximum(square, 0), np.maximum(mean, 0) ** 2)


def rectified_product(
    mean1: Numbers, deviation1: Numbers, mean2: Numbers, deviation2: Numbers, rho: Numbers
) -> Numbers:
    """E[max(y1, 0) max(y2, 0)], element by element.

    With a, b the ratios of mean and deviation and `q = sqrt(1 - rho^2)`:
    `(m1 m2 + rho s1 s2) Phi2(a, b; rho) + m1 s2 phi(b) Phi((a - rho b)/q) + m2 s1 phi(a) Phi((b - rho a)/q)
    + s1 s2 q phi(b) phi((a - rho b)/q)`; the bivariate normal Phi2 by Owen's T (Owen 1956). Constants (deviation 0)
    multiply the other's mean.
    """
    rho = np.clip(rho, -NEARLY_ONE, NEARLY_ONE)
    q = np.sqrt((1 - rho) * (1 + rho))
    # the formula for Phi2 divides by a and b; next to zero it has its limit
    a, b = (np.where(ratio == 0, 1e-150, ratio) for ratio in (_ratio(mean1, deviation1), _ratio(mean2, deviation2)))
    toward_b, toward_a = (b - rho * a) / q, (a - rho * b) / q
    below_a, below_b = ndtr(a), ndtr(b)
    with np.errstate(over="ignore"):
        both = (below_a + below_b) / 2 - owens_t(a, toward_b / a) - owens_t(b, toward_a / b)
    both = np.clip(both - np.where((a > 0) != (b > 0), 0.5, 0.0), 0, 1)
    density_b = _density(b)
    product = (
        (mean1 * mean2 + rho * deviation1 * deviation2) * both
        + mean1 * deviation2 * density_b * ndtr(toward_a)
        + mean2 * deviation1 * _density(a) * ndtr(toward_b)
        + deviation1 * deviation2 * q * density_b * _density(toward_a)
    )
    constant = (deviation1 == 0) | (deviation2 == 0)
    if constant.any():
        apart = rectified_mean(mean1, deviation1) * rectified_mean(mean2, deviation2)
        product = np.where(constant, apart, product)
    return np.maximum(product, 0)


def rectified(model: Gaussians) -> Moments:
    """Moments of ReLU in closed form, in pieces of a few MiB beside the results."""
    m, s, own_m, own_s, rho, own_rho = (values.cpu().numpy() for values in _parts(model))
    targets, kept = rho.shape
    gram = np.diag(rectified_square(own_m, own_s))
    first, second = np.triu_indices(kept, 1)
    for start in range(0, len(first), CHUNK):
        i, j = first[start : start + CHUNK], second[start : start + CHUNK]
        gram[i, j] = gram[j, i] = rectified_product(own_m[i], own_s[i], own_m[j], own_s[j], own_rho[i, j])
    cross = np.empty((targets, kept))
    others = np.setdiff1d(np.arange(targets), model.kept[model.undamaged].cpu().numpy())
    step = max(1, CHUNK // kept)
    for start in range(0, len(others), step):
        rows = others[start : start + step]
        cross[rows] = rectified_product(m[rows, None], s[rows, None], own_m, own_s, rho[rows])
    found = (cross, gram, rectified_square(m, s), rectified_mean(own_m, own_s))
    return _aligned(model, *(torch.from_numpy(values) for values in found))


def linear(model: Gaussians) -> Moments:
    """Moments without a non-linearity."""
    m, s, own_m, own_s, rho, own_rho = _parts(model)
    gram = own_m[:, None] * own_m + own_rho * (own_s[:, None] * own_s)
    cross = m[:, None] * own_m + rho * (s[:, None] * own_s)
    return _aligned(model, cross, gram, m * m + s * s, own_m)


def expanded(model: Gaussians, activation: Callable[[Tensor], Tensor]) -> Moments:
    """Moments of any activation from a series in the correlation.

    With the coefficients `c_k = E[f(m + s z) He_k(z)] / sqrt(k!)` of the two, `E[f(y1) f(y2)] = sum_k c_k c'_k rho^k`
    (Mehler 1866). The first terms alone are the moments of the activation's smooth part, so they fit each other.
    """
    z = torch.linspace(-REACH, REACH, NODES, dtype=torch.float64, device=model.mean.device)
    # [terms, nodes], normalised polynomials times the weight of the node
    terms = torch.empty(TERMS, NODES, dtype=torch.float64, device=z.device)
    terms[0] = torch.exp(-0.5 * z * z) * ((z[1] - z[0]) / math.sqrt(2 * math.pi))
    terms[1] = z * terms[0]
    for k in range(2, TERMS):
        terms[k] = (z * terms[k - 1] - math.sqrt(k - 1) * terms[k - 2]) / math.sqrt(k)
    others = torch.ones_like(model.mean, dtype=torch.bool)
    others[model.kept[model.undamaged]] = False
    mine = activation(model.mean[:, None] + model.deviation[:, None] * z) @ terms.T  # [targets, terms]
    own = activation(model.damaged_mean[:, None] + model.damaged_deviation[:, None] * z) @ terms.T
    gram = _series(model.damaged_cosine, own, own)
    cross = torch.zeros_like(model.cosine)
    cross[others] = _series(model.cosine[others], mine[others], own)
    return _aligned(model, cross, gram, mine.square().sum(1), own[:, 0])


def sampled(model: Gaussians, activation: Callable[[Tensor], Tensor], *, samples: int, seed: int) -> Moments:
    """Moments of any activation from seeded draws, the same for all channels.

    Damaged channels are drawn through the Cholesky factor of their correlations; targets share these draws as far as
    they correlate with them, and have a part of their own. So every pair that counts has its correlation.

    Raises:
        InputError: the cosines are not those of vectors.
    """
    m, s, own_m, own_s, rho, own_rho = _parts(model)
    kept = len(own_m)
    factor = _factor(own_rho)
    shares = torch.linalg.solve_triangular(factor, rho.T, upper=False).T  # [targets, kept]
    shares = shares / shares.norm(dim=1, keepdim=True).clamp_min(1)
    rest = (1 - shares.square().sum(1)).clamp_min(0).sqrt()
    generator = torch.Generator().manual_seed(seed)
    cross, gram, squares, means = (torch.zeros_like(values) for values in (rho, own_rho, m, own_m))
    for start in range(0, samples, DRAWS):
        count = min(DRAWS, samples - start)
        draws = torch.randn(kept + len(m), count, generator=generator, dtype=torch.float64).to(m.device)
        own = activation(own_m[:, None] + own_s[:, None] * (factor @ draws[:kept]))  # [kept, count]
        mine = shares @ draws[:kept] + rest[:, None] * draws[kept:]
        mine = activation(m[:, None] + s[:, None] * mine)  # [targets, count]
        cross += mine @ own.T
        gram += own @ own.T
        means += own.sum(1)
        squares += mine.square().sum(1)
    return _aligned(model, *(total / samples for total in (cross, gram, squares, means)))


def _parts(model: Gaussians) -> tuple[Tensor, ...]:
    return (
        model.mean,
        model.deviation,
        model.damaged_mean,
        model.damaged_deviation,
        model.cosine,
        model.damaged_cosine,
    )


def _series(rho: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`sum_k first_k second_k rho^k` of every pair, by Horner's rule: [rows, columns]."""
    total = torch.zeros_like(rho)
    step = max(1, CHUNK // 4 // rho.shape[1])
    for start in range(0, len(rho), step):
        rows = slice(start, start + step)
        part = total[rows]
        for k in reversed(range(first.shape[1])):
            part.mul_(rho[rows]).addcmul_(first[rows, k, None], second[:, k])
    return total


def _aligned(model: Gaussians, cross: Tensor, gram: Tensor, squares: Tensor, means: Tensor) -> Moments:
    """Moments in which an undamaged channel is its target to the bit."""
    same = model.undamaged.cpu()
    cross[model.kept.cpu()[same]] = gram[same]
    squares[model.kept.cpu()[same]] = gram.diagonal()[same]
    device = model.mean.device
    return Moments(cross.to(device), gram.to(device), squares.to(device), means.to(device))


def _factor(cosine: Tensor) -> Tensor:
    """Lower factor of correlations; what makes a singular matrix regular is as little as it takes: [kept, kept]."""
    one = torch.eye(len(cosine), dtype=cosine.dtype, device=cosine.device)
    for little in (0.0, 1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8):
        factor, failed = torch.linalg.cholesky_ex((cosine + little * one) / (1 + little))
        if not bool(failed):
            return factor
    raise InputError("draw correlated channels", found="cosines that no vectors have", do="check the inner products")


def _ratio(mean: Numbers, deviation: Numbers) -> Numbers:
    """Mean over deviation; of constants 0, which nobody uses."""
    return np.divide(mean, deviation, out=np.zeros(np.broadcast(mean, deviation).shape), where=deviation > 0)


def _density(x: Numbers) -> Numbers:
    with np.errstate(over="ignore", under="ignore"):
        return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
