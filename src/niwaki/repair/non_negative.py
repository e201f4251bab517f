"""Quadratic minima with coefficients that may not be negative, many at once over one matrix."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

ENTRIES = 2**24
"""Numbers in the matrices solved at once: 128 MiB."""
STEPS, LOOK = 300, 20
"""Most steps of projected gradient, to guess which coefficients are positive (the exchange behind it corrects the
guess), and after how many it is seen whether the guess has changed."""


def minimum(
    matrix: Float[Tensor, "n n"], linear: Float[Tensor, "rows n"], start: Float[Tensor, "rows n"], *, limit: int = 300
) -> tuple[Float[Tensor, "rows n"], bool]:
    """Minimise `m.matrix.m - 2 m.linear` over `m >= 0` for every row; exact but for rounding.

    Coefficients are split in positive and zero ones; those that contradict the optimality conditions change sides, all
    at once while that lowers their number, else one at a time. Rows do not wait for each other.

    Source: Kim and Park 2011, doi:10.1137/110821172, sec. 3 (block principal pivoting).

    Args:
        matrix: positive definite.
        start: a guess, not negative.

    Returns:
        The coefficients, and whether every row met the optimality conditions within `limit` exchanges.
    """
    # unit diagonal: signs stay, and one tolerance fits every coefficient
    scale = matrix.diagonal().rsqrt()
    matrix, linear = matrix * scale * scale[:, None], linear * scale
    best = _projected_gradient(matrix, linear, start / scale)
    positive = best > 0
    rows, n = linear.shape
    slack = 1e-11 * linear.abs().amax(1, keepdim=True).clamp_min(torch.finfo(linear.dtype).tiny)  # [rows, 1]
    fewest = torch.full((rows,), n + 1, device=linear.device)
    tries = torch.full((rows,), 3, device=linear.device)
    numbers = torch.arange(n, device=linear.device)
    open_ = torch.arange(rows, device=linear.device)
    for _ in range(limit):
        if not len(open_):
            break
        side = positive[open_]
        values = _solve(matrix, linear[open_], side)
        gradient = values @ matrix - linear[open_]
        wrong = torch.where(side, values < -slack[open_], gradient < -slack[open_])
        count = wrong.sum(1)
        best[open_] = values.clamp_min(0)
        better = count < fewest[open_]
        alone = ~better & (tries[open_] == 0)
        tries[open_] = torch.where(better, 3, (tries[open_] - 1).clamp_min(0))
        fewest[open_] = torch.minimum(count, fewest[open_])
        last = torch.where(wrong, numbers, -1).amax(1, keepdim=True)
        positive[open_] = side ^ (wrong & (~alone[:, None] | (numbers == last)))
        open_ = open_[count > 0]
    return best * scale, not len(open_)


def _projected_gradient(matrix: Tensor, linear: Tensor, values: Tensor) -> Tensor:
    """Accelerated steps until hardly a coefficient changes sign: [rows, n]."""
    step = 1 / float(torch.linalg.matrix_norm(matrix, float("inf")))
    ahead, momentum = values, 1.0
    guess = values > 0
    for number in range(1, STEPS + 1):
        following = (ahead - step * (ahead @ matrix - linear)).clamp_min(0)
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + (momentum - 1) / grown * (following - values)
        values, momentum = following, grown
        if number % LOOK == 0:
            earlier, guess = guess, values > 0
            # a few that still move are cheaper to exchange than to wait for
            if int((guess != earlier).sum()) <= len(values):
                break
    return values


def _solve(matrix: Tensor, linear: Tensor, side: Bool[Tensor, "rows n"]) -> Tensor:
    """Every row's minimum over its own coefficients, the others zero: [rows, n]."""
    values = torch.zeros_like(linear)
    order = side.sum(1).argsort()  # rows of like size together
    sizes = side.sum(1)[order]
    start = 0
    while start < len(order):
        # sizes grow along the order, so the largest of a piece is its last: halve until it fits
        stop = len(order)
        while stop - start > 1 and (stop - start) * int(sizes[stop - 1]) ** 2 > ENTRIES:
            stop = start + (stop - start + 1) // 2
        rows, size = order[start:stop], int(sizes[stop - 1])
        start = stop
        if size == 0:
            continue
        mine = (~side[rows]).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]  # [some, size]
        real = side[rows].gather(1, mine)
        part = matrix[mine[:, :, None], mine[:, None, :]]
        part = torch.where(
            real[:, :, None] & real[:, None, :], part, torch.eye(size, dtype=part.dtype, device=part.device)
        )
        right = linear[rows].gather(1, mine) * real
        solved = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(part))[:, :, 0]
        values[rows] = torch.zeros_like(linear[rows]).scatter(1, mine, solved * real)
    return values
