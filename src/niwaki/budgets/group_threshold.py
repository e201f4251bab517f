"""Groups of layers with a threshold each, and how coupled layers agree on what goes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import numpy as np
import torch

from niwaki.budgets.atoms import Bundle, Grids, Splits, make_atoms
from niwaki.budgets.choose import priced, stops_of
from niwaki.budgets.layer_groups import Layer, LayerGroup
from niwaki.budgets.rule import Rule
from niwaki.errors import BudgetError, InputError, UnknownNameError
from niwaki.graph import ChannelGraph
from niwaki.graph.plans import alive_of, plan_of
from niwaki.plan import Plan
from niwaki.scores import Scores
from niwaki.scores.score import describe
from niwaki.units import Budget

Meet = Literal["majority", "union", "least", "mean"]
FLAT = 1e-9
"""Slope where a measured rise is flat, so that of equal rises the smaller scale goes first."""


@final
@dataclass(frozen=True)
class GroupThreshold:
    """When each channel goes, as all thresholds rise together: scores for `choose`, comparable over the network.

    At pace 1 a group of n scales loses its floor(n p) smallest. A scale of rank r (from 0; of equal ones the later
    layer and channel first) goes at pace (r + 1) / (n p), so that a budget is met by one pace for all groups. With
    `rises` the pace is the rise of the loss that masking so large a share of the group alone brings.

    Source: Chu et al. 2022, arXiv:2306.01526, official code (thresholds by group, vote of coupled layers). Differs: the
    code removes one more of each group (`strict`), computes two of its five thresholds from buffers that are mostly
    zeros, and votes at the thresholds only; its fractions 0.97 and 0.865 are not what it removes.

    Raises:
        InputError: a fraction outside [0, 1), neither fractions nor rises, or both.
        UnknownNameError: an unknown way to agree.
    """

    fractions: tuple[float, ...] = ()
    """p of each group: the share that goes at pace 1; 0 leaves a group whole."""
    meet: Meet = "majority"
    """How coupled layers agree: a channel goes where more than half of them let it go (majority, ties stay), where all
    do (union of what is kept), as the layer says that loses most at pace 1, or by the median of
    all rises (least), or by the mean of their scales
    (mean; it is then ranked in the group that most of them are in)."""
    strict: bool = False
    """As the authors' code compares: only what is above the floor(n p)-th smallest stays, one less than said above."""
    rises: tuple[tuple[float, ...], ...] = ()
    """Of each group, what the loss rises by when 1/k, 2/k, ... k/k of its smallest scales are masked."""

    def __post_init__(self) -> None:
        if self.meet not in get_args(Meet):
            raise UnknownNameError.of("way to agree", self.meet, get_args(Meet))
        if bool(self.fractions) == bool(self.rises):
            found = "both" if self.rises else "neither"
            raise InputError("GroupThreshold by fractions or rises", found=found, do="give one of them")
        for fraction in self.fractions:
            if not 0 <= fraction < 1:
                raise InputError(
                    f"GroupThreshold(fractions={self.fractions})",
                    found=f"{fraction} is no share in [0, 1)",
                    do="give the share of each group that goes at pace 1",
                )
        if any(not rises or not all(map(math.isfinite, rises)) for rises in self.rises):
            raise InputError(f"GroupThreshold(rises={self.rises})", found="no finite numbers", do="measure them again")

    def __call__(self, graph: ChannelGraph, layers: Sequence[Layer], groups: Sequence[LayerGroup]) -> Scores:
        """The pace at which each unit goes, for every group of units that has scales and may go.

        Raises:
            InputError: not as many groups of layers as fractions, or a layer in no group.
        """
        if len(groups) != len(self.fractions or self.rises):
            raise InputError(
                f"{len(groups)} groups of layers",
                found=f"{len(self.fractions or self.rises)} fractions",
                where="; ".join(f"{group.name}: {len(group.scales)} layers" for group in groups),
                do="give one for each group",
            )
        home = {name: number for number, group in enumerate(groups) for name in group.scales}
        if lost := [layer.name for layer in layers if layer.name not in home]:
            raise InputError("thresholds by group", found=f"{lost[0]} is in no group", do="name every layer once")
        unit = np.concatenate([layer.units for layer in layers])
        size = np.concatenate([layer.sizes for layer in layers])
        owner = np.repeat(np.arange(len(layers)), [layer.units.size for layer in layers])
        group = np.array([home[layer.name] for layer in layers])[owner]
        if self.meet == "mean":
            unit, size, group, owner = _means(unit, size, group, owner, len(groups))
        pace = np.concatenate([np.zeros(0), *(self.paces(size[group == g], g) for g in range(len(groups)))])
        place = np.concatenate([np.zeros(0, np.int64), *(np.flatnonzero(group == g) for g in range(len(groups)))])
        when = np.empty(pace.size)
        when[place] = pace
        values = {}
        of_unit = [np.flatnonzero(np.isin(unit, found.ids)) for found in graph.groups]
        for found, mine in zip(graph.groups, of_unit, strict=True):
            if found.fixed is None and mine.size:
                agreed = self._agreed(found.ids, unit[mine], when[mine], owner[mine])
                if np.isfinite(agreed).all():
                    values[found.name] = torch.from_numpy(agreed)
        how = {"name": "group_threshold", "meet": self.meet, "strict": self.strict,
               "fractions": list(self.fractions), "rises": [list(rises) for rises in self.rises],
               "groups": {group.name: list(group.scales) for group in groups}}  # fmt: skip
        return Scores(values, how, tuple(g.name for g in graph.groups if g.fixed is None and g.name not in values))

    def paces(self, sizes: np.ndarray, group: int) -> np.ndarray:
        """The pace at which each scale of a group goes, float64 `[scales]`; infinite where none does."""
        order = np.lexsort((-np.arange(sizes.size), sizes))  # of equal ones the earlier stays
        rank = np.empty(sizes.size)
        rank[order] = np.arange(sizes.size)
        share = (rank + 1) / max(sizes.size, 1)
        if self.rises:
            rises = np.maximum.accumulate(np.maximum([0.0, *self.rises[group]], 0.0))
            found = np.interp(share, np.linspace(0, 1, rises.size), rises)
            return np.asarray(found + FLAT * share * max(rises[-1], FLAT))
        if self.fractions[group] == 0:
            return np.full(sizes.size, np.inf)
        if self.strict:
            share = np.searchsorted(np.sort(sizes), sizes, side="left") / max(sizes.size, 1)
        return np.asarray(share / self.fractions[group])

    def _agreed(self, ids: np.ndarray, unit: np.ndarray, when: np.ndarray, owner: np.ndarray) -> np.ndarray:
        """One pace for each unit of a group from what its layers say; float64 `[units]`."""
        if self.meet == "least":
            level = 1.0 if self.fractions else float(np.median(when))  # rises have the units of a loss: no pace is 1
            losses = {one: int((when[owner == one] <= level).sum()) for one in dict.fromkeys(owner.tolist())}
            whole = [one for one in losses if np.isin(ids, unit[owner == one]).all()]
            chosen = max(whole or losses, key=lambda one: losses[one])
            keep = owner == chosen
            unit, when = unit[keep], when[keep]
        order = np.lexsort((when, unit))
        unit, when = unit[order], when[order]
        starts = np.searchsorted(unit, ids, side="left")
        counts = np.searchsorted(unit, ids, side="right") - starts
        place = counts - 1 if self.meet == "union" else counts // 2
        found = np.full(ids.size, np.inf)
        has = counts > 0
        found[has] = when[(starts + place)[has]]
        return found


def _means(
    unit: np.ndarray, size: np.ndarray, group: np.ndarray, owner: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One scale for each unit: the mean of its layers' (unit, |gamma|, group of most layers, first layer)."""
    units, first, place = np.unique(unit, return_index=True, return_inverse=True)
    mean = np.bincount(place, weights=size) / np.bincount(place)
    votes = np.zeros((units.size, groups), np.int64)
    np.add.at(votes, (place, group), 1)
    order = np.argsort(first, kind="stable")  # in the order of layers and channels, as ties ask for
    return units[order], mean[order], votes.argmax(1)[order], owner[first][order]


def at_pace(
    graph: ChannelGraph,
    scores: Scores,
    budgets: tuple[Budget, ...],
    *,
    how: Rule | None = None,
    pace: float = 1.0,
    grids: Grids = "rows",
    splits: Splits = "free",
    bundle: Bundle = "mean",
    exact_only: bool = False,
) -> Plan:
    """The plan in which all that goes up to a pace goes, as far as floors and multiples allow, and nothing else: the
    fractions as they are, whatever budgets would allow. Budgets must hold all the same.

    Args:
        how: whose priorities are the paces; the scores themselves, if none. Of `Uniform` a pace of 1 - q keeps the
            share q of every layer, rounded up.
        bundle: the pace of units that only go together (a row of a grid, with even splits one of each half): their
            mean, or with "max" that of the last, so that nothing goes whose own pace is later.

    Raises:
        BudgetError: one does not.
    """
    graph = priced(graph, budgets)
    atoms, skipped = make_atoms(graph, scores, grids=grids, exact_only=exact_only, bundle=bundle, splits=splits)
    paces = atoms.score if how is None else how(atoms)
    multiple = int(np.lcm.reduce([budget.multiple for budget in budgets]))
    alive = np.ones(graph.units.count, bool)
    for pool in range(len(atoms.pools)):
        mine = np.flatnonzero(atoms.pool == pool)
        order = mine[np.lexsort((-mine, paces[mine]))]
        wanted = int((paces[mine] <= pace * (1 + 1e-12)).sum())
        stops, _ = stops_of(atoms, order, int(atoms.least[pool]), budgets, multiple)
        fitting = stops[stops <= wanted]
        for atom in order[: fitting[-1] if fitting.size else 0].tolist():
            alive[atoms.units[atom]] = False
    after, before = graph.cost(alive), graph.cost(np.ones_like(alive))
    for budget in budgets:
        if after[budget.of] > budget.limit(before[budget.of]):
            raise BudgetError(
                f"{budget.of} <= {budget.limit(before[budget.of]):.0f}",
                found=f"the fractions as they are leave {after[budget.of]:.0f} of {before[budget.of]:.0f}",
                do="raise the fractions, or let them be scaled to the budget",
            )
    told = {"score": scores.how, "rule": {"name": "at_pace", "pace": pace, "of": how and describe(how)}, "grids": grids,
            "exact_only": exact_only, "left_whole": dict(sorted(skipped.items()))}  # fmt: skip
    return plan_of(graph, alive, budgets=budgets, decided_by=told, grids=grids)


def realised(
    graph: ChannelGraph, plan: Plan, layers: Sequence[Layer], groups: Sequence[LayerGroup]
) -> list[dict[str, Any]]:
    """What a plan really removes of each group of layers, in channels, as plain data."""
    alive = alive_of(graph, plan)
    known = {layer.name: layer for layer in layers}
    found = []
    for group in groups:
        mine = [known[name] for name in group.scales if name in known]
        before = sum(layer.units.size for layer in mine)
        after = sum(int(alive[layer.units].sum()) for layer in mine)
        found.append({"group": group.name, "layers": len(mine), "channels": before, "kept": after})
    return found
