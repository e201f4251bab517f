"""`timed`: what a plan takes in milliseconds on a target, from measured layers and a few whole networks."""

import contextlib
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from niwaki.budgets.choose import choose
from niwaki.budgets.networks import Networks, Progress
from niwaki.budgets.tables import PERIOD, Surface, Table, Times
from niwaki.budgets.uniform import Uniform
from niwaki.errors import BudgetError, InputError, NiwakiError, NothingChangedWarning
from niwaki.graph import ChannelGraph, trace
from niwaki.graph.cost import Term, joined, resolved
from niwaki.graph.layers import HEAVY, Layer, layers_of
from niwaki.measure.replay import alone
from niwaki.measure.target import Target
from niwaki.plan import Plan
from niwaki.scores.score import Scores
from niwaki.units import Budget, tensors_in

log = logging.getLogger(__name__)

SHARES = (0.6, 0.3)
"""Of the MACs, in networks that are narrowed evenly and measured whole."""
CHOSEN = (0.7, 0.5)
"""Of the latency, in networks that are chosen by it and measured whole."""


def table_path(folder: Path, target: Target) -> Path:
    """The usual file in a folder for a target on this machine."""
    machine = target.machine()
    code = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:10]
    return folder / f"{target.of}-{re.sub(r'[^a-z0-9]+', '-', machine['runtime'])}-{code}.json"


def timed(
    model: nn.Module,
    example: Any,
    graph: ChannelGraph,
    *,
    target: Target,
    table: str | Path | None = None,
    shares: Sequence[float] = SHARES,
    progress: Progress | None = None,
) -> ChannelGraph:
    """`graph` with the cost "latency": milliseconds of a forward on `target`, of any plan; or, where the target
    measures energy, with the cost "energy": its joules.

    Every layer is measured alone on a grid of widths (`niwaki.budgets.tables`). Layers side by side do not take what
    they take alone, so the sum is fitted to whole networks (uncut, narrowed evenly, and chosen by the latency so far)
    with three numbers not below 0: what products are multiplied by, what all other layers are, and what is the same
    for every plan.

    Args:
        example: as the model takes it; its first sample is repeated for the target's batch.
        table: the file that keeps what was measured, so that it is measured once; none unless given.
        shares: of the MACs, in the networks that are narrowed evenly and measured whole.
        progress: called before each measurement with its number, how many there are, and what it is.

    Raises:
        MissingExtraError: the runtime is not installed.
        InputError: a table of another machine or target; a network that the runtime can't take.
        FileDamagedError: `table` is no such file.
    """
    networks = Networks.of(model, example, graph, target=target, table=table, progress=progress)
    known, batched, model = networks.known, networks.example, networks.model
    mine = graph if target.batch == _batch(graph) else trace(model, batched)
    if mine.units.count != graph.units.count:
        raise InputError(
            f"Target(batch={target.batch})", found="the network has other units at that batch", do="trace at that batch"
        )
    layers = layers_of(mine, fused=target.runtime != "pytorch")
    surfaces, untimed = _surfaces(layers, known, target, progress)
    points = networks.measured({f"even {share:g}": _narrowed(graph, share) for share in shares})
    fit = calibrated(mine, layers, surfaces, points)
    first = priced_by(graph, layers, surfaces, scale=fit[:2], constant=fit[2], name=target.of)
    points += networks.measured({f"timed {share:g}": _quickened(first, share, target.of) for share in CHOSEN})
    fit = calibrated(mine, layers, surfaces, points)
    if untimed:
        log.info("not timed alone, and so part of what is the same for every plan: %s", ", ".join(sorted(untimed)))
    return priced_by(graph, layers, surfaces, scale=fit[:2], constant=fit[2], name=target.of)


def _batch(graph: ChannelGraph) -> int:
    return next((tensor.shape[0] for tensor in tensors_in(graph.example) if tensor.dim()), 1)


def _surfaces(
    layers: Sequence[Layer], known: Table, target: Target, progress: Progress | None
) -> tuple[list[Surface], set[str]]:
    """The surface of every layer, measured where the table does not have it; and kinds that can't run alone."""
    missing = {layer.key: layer for layer in layers if layer.key not in known.layers}
    untimed: set[str] = set()
    for number, (key, layer) in enumerate(missing.items()):
        if progress is not None:
            progress(number, len(missing), f"{layer.kind} {layer.record.module}")
        try:
            known.layers[key] = Surface.measured(layer.full, _timer(layer, target))
        except NiwakiError:
            raise
        except Exception as error:  # a call that does not run alone, or that an exporter does not know
            log.debug("%s can't be timed alone: %s: %s", layer.kind, type(error).__name__, error)
            untimed.add(layer.kind)
            known.layers[key] = Surface((1,), (1,), ((0.0,),))
        if number % 8 == 7:
            known.save()
    if missing:
        known.save()
    return [known.layers[layer.key] for layer in layers], untimed


def _timer(layer: Layer, target: Target) -> Callable[[int, int], float]:
    seen: dict[tuple[int, int], float] = {}

    def timer(out: int, into: int) -> float:
        if (out, into) not in seen:
            seen[out, into] = target.amount(*alone(layer, out, into, batch=target.batch))
        return seen[out, into]

    return timer


def _narrowed(graph: ChannelGraph, share: float) -> Plan | None:
    """The plan that keeps this share of the MACs, evenly and in multiples of 16 if that can be; None if it can't be
    had."""
    free = {g.name: torch.arange(g.units, 0, -1, dtype=torch.float64) for g in graph.groups if g.fixed is None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingChangedWarning)
        for multiple in (PERIOD, 1):
            with contextlib.suppress(BudgetError):
                budget = Budget(keep=share, of="macs", multiple=multiple)
                return choose(graph, Scores(free, {"name": "first"}), budget, how=Uniform())
    return None


def _quickened(graph: ChannelGraph, share: float, name: str) -> Plan | None:
    """A plan of this share of the latency as promised so far, for scores that say nothing; None if it can't be had.

    What is chosen by a table is where the table flatters: such networks are part of what it is fitted to.
    """
    draw = torch.Generator().manual_seed(0)
    free = {g.name: torch.rand(g.units, generator=draw, dtype=torch.float64) for g in graph.groups if g.fixed is None}
    with contextlib.suppress(BudgetError), warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingChangedWarning)
        return choose(graph, Scores(free, {"name": "random"}), Budget(keep=share, of=name))
    return None


def calibrated(
    graph: ChannelGraph,
    layers: Sequence[Layer],
    surfaces: Sequence[Surface],
    points: Sequence[tuple[np.ndarray, float]],
) -> tuple[float, float, float]:
    """Factors of products and of all other layers, and milliseconds of every plan, not below 0, that come closest to
    whole networks in relative terms."""
    rows = []
    for alive, ms in points:
        heavy, light = (
            priced_by(graph, layers, surfaces, scale=scale, constant=0.0).cost(alive)["latency"] / ms
            for scale in ((1.0, 0.0), (0.0, 1.0))
        )
        rows.append([heavy, light, 1.0 / ms])
    factors, _ = nnls(np.array(rows), np.ones(len(rows)))
    return float(factors[0]), float(factors[1]), float(factors[2])


def priced_by(
    graph: ChannelGraph,
    layers: Sequence[Layer],
    surfaces: Sequence[Surface],
    *,
    scale: tuple[float, float],
    constant: float,
    name: str = "latency",
) -> ChannelGraph:
    """`graph` with a cost that is the sum of the layers' surfaces, products and others each with a factor."""
    slots = (
        max((len(layer.widths[0]) for layer in layers), default=1) or 1,
        max((len(layer.widths[1]) for layer in layers), default=1) or 1,
    )
    terms = []
    for layer in layers:
        blocks = () if layer.block is None else (layer.block,)
        arrays = (*layer.widths[0], *layer.widths[1], *blocks)
        terms.append(Term(1, tuple(np.asarray(array, dtype=np.int32).reshape(1, -1) for array in arrays)))
    widths, ((factors, _, _),) = resolved([terms])
    table = np.full((len(layers) + 1, slots[0] + slots[1] + 1), widths.rows, dtype=np.int32)
    for i, layer in enumerate(layers):
        counts = len(layer.widths[0]), len(layer.widths[1]), int(layer.block is not None)
        row, at = factors[i], 0
        for start, count in zip((0, slots[0], slots[0] + slots[1]), counts, strict=True):
            table[i, start : start + count] = row[at : at + count]
            at += count
    unique = {id(surface): surface for surface in surfaces}
    order = {key: number for number, key in enumerate(unique)}
    which = np.array([*(order[id(surface)] for surface in surfaces), len(order)], dtype=np.int64)
    factor = np.array([*(scale[0] if layer.kind in HEAVY else scale[1] for layer in layers), 1.0])
    cost = Times(
        table,
        widths.rows,
        surfaces=(*unique.values(), Surface((1,), (1,), ((constant,),))),
        which=which,
        scale=factor,
        slots=slots,
    )
    both, costs = joined(graph.widths, {k: v for k, v in graph.costs.items() if k != name}, widths, {name: cost})
    return replace(graph, widths=both, costs=costs)
