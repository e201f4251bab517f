"""What goes into a layer, as far as its batch norm's running variances tell: no data."""

import numpy as np
import torch
from torch import Tensor

from niwaki.repair.coloured import Coloured, window_root
from niwaki.repair.filters import Filters
from niwaki.repair.non_negative import minimum

NEIGHBOURS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Correlations of neighbouring places that are tried."""
PRIOR = 0.1
"""What a deviation of an input's variance costs beside one of an output's, both relative."""
LEAST = 1e-3
"""Of an input's variance, beside the others' of about 1."""


def fitted_inputs(weight: Tensor, variance: Tensor) -> tuple[float, Tensor]:
    """Correlation of neighbouring places and variances of input channels under which a layer puts out `variance`.

    A batch norm keeps the variance of every channel that the layer puts out: `v_i = W_i' S W_i`. With S the product of
    one variance for each input channel and one correlation of neighbouring places, that is as many equations as there
    are outputs. The correlation is the one that brings all `W_i' S W_i` nearest in proportion to `v`; the variances are
    the non-negative ones that fit `v` best, held to be near each other where the equations do not say.

    Source: none; niwaki's own.

    Args:
        weight: of a convolution or linear layer, `[outputs, inputs, *kernel]`.
        variance: running variance of its outputs, `[outputs]`.

    Returns:
        The correlation at a distance of one, and the variances, `[inputs]`, whose mean is near 1 in no known unit.
    """
    rows, size = weight.detach().double(), tuple(weight.shape[2:])
    wanted = variance.detach().double().clamp_min(torch.finfo(torch.float64).tiny)
    filters = Filters(rows, torch.zeros_like(wanted))
    neighbours = 0.0
    if any(side > 1 for side in size):
        spreads = [_spread(Coloured(filters, None, size, one).squares, wanted) for one in NEIGHBOURS]
        neighbours = NEIGHBOURS[int(np.argmin(spreads))]
    windows = rows.reshape(*rows.shape[:2], -1)  # [outputs, inputs, places]
    shares = (windows @ window_root(size, neighbours)).square().sum(2)  # [outputs, inputs]
    used = shares.sum(1) > 0
    if not bool(used.any()):
        return neighbours, torch.ones(rows.shape[1], dtype=torch.float64)
    level = (wanted[used] / shares[used].sum(1)).median()
    relative = shares[used] * level / wanted[used, None]  # what every input adds, as a share of the variance
    one = torch.ones(1, relative.shape[1], dtype=torch.float64)
    matrix = relative.T @ relative + PRIOR * torch.eye(relative.shape[1], dtype=torch.float64)
    scales, _ = minimum(matrix, relative.sum(0)[None] + PRIOR * one, one)
    return neighbours, scales[0].clamp_min(LEAST)


def _spread(found: Tensor, wanted: Tensor) -> float:
    """How far two sets of variances are from being in proportion."""
    tiny = torch.finfo(torch.float64).tiny
    return float((found.clamp_min(tiny) / wanted).log().std(correction=0))
