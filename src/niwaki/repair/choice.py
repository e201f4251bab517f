"""Which channels others can best do without or take over, told without data: one number per unit, higher = keep."""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.graph import ChannelGraph
from niwaki.repair.activation_space import ActivationSpace
from niwaki.repair.reconstruction import Work, bend_on, statistics_on, whole_rows
from niwaki.repair.sites import Path, Site
from niwaki.scores import Scores

Choice = Literal["folded_norm", "path_norm", "residual", "elimination"]
Space = Literal["filter", "activation"]
LEAST = 1e-3
"""Share of the mean of the Gram matrix's diagonal that is added to it: what the mixing itself is charged."""


def channel_scores(
    graph: ChannelGraph,
    sites: Iterable[Site],
    work: Work,
    how: Choice,
    *,
    space: Space = "filter",
    bias_weight: float = 0.01,
) -> Scores:
    """Scores of the units of all sites that can be repaired; groups with other units are left whole.

    "folded_norm" is the norm of the filter with the batch norm folded in; "path_norm" is that times the norm of what
    reads it. "residual" is what no combination of the others gives of a channel, times that norm. "elimination" takes
    channels out one after the other, each time the one whose loss harms the reader least once the others have taken
    over; a channel's score is the harm done by then, as a share of all that the readers get. The last two judge by
    filters, or by activations under the Gaussian model of their batch norms.

    Source: Bai et al. 2023, arXiv:2308.07209 does not say how its channels are chosen. Elimination with its update of
    the rest is Hassibi and Stork 1993 (optimal brain surgeon) for whole channels, with moments in place of a Hessian.

    Raises:
        InputError: an unknown choice or space.
    """
    for name, value, known in (("choose channels by", how, Choice), ("judge channels in", space, Space)):
        if value not in get_args(known):
            raise InputError(f"{name} {value!r}", found=f"known: {', '.join(get_args(known))}", do="use one")
    numbers = np.full(graph.units.count, np.nan)
    for site in sites:
        if site.reason is None:
            numbers[site.units] = site_scores(work, site, how, space=space, bias_weight=bias_weight)
    values: dict[str, Tensor] = {}
    missing = []
    for group in graph.groups:
        if group.fixed is None:
            own = numbers[group.ids]
            if np.isnan(own).any():
                missing.append(group.name)
            else:
                values[group.name] = torch.from_numpy(own)
    return Scores(values, {"name": how, "space": space, "bias_weight": bias_weight}, tuple(missing))


def site_scores(
    work: Work, site: Site, how: Choice, *, space: Space, bias_weight: float, most: int | None = None
) -> np.ndarray:
    """Scores of the rows of one site, over all its readers; float64 `[rows]`.

    Of elimination, only the `most` that go first have a number, the others are infinite.
    """
    if how in ("folded_norm", "path_norm"):
        total = torch.zeros(site.units.size, dtype=torch.float64)
        for path in site.paths:
            read = _read(work, path).square().sum(0) if how == "path_norm" else 1.0
            total[torch.from_numpy(path.members)] += whole_rows(work, site, path).squares * read
        return np.asarray(total.sqrt())
    views = []
    for path in site.paths:
        gram = _gram(work, site, path, space, bias_weight)
        gram = gram + (LEAST * float(gram.diagonal().mean()) or 1.0) * torch.eye(len(gram), dtype=gram.dtype)
        views.append((torch.from_numpy(path.members), torch.linalg.inv(gram), _read(work, path), gram))
    harms = torch.zeros(site.units.size, dtype=torch.float64)
    power = sum(float(((reads @ gram) * reads).sum()) for _, _, reads, gram in views) or 1.0
    for members, inverse, reads, _ in views:
        harms[members] += reads.square().sum(0) / inverse.diagonal()
    if how == "residual":
        return np.asarray(harms.sqrt())
    return eliminated([(at, inverse, reads) for at, inverse, reads, _ in views], site.units.size, most) / power


def eliminated(views: list[tuple[Tensor, Tensor, Tensor]], count: int, most: int | None = None) -> np.ndarray:
    """Take channels out one after the other; the harm done when each goes, float64 `[count]`, infinite for the rest.

    Args:
        count: of channels.
        most: how many are taken out; all unless said.
        views: for each reader which channels it reads, `[channels]`; the inverse of the Gram matrix of these,
            `[channels, channels]`; what it makes of each, `[outputs, channels]`.
    """
    places = torch.full((len(views), count), -1)
    for number, (members, _, _) in enumerate(views):
        places[number, members] = torch.arange(len(members))
    inverses = [inverse.clone() for _, inverse, _ in views]
    squares = [reads.T @ reads for _, _, reads in views]  # [channels, channels]: all that the harm needs of a reader
    harm, done, gone = np.full(count, np.inf), 0.0, torch.zeros(count, dtype=torch.bool)
    for _ in range(count if most is None else most):
        costs = torch.zeros(count, dtype=torch.float64)
        for (members, _, _), inverse, square in zip(views, inverses, squares, strict=True):
            costs[members] += square.diagonal() / inverse.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
        costs[gone] = torch.inf
        first = int(costs.argmin())
        done += float(costs[first])
        harm[first], gone[first] = done, True
        for number in torch.nonzero(places[:, first] >= 0)[:, 0].tolist():
            at = int(places[number, first])
            inverse, square = inverses[number], squares[number]
            share = inverse[:, at] / inverse[at, at]  # the others take over: reads_j -= reads_at share_j
            column = square[:, at] - square[at, at] / 2 * share
            square.addr_(column, share, alpha=-1).addr_(share, column, alpha=-1)
            inverse.addr_(share, share, alpha=-float(inverse[at, at]))
            square[at], square[:, at], inverse[at], inverse[:, at] = 0, 0, 0, 0
            inverse[at, at] = 1
    return harm


def _gram(work: Work, site: Site, path: Path, space: Space, bias_weight: float) -> Tensor:
    """Inner products of the channels of a path with each other, of filters or of activations."""
    filters: Any = whole_rows(work, site, path)
    if space == "filter":
        products: Tensor = filters.dot(filters)
        return products + bias_weight * filters.bias[:, None] * filters.bias
    mean, deviation = statistics_on(work, path)
    mean = filters.bias if mean is None else mean
    deviation = filters.squares.sqrt() if deviation is None else deviation
    name, bend = bend_on(path)
    how = ActivationSpace(activation=name if name in ("relu", "identity") else bend)
    return how.moments(filters, mean=mean, deviation=deviation).gram


def _read(work: Work, path: Path) -> Tensor:
    """What reads each channel, `[outputs and places, channels]`."""
    first, end = path.rows
    taken = work[path.reader][first:end][:, torch.from_numpy(path.positions).reshape(-1)]
    return (
        taken.reshape(end - first, *path.positions.shape, -1)
        .transpose(1, 2)
        .movedim(2, -1)
        .reshape(-1, len(path.members))
    )
