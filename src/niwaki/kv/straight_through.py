"""Quantised numbers that gradients pass through: what training sees of a cache of few bits."""

from typing import Any

import torch
from torch import Tensor

from niwaki.kv.packed import Grid, Packed


class _Through(torch.autograd.Function):
    """Rounded forward; backward as it is where `passes`, zero elsewhere."""

    @staticmethod
    def forward(context: Any, x: Tensor, rounded: Tensor, passes: Tensor | None) -> Tensor:
        context.passes = passes
        return rounded

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return (gradient if context.passes is None else gradient * context.passes), None, None


def through(rows: Tensor, grid: Grid) -> Tensor:
    """`[batch, heads, tokens, width]` as `Packed` gives them back, with a gradient of one everywhere.

    Tokens that fill no group along tokens stay as they are: they wait in the window.
    """
    whole = rows.shape[2] - rows.shape[2] % grid.group if grid.axis == "tokens" else rows.shape[2]
    if not whole:
        return rows
    with torch.no_grad():
        rounded = torch.cat((Packed.of(rows[:, :, :whole], grid).read(), rows[:, :, whole:]), dim=2)
    return _Through.apply(rows, rounded, None)  # type: ignore[no-any-return]


def reference(rows: Tensor, bits: int, *, dim: int = -1) -> Tensor:
    """The quantiser of the authors' code, for comparison only: its zero point is clamped to the codes, which breaks
    every group along `dim` that does not contain 0. No gradient reaches what is at or beyond a group's bounds.

    Examples:
        >>> reference(torch.tensor([2.0, 3.0, 4.0, 5.0]), 2).tolist()
        [2.0, 3.0, 3.0, 3.0]
    """
    top = 2**bits - 1
    least, most = rows.amin(dim, keepdim=True), rows.amax(dim, keepdim=True)
    scale = ((most - least) / top).clamp(min=1e-5)
    zero = (-(least / scale).round()).clamp(0, top)
    rounded = (((rows / scale).round() + zero).clamp(0, top) - zero) * scale
    passes = (rows > least) & (rows < most)
    return _Through.apply(rows, rounded.detach(), passes)  # type: ignore[no-any-return]
