"""A network repaired front to back, in closed form and without data.

What removed and rounded channels did is taken over by those that stay, in the weights of the layers that read them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from niwaki.errors import NotFiniteError
from niwaki.graph import ChannelGraph
from niwaki.graph.plans import cuts_of
from niwaki.plan import apply_cuts
from niwaki.repair.coloured import Coloured
from niwaki.repair.diagonal import Diagonal
from niwaki.repair.filters import Composite, Filters, folded
from niwaki.repair.inputs import fitted_inputs
from niwaki.repair.mixing import Mixing, mix
from niwaki.repair.sites import Layer, Norm, Path, Site, Structure, bend_of

Bend = tuple[str, Callable[[Tensor], Tensor]]


@final
@dataclass(frozen=True, eq=False)
class Channels:
    """Channels as one reader sees them, before and after damage."""

    target: Any
    """Folded, whole; the rows that the reader reads: `Filters` or `Composite`."""
    damaged: Any
    """Folded with the same norms; the kept ones, rounded."""
    kept: Tensor
    """Which of the targets each damaged channel is, `[kept]`."""
    mean: Tensor | None
    """Mean in front of the last activation, by its norm, `[targets]`; None without a norm."""
    std: Tensor | None
    """Standard deviation there."""
    bend: Bend
    """Name and function of the last activation."""
    raw: Tensor
    """Filters as the layer holds them, `[targets, inputs]`."""
    norm: dict[str, Tensor]
    """gamma, beta, mean and variance of the norm in front of the last activation, each `[targets]`."""
    eps: float


Solver = Callable[[Channels], Mixing]


@final
@dataclass(frozen=True, eq=False)
class Repaired:
    """What became of the channels of one layer on their way to one reader."""

    weight: str
    reader: str
    kept: int
    of: int
    error: float
    """Of the removed and rounded channels after the repair, as a share of the power of all, by the solver's objective;
    not by data."""
    unrepaired: float
    """The same without the repair."""
    largest: float
    """Largest entry of the mixing matrix, as a magnitude."""
    warnings: tuple[str, ...] = ()


@dataclass(eq=False)
class Work:
    """Tensors of a model in float64 on the CPU, whole, as they are rewritten; the model may be anywhere."""

    model: nn.Module
    fitted: bool = False
    """Whether inputs of layers are taken to be what batch-norm variances say, and not white."""
    exact: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[tuple[str, str], tuple[float, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.exact:
            self.exact[name] = self.before(name)
        return self.exact[name]

    def before(self, name: str) -> Tensor:
        """A tensor as the model has it."""
        return self.own[name].detach().to("cpu").double()

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.exact[name] = value

    def write(self) -> None:
        """Put everything back into the model, in its types.

        Raises:
            NotFiniteError: a number does not fit its type; the model is as it was.
        """
        for name, value in self.exact.items():
            if not bool(value.to(self.own[name].dtype).isfinite().all()):
                raise NotFiniteError(
                    "rewrite a weight",
                    found=f"numbers up to {float(value.abs().max()):.3g}, of {self.own[name].dtype} in the model",
                    where=name,
                    do="raise the ridge, or convert the model to float32",
                )
        with torch.no_grad():
            for name, value in self.exact.items():
                self.own[name].copy_(value)


class Rounding:
    """How weights are rounded: `what[name]` is asked for those that are; codes of what is cut are kept."""

    def __init__(self, how: Mapping[str, Any]) -> None:
        self.how = how
        self.codes: dict[str, Any] = {}

    def __call__(self, graph: ChannelGraph, layer: Layer, work: Work, alive: np.ndarray) -> None:
        """Put what stays of a layer's weight on its grid, the rest as it is."""
        name = layer.weight
        if name not in self.how:
            return
        weight = work[name]
        cuts = cuts_of(graph, name, alive)
        places = apply_cuts(torch.arange(weight.numel(), device=weight.device).reshape(weight.shape), cuts, name)
        codes = self.how[name](weight.reshape(-1)[places], axis=layer.axis, name=name)
        self.codes[name] = replace(codes, dtype=work.own[name].dtype)  # whose values the model will hold
        rounded = weight.clone()
        rounded.view(-1)[places.reshape(-1)] = self.codes[name].values().double().reshape(-1)
        work[name] = rounded


def reconstruct_network(
    model: nn.Module,
    graph: ChannelGraph,
    structure: Structure,
    alive: np.ndarray,
    *,
    solve: Solver | None,
    rounding: Rounding,
    fitted: bool = False,
    reconsider: Callable[[Work, Site, np.ndarray], np.ndarray] | None = None,
    hear: Callable[[int, int, str], None] | None = None,
) -> tuple[np.ndarray, list[Repaired]]:
    """Rewrite the weights of `model` in place, front to back: round a layer, then let what reads it take over.

    Shapes stay; where anything is repaired, what the plan of `alive` cuts is zero where it is read. Every layer is
    repaired towards what it computes when its turn comes, its own inputs already taken over; the rounding of layers
    whose channels can't be mixed, and of the last one, stays.

    Args:
        structure: what `structure_of` finds in the graph.
        alive: units that stay, bool `[units]`; a removed one has to belong to a site that can be repaired.
        solve: makes the mixing matrix of one site and reader; None repairs nothing.
        rounding: of the weights it names.
        fitted: take inputs of layers to be what batch-norm variances say (`fitted_inputs`), and not white.
        reconsider: asked for each site in its turn; gives other units of it to keep, as many, as `alive`.
        hear: hears of each layer: its number from 1, how many there are, its name.

    Returns:
        The units that stay, and what was predicted for each site and reader.
    """
    work = Work(model, fitted)
    layers = structure.layers
    sites = {site.weight: site for site in structure.sites}
    waiting: dict[str, list[tuple[Site, Path, Filters]]] = {}
    found: list[Repaired] = []
    for number, layer in enumerate(layers, start=1):
        site = sites.get(layer.weight)
        if layer.depthwise:
            _depthwise(work, graph, layer, waiting.pop(layer.weight, []), alive, solve, rounding, found)
        elif site is None or site.reason is not None:
            rounding(graph, layer, work, alive)
        else:
            if reconsider is not None:
                alive = reconsider(work, site, alive)
            whole = {id(path): folded_rows(work, site, path) for path in site.paths}
            rounding(graph, layer, work, alive)
            for path in site.paths:
                if path.depthwise is not None:
                    waiting.setdefault(path.depthwise.weight, []).append((site, path, whole[id(path)]))
                    continue
                _take_over(work, site, path, whole[id(path)], folded_rows(work, site, path), alive, solve, found)
        if hear is not None:
            hear(number, len(layers), layer.weight)
    work.write()
    return alive, found


def _depthwise(
    work: Work,
    graph: ChannelGraph,
    layer: Layer,
    waiting: list[tuple[Site, Path, Filters]],
    alive: np.ndarray,
    solve: Solver | None,
    rounding: Rounding,
    found: list[Repaired],
) -> None:
    """Round a depthwise filter, and let the reader behind it take over what became of both."""
    whole = [_filter_rows(work, path) for _, path, _ in waiting]
    if solve is not None:
        # rounding in front is evened out channel by channel, where nothing mixes yet; once, however many read them
        weight = work[layer.weight].clone()
        scaled = torch.zeros(len(weight), dtype=torch.bool)
        for site, path, before in waiting:
            assert path.depthwise is not None
            after = folded_rows(work, site, path)
            scale = Diagonal()(before, after, torch.arange(len(after))).matrix.diagonal().clone()
            rows = torch.from_numpy(path.depthwise.positions)
            scale[scaled[rows]] = 1
            scaled[rows] = True
            weight[rows] *= scale.reshape(-1, *[1] * (weight.dim() - 1))
        work[layer.weight] = weight
    rounding(graph, layer, work, alive)
    for (site, path, before), filters in zip(waiting, whole, strict=True):
        target = Composite(before, filters)
        damaged = Composite(folded_rows(work, site, path), _filter_rows(work, path))
        _take_over(work, site, path, target, damaged, alive, solve, found)


def _take_over(
    work: Work,
    site: Site,
    path: Path,
    target: Filters | Composite,
    whole: Filters | Composite,
    alive: np.ndarray,
    solve: Solver | None,
    found: list[Repaired],
) -> None:
    """Rewrite what a path's reader reads. `whole` are all channels after rounding, of which some stay."""
    stays = alive[site.units[path.members]]
    kept = torch.from_numpy(np.flatnonzero(stays))
    if solve is None or not kept.numel():  # a reader of removed channels only goes as well
        return
    norms, members = _last_norms(path), torch.from_numpy(path.members)
    mean, std = statistics_on(work, path)
    mixing = solve(
        Channels(
            target=target,
            damaged=whole[kept],
            kept=kept,
            mean=mean,
            std=std,
            bend=bend_on(path),
            raw=work[site.weight][members].flatten(1),
            norm=_norm(work, norms[-1]) if norms else {},
            eps=norms[-1].eps if norms else 0.0,
        )
    )
    positions, (first, end) = torch.from_numpy(path.positions), path.rows
    weight = work[path.reader].clone()
    block = weight[first:end]
    taken = block[:, positions.reshape(-1)]  # [rows, channels x each, ...]
    mixed = mix(taken, mixing, axis=1, each=positions.shape[1])
    block[:, positions.reshape(-1)] = 0
    block[:, positions[kept].reshape(-1)] = mixed
    work[path.reader] = weight
    power = float(mixing.squares.sum())
    found.append(
        Repaired(
            weight=site.weight,
            reader=path.reader,
            kept=len(kept),
            of=len(stays),
            error=float((mixing.after * mixing.squares).sum()) / power if power else 0.0,
            unrepaired=float((mixing.before * mixing.squares).sum()) / power if power else 0.0,
            largest=mixing.largest,
            warnings=(*mixing.warnings, *(f"{name} lies between: an estimate" for name in path.inexact)),
        )
    )


def folded_rows(work: Work, site: Site, path: Path) -> Any:
    """The rows of a site that a path reads, with the norms in front of the activation folded in: `Filters`, or
    `Coloured` where inputs are fitted and there is a norm to fit them to.
    """
    members = torch.from_numpy(path.members)
    bias = work[site.bias][members] if site.bias is not None else None
    filters = _folded(work, work[site.weight][members], bias, path.norms)
    if not work.fitted or path.depthwise is not None or not path.norms:
        return filters
    weight, norm = work.before(site.weight), path.norms[0]
    key = site.weight, norm.variance
    if key not in work.inputs:  # of the network as it was: what goes into its layers
        variance = work.before(norm.variance)[torch.from_numpy(norm.positions)]
        work.inputs[key] = fitted_inputs(weight[members], variance)
    neighbours, scales = work.inputs[key]
    return Coloured(filters, scales, tuple(weight.shape[2:]), neighbours)


def whole_rows(work: Work, site: Site, path: Path) -> Any:
    """The channels of a path as its reader sees them, a depthwise filter on the way included."""
    filters = folded_rows(work, site, path)
    return filters if path.depthwise is None else Composite(filters, _filter_rows(work, path))


def _filter_rows(work: Work, path: Path) -> Filters:
    """The rows of a depthwise filter that a path goes through, with the norms behind it folded in."""
    assert path.depthwise is not None
    rows = torch.from_numpy(path.depthwise.positions)
    bias = work[path.depthwise.bias][rows] if path.depthwise.bias is not None else None
    return _folded(work, work[path.depthwise.weight][rows], bias, path.after)


def _folded(work: Work, weight: Tensor, bias: Tensor | None, norms: tuple[Norm, ...]) -> Filters:
    filters = folded(weight, bias)
    for norm in norms:
        filters = folded(filters.weight, filters.bias, **_norm(work, norm), eps=norm.eps)
    return filters


def _norm(work: Work, norm: Norm) -> dict[str, Tensor]:
    at = torch.from_numpy(norm.positions)
    names = {"gamma": norm.gamma, "beta": norm.beta, "mean": norm.mean, "variance": norm.variance}
    return {key: work[name][at] for key, name in names.items() if name is not None}


def bend_on(path: Path) -> Bend:
    """Name and function of the last activation on a path."""
    return bend_of(path.bend if path.depthwise is None else path.bend_after)


def _last_norms(path: Path) -> tuple[Norm, ...]:
    return path.norms if path.depthwise is None else path.after


def statistics_on(work: Work, path: Path) -> tuple[Tensor | None, Tensor | None]:
    """Mean and standard deviation that the norm in front of the last activation gives the channels, if there is one."""
    norms = _last_norms(path)
    if not norms:
        return None, None
    own = _norm(work, norms[-1])
    one = torch.ones_like(own["mean"])
    return own.get("beta", 0 * one), own.get("gamma", one).abs()
