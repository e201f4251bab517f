"""Filters whose input is not white."""

from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from niwaki.errors import InputError
from niwaki.repair.filters import Filters


@final
@dataclass(frozen=True, eq=False)
class Coloured:
    """Filters over inputs that go together: inner products are covariances of what the filters put out.

    With `S` the covariance of a window's inputs, the inner product of w and v is `w'Sv`. S is the channels' covariance
    times a correlation of positions, the same for every channel. Usable wherever `Filters` are.

    Args:
        filters: `[units, channels * positions]`, channels first, as a flattened convolution.
        covariance: of the input's channels, as `ActivationSpace.covariance` says of the layer before; variances alone,
            `[channels]`, where channels do not go together.
        size: positions along every side of the window; empty for a linear layer.
        neighbours: correlation of inputs one position apart, 0 to below 1; at a distance d it is to the power of d.

    Raises:
        InputError: sizes that do not belong together, or a covariance that is none.
    """

    filters: Filters
    covariance: Float[Tensor, "channels channels"] | Float[Tensor, " channels"] | None = None
    size: tuple[int, ...] = ()
    neighbours: float = 0.5
    weight: Float[Tensor, "units rest"] = field(init=False)
    """The filters for the white input behind the coloured one."""

    def __post_init__(self) -> None:
        window = _window(self.size, self.neighbours).to(self.filters.weight)
        channels = self.filters.rank // len(window)
        if self.covariance is not None and self.covariance.shape not in ((channels, channels), (channels,)):
            raise InputError(
                "colour filters",
                found=f"{channels} channels, window {list(self.size)}, covariance {list(self.covariance.shape)}",
                do="give the covariance of the layer's input channels",
            )
        if channels * len(window) != self.filters.rank:
            raise InputError(
                "colour filters",
                found=f"{self.filters.rank} numbers in a window {list(self.size)}",
                do="give the kernel's size",
            )
        weight = self.filters.weight.unflatten(1, (channels, len(window))) @ _root(window)
        if self.covariance is not None and self.covariance.ndim == 1:
            weight = weight * self.covariance.to(weight).sqrt()[:, None]
        elif self.covariance is not None:
            weight = (weight.transpose(1, 2) @ _root(self.covariance.to(weight))).transpose(1, 2)
        object.__setattr__(self, "weight", weight.flatten(1))

    @property
    def bias(self) -> Float[Tensor, " units"]:
        return self.filters.bias

    @property
    def rank(self) -> int:
        return self.filters.rank

    @property
    def sums(self) -> Float[Tensor, " units"]:
        return self.filters.sums

    @property
    def squares(self) -> Float[Tensor, " units"]:
        return self.weight.square().sum(1)

    def __len__(self) -> int:
        return len(self.filters)

    def __getitem__(self, index: Int[Tensor, " some"]) -> "Coloured":
        return Coloured(self.filters[index], self.covariance, self.size, self.neighbours)

    def dot(self, other: "Coloured") -> Float[Tensor, "units others"]:
        return self.weight @ other.weight.T

    def same(self, other: "Coloured") -> Bool[Tensor, " units"]:
        return self.filters.same(other.filters)


def _window(size: tuple[int, ...], neighbours: float) -> Tensor:
    """Correlations of a window's positions: [positions, positions]."""
    if not 0 <= neighbours < 1 or any(side < 1 for side in size):
        raise InputError(
            f"colour filters with neighbours={neighbours!r}",
            found=f"window {list(size)}",
            do="use a correlation from 0 to below 1, and sides of 1 or more",
        )
    if not size:
        return torch.ones(1, 1, dtype=torch.float64)
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in size)).reshape(-1, len(size))
    apart = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.as_tensor(neighbours, dtype=torch.float64) ** apart


def window_root(size: tuple[int, ...], neighbours: float) -> Float[Tensor, "positions positions"]:
    """A lower L with `L L'` the correlations of a window's positions."""
    return _root(_window(size, neighbours))


def _root(covariance: Tensor) -> Tensor:
    """A lower L with `L L' = covariance`, which may be singular (dead channels): all but 1e-9 of it."""
    level = covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny)
    one = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    root, failed = torch.linalg.cholesky_ex(covariance + 1e-9 * level * one)
    if bool(failed) or not bool(root.isfinite().all()):
        raise InputError("colour filters", found="a covariance that is none", do="give covariances, not correlations")
    return root
