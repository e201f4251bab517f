"""Which channels of a teacher's feature its cut student still has: read off the plan, wherever the feature comes from.

The plan says which units stay, and the graph which unit each position of a feature is, through sums, concatenations,
splits and views. Nothing here knows a kind of layer.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from niwaki.distill.taps import module_at
from niwaki.errors import InputError
from niwaki.graph import trace
from niwaki.graph.labels import varying
from niwaki.graph.plans import alive_of
from niwaki.graph.trace import fingerprint
from niwaki.graph.values import Value
from niwaki.plan import Plan, decode_example
from niwaki.surgery.evidence import stays_of
from niwaki.units import device_of


@final
@dataclass(frozen=True, eq=False)
class Kept:
    """Positions of a feature that stay, along each axis that gets shorter."""

    path: str
    axes: Mapping[int, Tensor]
    """Axis -> the positions, int64 `[kept]`."""
    sizes: Mapping[int, int]
    """Axis -> how long it was."""

    def of(self, feature: Tensor) -> Tensor:
        """The part of the teacher's `feature` that the student has.

        Raises:
            InputError: it has another shape than the plan's model puts out.
        """
        for axis, index in self.axes.items():
            if axis >= feature.dim() or feature.shape[axis] != self.sizes[axis]:
                raise InputError(
                    f"align the teacher's {self.path}",
                    found=f"shape {tuple(feature.shape)}, where axis {axis} was {self.sizes[axis]} long in the plan",
                    do="give the plan that the student was cut by, and its uncut model as teacher",
                )
            feature = feature.index_select(axis, index.to(feature.device))
        return feature


def kept_at(teacher: nn.Module, plan: Plan, paths: Collection[str]) -> dict[str, Kept]:
    """What stays of the feature of each module of `teacher`, which `plan` cut.

    Raises:
        PlanMismatchError: the plan is for another model.
        UnknownNameError: no such module.
        InputError: a module that is not called exactly once, or whose rows lose different columns; a plan that grows.
    """
    plan.bound(teacher, fingerprint(teacher))
    if plan.grows:
        raise InputError(
            "align features with a wider network's",
            found=f"new units in {', '.join(list(plan.grows)[:3])}, which the teacher does not have",
            do="teach by its outputs alone, without taps",
        )
    graph = (
        plan.graph if plan.graph is not None else trace(teacher, decode_example(plan.example, str(device_of(teacher))))
    )
    stays = stays_of(graph, alive_of(graph, plan))
    names = {id(module): name for name, module in teacher.named_modules()}  # a module under two names has its first
    found = {}
    for path in paths:
        values = graph.features.get(names[id(module_at(teacher, path))], ())
        if len(values) != 1:
            said = (
                f"the teacher's forward calls it {len(values)} times"
                if values
                else "the teacher's forward never reaches it"
            )
            raise InputError(f"tap {path}", found=said, do="tap a module that each forward calls once")
        axes = {} if values[0] is None else _positions(values[0], stays, path)
        sizes = {axis: values[0].shape[axis] for axis in axes} if values[0] is not None else {}
        found[path] = Kept(path, {axis: torch.from_numpy(at) for axis, at in axes.items()}, sizes)
    return found


def _positions(value: Value, stays: np.ndarray, path: str) -> dict[int, np.ndarray]:
    """Axis -> positions that stay, for axes that lose any."""
    found: dict[int, np.ndarray] = {}
    for labels in value.fields:
        lives, axes = stays[labels], varying(labels)
        if lives.all():
            continue
        whole = np.ones((1,) * labels.ndim, bool)
        for axis in axes:
            others = tuple(other for other in range(labels.ndim) if other != axis)
            side = lives.any(axis=others)
            whole = whole & side.reshape([-1 if at == axis else 1 for at in range(labels.ndim)])
            if not side.all():
                before = found.get(axis)
                now = np.flatnonzero(side)
                found[axis] = now if before is None else np.intersect1d(before, now)
        if not np.array_equal(np.broadcast_to(whole, lives.shape), lives):
            raise InputError(
                f"align the teacher's {path}",
                found=f"a grid over axes {axes} whose rows lose different columns",
                do="tap a place where heads and channels lie along one axis",
            )
    return found
