"""Layers in groups: found from the scales of a forward, or given by the user as patterns."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import nn

from niwaki.errors import InputError, NotFiniteError
from niwaki.graph import ChannelGraph
from niwaki.graph.stages import scale_name, stages_of

FINE = 2
"""How many of the coarsest scales of a backbone have a group of their own; all finer ones share one."""


@final
@dataclass(frozen=True, eq=False)
class Layer:
    """A batch norm whose channels can be cut: the units behind its channels, and how much each is scaled."""

    name: str
    """Of the scale's parameter."""
    units: np.ndarray
    """In the graph's count; int64 `[channels]`."""
    channels: np.ndarray
    """Where on the axis each lies; int64 `[channels]`."""
    sizes: np.ndarray
    """|gamma|; float64 `[channels]`."""


@final
@dataclass(frozen=True)
class LayerGroup:
    """Layers that share a threshold."""

    name: str
    scales: tuple[str, ...]
    """Names of their batch norms' scales."""


def scaled_layers(graph: ChannelGraph, model: nn.Module) -> tuple[Layer, ...]:
    """The batch norms of which at least one channel can be cut, in the order of the forward.

    Raises:
        InputError: there is none; says whether norms are missing, or have no scale, or nothing of them can be cut.
        NotFiniteError: a scale is NaN or infinite.
    """
    order = list(dict.fromkeys(name for record in graph.records if (name := scale_name(record)) is not None))
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in order}
    for group in graph.groups:
        for member in group.members if group.fixed is None else ():
            if member.role == "scale" and member.tensor in parts:
                parts[member.tensor].append((group.ids[member.unit].astype(np.int64), member.index.astype(np.int64)))
    found = []
    for name in order:
        if not parts[name]:
            continue
        units, channels = (np.concatenate(sides) for sides in zip(*parts[name], strict=True))
        if not bool(torch.isfinite(weights[name]).all()):
            raise NotFiniteError("score batch norms", found="NaN or infinity", where=name, do="check the weights")
        sizes = weights[name].double().abs().cpu().numpy()[channels]
        sort = np.argsort(channels, kind="stable")
        found.append(Layer(name, units[sort], channels[sort], sizes[sort]))
    if found:
        return tuple(found)
    if order:
        why = "nothing that batch norms scale can be cut"
    elif any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        why = "batch norms without scales, or none that the forward calls"
    else:
        why = "no batch norm: never there, or folded into the convolutions (as in exported models)"
    raise InputError(
        f"scales of {type(model).__name__}",
        found=why,
        do="load the network with its batch norms, or use a method that judges weights (magnitude)",
    )


def groups_by_scale(graph: ChannelGraph, layers: Sequence[Layer]) -> tuple[LayerGroup, ...]:
    """Layers by the scale of their outputs and by where on the way they come: of the backbone the two coarsest scales
    apart and all finer ones together, then the top-down half of a pyramid, then all that follows (its bottom-up half,
    heads).

    Source: the groups of Chu et al. 2022, arXiv:2306.01526 (YOLOv4), as a rule for any network.
    """
    there = {layer.name for layer in layers}
    stages = [stage for stage in stages_of(graph) if any(name in there for name in stage.scales)]
    coarse = sorted({stage.stride for stage in stages if stage.turn == 0})[-FINE:]
    lists: dict[str, list[str]] = {}
    strides: dict[str, set[int]] = {}
    for stage in stages:
        key = "top-down" if stage.turn == 1 else "bottom-up and heads"
        if stage.turn == 0:
            key = f"stride {stage.stride}" if stage.stride in coarse else "fine"
        lists.setdefault(key, []).extend(name for name in stage.scales if name in there)
        strides.setdefault(key, set()).add(stage.stride)
    if "fine" in lists:
        ends = sorted(strides["fine"])
        fine = f"strides {ends[0]} to {ends[-1]}" if len(ends) > 1 else f"stride {ends[0]}"
        lists = {fine if key == "fine" else key: names for key, names in lists.items()}
    return tuple(LayerGroup(key, tuple(names)) for key, names in lists.items())


def groups_given(patterns: Sequence[Sequence[str] | str], layers: Sequence[Layer]) -> tuple[LayerGroup, ...]:
    """Layers in the groups that patterns of module paths or scales' names say (`backbone.*`).

    Raises:
        InputError: a layer in no group or in several, or a group without layers; the layers are listed.
    """
    listed = [(one,) if isinstance(one, str) else tuple(one) for one in patterns]
    groups = []
    for number, each in enumerate(listed):
        names = tuple(layer.name for layer in layers if any(_fits(layer.name, pattern) for pattern in each))
        if not names:
            raise InputError(
                f"group {number + 1} of layers: {', '.join(each)}",
                found="no layer that can be cut",
                do=f"name some of {_some([layer.name for layer in layers])}",
            )
        groups.append(LayerGroup(", ".join(each), names))
    times = {layer.name: sum(layer.name in group.scales for group in groups) for layer in layers}
    for wrong, why in (
        ({n for n, c in times.items() if c == 0}, "no"),
        ({n for n, c in times.items() if c > 1}, "two"),
    ):
        if wrong:
            raise InputError(
                f"{len(groups)} groups of layers",
                found=f"in {why} group{'s' if why == 'two' else ''}: {_some(sorted(wrong))}",
                do="let patterns name every layer that can be cut once",
            )
    return tuple(groups)


def _fits(name: str, pattern: str) -> bool:
    path = name.rpartition(".")[0]
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(path, pattern)


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
