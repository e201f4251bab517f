"""Low-rank factors of a projection: W is about down @ up, three ways in closed form.

Column convention of the source: y = x W with W `[width, out]`, the transpose of a linear layer's weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from niwaki.errors import InputError, NotFiniteError
from niwaki.units import share_down

EPSILON = 1e-6
"""Added to means of inputs, and, times the mean of its diagonal, to the covariance's diagonal; as in the source."""


@final
@dataclass(frozen=True, eq=False)
class Factors:
    """x W is about (x down) up; with several groups each has its own part of `down`'s columns and of the output."""

    down: Float[Tensor, "width rank"]
    up: Float[Tensor, "groups rank_of_group out_of_group"]

    @property
    def rank(self) -> int:
        """Numbers that are stored of a token."""
        return self.down.shape[1]

    @property
    def groups(self) -> int:
        return self.up.shape[0]

    def compressed(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows rank"]:
        return x @ self.down

    def restored(self, c: Float[Tensor, "*rows rank"]) -> Float[Tensor, "*rows out"]:
        split = c.unflatten(-1, (self.groups, -1)).unsqueeze(-2)  # [..., groups, 1, rank of group]
        return (split @ self.up).flatten(-3)

    def product(self) -> Float[Tensor, "width out"]:
        """The matrix that stands for W."""
        return self.restored(self.down)

    def nbytes(self) -> int:
        """Bytes of the factors, which come on top of the model's weights."""
        return self.count() * self.down.element_size()

    def count(self) -> int:
        """How many numbers the factors have."""
        return self.down.numel() + self.up.numel()


Solver = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""W `[width, out]` in float64 and a rank to `down [width, rank]` and `up [rank, out]`."""


def rank_of(keep: float, kv_heads: int, head_dim: int) -> int:
    """Rank over all heads together: `floor(keep * head_dim)` for each.

    Raises:
        InputError: a share outside (0, 1], or one that leaves nothing.

    Examples:
        >>> rank_of(0.2, 32, 128), rank_of(0.2, 8, 128), rank_of(0.29, 1, 100)
        (800, 200, 29)
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep {keep} of the channels", do="give a share in (0, 1]; 1 keeps the cache whole")
    each = share_down(keep, head_dim)
    if each < 1:
        found = f"floor({keep} * {head_dim}) = 0 of each head's channels"
        raise InputError(f"keep {keep} of the channels", found=found, do=f"give at least {1 / head_dim:g}")
    return kv_heads * each


def svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best under the Frobenius norm of W: U_r S_r^1/2 and S_r^1/2 V_r^T.

    Source: CSKV (Wang et al. 2024, arXiv:2409.10593), sec. 2.2.
    """
    return _halves(weight, rank)


def asvd(mean: Float[Tensor, " width"], *, alpha: float = 0.5) -> Solver:
    """SVD of the weight with its inputs scaled by their mean magnitude to the power `alpha`.

    Source: CSKV sec. 2.2, after Yuan et al. 2023, arXiv:2312.05821. Differs: `mean` is over tokens; the authors' code
    sums over samples, which leaves down @ up as it is and divides `down`, multiplies `up` by the square root.
    """

    def solve(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        scale = (mean.to(weight) + EPSILON).pow(alpha)[:, None]
        down, up = _halves(scale * weight, rank)
        return down / scale, up

    return solve


def whitened(covariance: Float[Tensor, "width width"]) -> Solver:
    """The best under the mean squared error on the data: no other factors of that rank do better on it.

    Reduced-rank regression: with C = E[x^T x] and the SVD of C^1/2 W, down = C^-1/2 U_r S_r^1/2.
    """

    def solve(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(regular(covariance.to(weight)))
        root = values.clamp(min=0).sqrt()
        down, up = _halves((vectors * root) @ vectors.T @ weight, rank)
        return (vectors / root) @ vectors.T @ down, up

    return solve


def regular(covariance: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    """With a little added to its diagonal, so that it has an inverse."""
    diagonal = covariance.diagonal()
    return covariance + torch.diag((EPSILON * diagonal.mean()).expand_as(diagonal))


def factorised(weight: Float[Tensor, "width out"], rank: int, solver: Solver, *, groups: int = 1) -> Factors:
    """Factors of W as `solver` finds them, in float32; with `groups` each part of the output by itself.

    Raises:
        NotFiniteError: NaN or infinite weights.
    """
    if not torch.isfinite(weight).all():
        raise NotFiniteError("factorise a projection", found="NaN or infinite weights", do="check the checkpoint")
    parts = weight.detach().double().cpu().chunk(groups, dim=1)
    found = [solver(part, rank // groups) for part in parts]
    down = torch.cat([down for down, _ in found], dim=1)
    return Factors(down.float().contiguous(), torch.stack([up for _, up in found]).float().contiguous())


def _halves(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    if rank > len(values):  # wider than the matrix has directions: the rest is zero
        down, up = left * values.sqrt(), values.sqrt()[:, None] * right
        more = rank - len(values)
        return torch.cat([down, down.new_zeros(len(down), more)], 1), torch.cat([up, up.new_zeros(more, up.shape[1])])
    return left[:, :rank] * root, root[:, None] * right[:rank]
