"""Every channel as a mixture of those that stay: the mixing matrix, and how the layer that reads it takes it in."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from scipy.linalg.lapack import dpocon
from torch import Tensor

from niwaki.errors import InputError, NotFiniteError
from niwaki.repair.non_negative import minimum

CONDITION, ENTRY = 1e8, 10.0
"""Above these, half of the digits of float64 are gone, or the mixture undoes itself."""


@final
@dataclass(frozen=True, eq=False)
class Mixing:
    """Channel j is replaced by `sum_i matrix[j, i] * (kept channel i)`. All in float64.

    Errors are squares, as a share of the target's own square (a channel that is zero has error 0): `before` of keeping
    what is kept and leaving the rest out, `after` of the mixture, both under the objective that was minimised.
    """

    matrix: Float[Tensor, "targets kept"]
    kept: Int[Tensor, " kept"]
    """Which of the targets each kept channel is."""
    before: Float[Tensor, " targets"]
    after: Float[Tensor, " targets"]
    squares: Float[Tensor, " targets"]
    """The targets' own squares under the objective; `after * squares` is what is lost in absolute terms."""
    condition: float | None = None
    """Condition number (1-norm, estimated) of the matrix that was solved; None where none was."""
    remarks: tuple[str, ...] = ()
    """What the block that made it has to say."""

    @property
    def largest(self) -> float:
        """Largest absolute entry of the matrix."""
        return float(self.matrix.abs().max())

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to distrust the mixture; empty if there are none."""
        found = list(self.remarks)
        if self.condition is not None and not self.condition <= CONDITION:
            found.append(f"condition number {self.condition:.1e} is above {CONDITION:.0e}: raise the ridge")
        if not self.largest <= ENTRY:
            found.append(f"largest coefficient {self.largest:.3g} is above {ENTRY:.0f}: raise the ridge")
        return tuple(found)


def mix(consumer: Tensor, mixing: Mixing, axis: int = 1, *, each: int = 1) -> Tensor:
    """The weight of a layer that reads the targets, for reading the kept channels alone.

    `new[.., i, ..] = sum_j matrix[j, i] weight[.., j, ..]` along `axis`, in float64, given back in the weight's type.

    Args:
        consumer: weight with `targets * each` positions along `axis`; for a slice of a concatenation, that slice.
        each: positions per channel where they lie side by side, as after flattening (height times width).

    Returns:
        The weight with `kept * each` positions along `axis`.

    Raises:
        InputError: the axis has another size, or the weight is not of real floating-point numbers.
        NotFiniteError: a NaN or an infinity, in the weight or because the result does not fit its type.
    """
    targets, kept = mixing.matrix.shape
    if not consumer.is_floating_point():
        raise InputError("mix a weight", found=f"numbers of {consumer.dtype}", do="give the floating-point weight")
    if not -consumer.ndim <= axis < consumer.ndim or each < 1 or consumer.shape[axis] != targets * each:
        raise InputError(
            f"mix a weight along axis {axis} with each={each}",
            found=f"shape {list(consumer.shape)}, {targets} channels",
            do=f"give an axis of size {targets} * each",
        )
    rows = consumer.detach().double().movedim(axis, -1)
    if not bool(rows.isfinite().all()):
        raise NotFiniteError("mix a weight", found="NaN or infinity in it", do="check the weight")
    shape = rows.shape[:-1]
    if each == 1:
        mixed = rows @ mixing.matrix.to(rows.device)
    else:
        mixed = rows.unflatten(-1, (targets, each)).transpose(-1, -2) @ mixing.matrix.to(rows.device)
        mixed = mixed.transpose(-1, -2)
    mixed = mixed.reshape(*shape, kept * each).movedim(-1, axis).to(consumer.dtype).contiguous()
    if not bool(mixed.isfinite().all()):
        raise NotFiniteError(
            "mix a weight",
            found=f"a result beyond {consumer.dtype}, largest coefficient {mixing.largest:.3g}",
            do="raise the ridge, or convert the model to float32",
        )
    return mixed


def reconstruct(
    cross: Float[Tensor, "targets kept"],
    gram: Float[Tensor, "kept kept"],
    squares: Float[Tensor, " targets"],
    *,
    kept: Int[Tensor, " kept"],
    ridge: float,
    non_negative: bool = False,
    remarks: tuple[str, ...] = (),
) -> Mixing:
    """Minimise `|target_j - sum_i m_i damaged_i|^2 + ridge |m - m0|^2` for every j, from inner products.

    m0 is the unit vector for kept targets and zero for others. `M = M0 + R (gram + ridge)^-1` with the residuals
    `R = cross - M0 gram`; one Cholesky factorisation. Where a residual is exactly zero, so is the change.

    Raises:
        InputError: the matrix is singular, which a positive ridge prevents.
    """
    matrix = unit_rows(kept, cross)
    residual = cross.clone()
    residual[kept] -= gram
    solved = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(solved)
    if bool(failed):
        raise InputError(
            "reconstruct channels",
            found=f"a singular Gram matrix ({len(gram)} channels, ridge {ridge:.3g})",
            do="raise the ridge",
        )
    # [targets, kept]; at the minimum the objective has fallen by residual . change
    change = torch.cholesky_solve(residual.T, factor).T
    before = start_squares(cross, gram, squares, kept)
    after = before - (residual * change).sum(1)
    if non_negative:
        rows = (matrix + change < 0).any(1).nonzero()[:, 0]
        best, reached = minimum(solved, cross[rows] + ridge * matrix[rows], matrix[rows])
        change[rows] = best - matrix[rows]
        after[rows] = before[rows] + (change[rows] * (change[rows] @ solved - 2 * residual[rows])).sum(1)
        if not reached:
            remarks = (*remarks, "the best non-negative coefficients were not reached")
    return Mixing(
        matrix + change,
        kept,
        share(before, squares),
        share(after, squares),
        squares,
        condition=_condition(solved, factor),
        remarks=remarks,
    )


def unit_rows(kept: Int[Tensor, " kept"], like: Float[Tensor, "targets kept"]) -> Float[Tensor, "targets kept"]:
    """M0: kept channels stand for themselves, the others are left out."""
    matrix = torch.zeros_like(like)
    matrix[kept, torch.arange(len(kept), device=kept.device)] = 1
    return matrix


def start_squares(
    cross: Float[Tensor, "targets kept"],
    gram: Float[Tensor, "kept kept"],
    squares: Float[Tensor, " targets"],
    kept: Int[Tensor, " kept"],
) -> Float[Tensor, " targets"]:
    """Squared error of M0."""
    start = squares.clone()
    start[kept] = squares[kept] - 2 * cross[kept].diagonal() + gram.diagonal()
    return start


def share(part: Float[Tensor, " targets"], whole: Float[Tensor, " targets"]) -> Float[Tensor, " targets"]:
    """Part of the whole, never negative; nothing of nothing is 0."""
    part = part.clamp_min(0)
    return torch.where(part > 0, part / whole.clamp_min(torch.finfo(torch.float64).tiny), part)


def _condition(matrix: Tensor, factor: Tensor) -> float:
    """Of a positive definite matrix with this Cholesky factor, in the 1-norm, by LAPACK's estimate: [kept, kept]."""
    inverse, failed = dpocon(factor.cpu().numpy(), float(torch.linalg.matrix_norm(matrix, 1)), uplo="L")
    return 1 / float(inverse) if inverse > 0 and not failed else float("inf")
