"""Channels cropped before training, by the densities of layers."""

import logging
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, final, get_args

import numpy as np
import torch

from niwaki import budgets, scores
from niwaki.budgets import DensityWidths, Pools, TargetWidths, WidthProgram, choose
from niwaki.budgets.atoms import make_atoms
from niwaki.budgets.choose import priced
from niwaki.budgets.pools import to_limits
from niwaki.budgets.resized import Near, may_grow, resized
from niwaki.budgets.rule import Atoms
from niwaki.errors import BudgetError, InputError, Setting
from niwaki.graph import ChannelGraph, trace
from niwaki.graph.plans import plan_of, times_of
from niwaki.graph.weights import streams, weights_of
from niwaki.methods.job import Job, Method, Outcome, Request
from niwaki.methods.staged import trained
from niwaki.methods.steps import Steps
from niwaki.plan import Plan
from niwaki.scores import Scores, Seen, WeightScore, masks
from niwaki.scores.score import known
from niwaki.surgery import renew_
from niwaki.surgery.cut import eager_door
from niwaki.surgery.renew import Start
from niwaki.units import Budget

log = logging.getLogger(__name__)

Densities = Literal["synexp", "synflow", "snip", "grasp", "random", "erk", "uniform"]
Rule = Literal["auto", "program", "neighbours", "log_fit", "square_root"]
FEW = 8
"""Channels of a layer below which the claim that densities decide is known to fail."""
MOST = 100.0
"""The largest cap: ten times as wide. Without any, cheap layers would take the budget."""
BATCHES = 8
"""Batches that scores with data look at."""
SEEN = ("params", "macs", "bytes")
"""Budgets that are sums of products of widths."""
TOLD = "precropping"
"""What the plan and the report call what was found."""
ATTENTION = ("softmax", "scaled_dot_product")


@final
@dataclass(frozen=True, kw_only=True)
class PreCropping(Method):
    """Crop an untrained network to layer-wise densities, so that its training is cheaper, too.

    Which channels go does not matter, the first stay; how many of each layer do is the method. It reads no data (but
    for snip and grasp), and throws weights away: not for trained networks.

    Source: Cai et al. 2022, arXiv:2203.02549 (v1: densities from pruning at initialisation; v2: from a convex
    program). Differs: the papers' rule from densities to channels is not known; by default the program is solved for
    the channels themselves.
    """

    densities: Densities = "synexp"
    """From where: synexp (the largest expected flow under the budget), the weights that synflow, snip, grasp or random
    numbers leave, erk, or uniform."""
    widths: Rule = "auto"
    """From densities to channels: program (the largest product of densities that crops of coupled channels can have;
    for synexp), neighbours, log_fit, square_root (what is remembered of the paper; narrows the layer before the
    classifier). auto is program for synexp, else neighbours."""
    inside: bool = False
    """Leave streams (what shortcuts add to) whole and crop inside their blocks only."""
    start: Start = "reset"
    """Weights that training starts from: reset (drawn anew by each module), rescale (the kept ones, to their new
    fan-in), slice (the kept ones)."""
    rounds: int = 100
    """Of synflow: how often weights are scored anew."""
    cap: float = 1.0
    """The largest density. Above 1 layers may grow where the budget is better spent there (PreConfig); 4 is double
    width. New units are drawn anew like those of a new network. What lies in grids (heads, groups) does not grow."""
    insist: bool = False
    """Crop a trained network all the same; its training is lost."""

    def __post_init__(self) -> None:
        known(self, densities=get_args(Densities), widths=get_args(Rule), start=get_args(Start))
        if type(self.cap) not in (int, float) or not 1 <= self.cap <= MOST:
            raise InputError(
                f"PreCropping(cap={self.cap!r})",
                found=f"no density from 1 to {MOST:g}",
                do="give 1 (crop only), or more to let layers grow: 4 is double width",
            )
        if type(self.rounds) is not int or self.rounds < 1:
            raise InputError(f"PreCropping(rounds={self.rounds!r})", found="no count", do="give 1 or more")
        if self.widths == "program" and self.densities != "synexp":
            raise InputError(
                f"PreCropping(widths='program', densities={self.densities!r})",
                found="the program finds widths without densities",
                do="take neighbours, log_fit or square_root, or densities='synexp'",
            )
        if self.widths == "square_root":
            log.warning("square_root looks at the producing layer only: worse than one width for all at small budgets")

    def __call__(self, job: Job) -> Outcome:
        """Run the method.

        Raises:
            InputError: a trained network; one without convolutions and linear layers; a score that needs data, or a
                recovery, without a task; teaching, by a teacher that knows nothing.
            BudgetError: of something else than params, macs, bytes or a measured time, or one that can't be met.
        """
        steps = Steps(job, self)
        self._refuse_trained(job)
        graph = trace(job.model, job.example, protect=job.protect)
        steps.done("trace")
        steps.look_before()
        plan, graph = steps.planned(graph, lambda _: self.choosing(job))
        small = steps.cut(job.model, plan)
        renewed = renew_(small, job.model, graph.shapes, how=self.start, seed=job.seed, plan=plan)
        if self.start == "reset" and renewed["rescaled"]:
            log.info("rescaled, having no reset_parameters of their module: %s", ", ".join(renewed["rescaled"]))
        steps.done("renew")
        steps.look("cropped", small, "measure cropped")
        history = steps.recover(small, plan, stage="training", steps=("train", "measure trained"))
        found = {**plan.decided_by[TOLD], "start": {what: list(names) for what, names in renewed.items()}}
        return steps.outcome(small, plan, graph, history=history, details={TOLD: found})

    def _refuse_trained(self, job: Job) -> None:
        why = trained(job)
        if why is not None and not self.insist:
            raise InputError(
                f"PreCropping of a trained {type(job.model).__name__}",
                found=f"{why}; cropping throws its training away",
                do=(
                    "use a method that looks at weights (magnitude, taylor, udfc), start from untrained weights, or ",
                    Setting("insist", True),
                ),
            )

    def refuse(self, wanted: Request) -> None:
        """Refuse a teacher, batches that nothing is done with, scores of data where there are none, and budgets that
        densities know nothing of."""
        if wanted.distill:
            raise InputError("PreCropping with a teacher", found="the uncut network is untrained", do="leave it out")
        if wanted.calibration:
            raise InputError(
                ("PreCropping with ", Setting("calibrate", wanted.calibration, f"calibration={wanted.calibration}")),
                found="batch norm of an untrained network has no statistics to re-estimate",
                do="leave it out",
            )
        score = self._weight_score(0)
        if score is not None and score.needs_data and not wanted.data:
            raise InputError(
                f"PreCropping(densities={self.densities!r}) without data",
                found="its score needs batches",
                do=("give ", Setting("data", written="a task"), ", or use synflow"),
            )
        for budget in wanted.budget:
            if budget.of not in (*SEEN, *budgets.TIMES):
                known = ", ".join((*SEEN, *budgets.TIMES))
                raise BudgetError(f"PreCropping by {budget.of}", found=f"known: {known}", do="use one of them")
            if budget.of in budgets.TIMES and self.cap > 1:
                found = "times are measured of widths up to the network's own"
                raise BudgetError(
                    f"growth by {budget.of}",
                    found=found,
                    do=("take ", Setting("cap", 1.0), ", or a budget of macs or params"),
                )

    def choosing(self, job: Job) -> budgets.Choose:
        """What chooses plans, by widths that the first call finds; see `widths_of` for what is raised."""
        found: list[tuple[TargetWidths, Scores, dict[str, Any], Plan | None]] = []

        def choosing(graph: ChannelGraph, asked: tuple[Budget, ...]) -> Plan:
            graph = priced(graph, asked)
            if not found:
                found.append(self.widths_of(job, graph, asked))
            how, neutral, told, grown = found[0]
            plan = choose(graph, neutral, asked, how=how) if grown is None else _unmeasured(grown)
            self._warn(graph, plan)
            promised = plan.promised
            used = {one: promised[one.of] / max(one.limit(promised[f"{one.of}_before"]), 1e-9) for one in asked}
            told |= {
                "kept": {name: promised[name] / promised[f"{name}_before"] for name in ("params", "macs")},
                "binding": max(used, key=used.__getitem__).of,
                "fixed": dict(plan.decided_by["left_whole"]),
            }
            return replace(plan, decided_by={**plan.decided_by, TOLD: dict(told)})

        return choosing

    def widths_of(
        self, job: Job, graph: ChannelGraph, asked: tuple[Budget, ...]
    ) -> tuple[TargetWidths, Scores, dict[str, Any], Plan | None]:
        """The widths to go to, scores for the groups that may, what is to be told, and the plan where any grow.

        A share of a measured time is taken as one of the MACs; all widths then go on together until the time fits.

        Raises:
            InputError, BudgetError: see `__call__`.
        """
        before = graph.cost(np.ones(graph.units.count, bool))
        summed = tuple(
            replace(b, of="macs", keep=min(1.0, b.limit(before[b.of]) / before[b.of]), absolute=False)
            if b.of in budgets.TIMES
            else b
            for b in asked
        )
        weights = weights_of(graph)
        if not weights:
            raise InputError(
                f"PreCropping of {type(job.model).__name__}",
                found="no convolution or linear layer",
                do="give a network with weights",
            )
        names = tuple(dict.fromkeys(budget.of for budget in summed))
        allowed = self._allowed(graph)
        neutral = Scores(
            {g.name: torch.ones(g.units, dtype=torch.float64) for g in graph.groups if g.name in allowed},
            {"name": "none", "densities": self.densities, "widths": self.rule, "inside": self.inside},
        )
        atoms, skipped = make_atoms(graph, neutral, grids="rows", exact_only=False, bundle="mean")
        pools = budgets.pools_of(graph, atoms, weights, names)
        limits = {name: min(budget.limit(before[name]) for budget in summed if budget.of == name) for name in names}
        densities: np.ndarray | None = None
        if pools.sizes.size and self.rule != "program":
            densities = self._densities(job, pools, {name: limits[name] / before[name] for name in names})
        floors = [b.floor if isinstance(b.floor, float) else b.floor / pools.sizes for b in summed]
        ones = np.ones(pools.sizes.size)
        least = np.minimum(1.0, np.maximum.reduce([atoms.least / pools.sizes, *(ones * floor for floor in floors)]))
        most = np.where(may_grow(graph, atoms), math.sqrt(self.cap), 1.0)
        rigid: list[str] = []
        while True:
            shares, plan = self._shares(pools, densities, limits, least, most), None
            if bool((shares <= 1).all()):
                break
            near = Near(pools, shares, least, most)
            how = {"score": neutral.how, "rule": {"name": "resized", "cap": self.cap}, "grids": "rows"}
            told = {**how, "exact_only": False, "left_whole": dict(sorted(skipped.items()))}
            plan = resized(graph, atoms, near, asked, decided_by=told)
            stuck = np.zeros(0, bool) if eager_door(job.model, plan) is None else self._stuck(job, graph, atoms, plan)
            stuck = stuck & (least < most) if stuck.size else stuck
            if not stuck.any():
                break
            rigid += [name for name, held in zip(atoms.pools, stuck, strict=True) if held]
            least, most = np.where(stuck, 1.0, least), np.where(stuck, 1.0, most)
        if rigid:
            log.warning("left as wide as they are, since the forward holds their widths: %s", ", ".join(rigid))
        found: dict[str, Any] = {
            "densities": None if densities is None else dict(zip(pools.names, densities.tolist(), strict=True)),
            "shares": {name: float(share) for name, share in zip(atoms.pools, shares, strict=True)},
            "grown": {} if plan is None else plan.grows,
            "rigid": rigid,
        }
        return TargetWidths(tuple(np.maximum(shares, 1e-6).tolist())), neutral, found, plan

    def _shares(
        self,
        pools: Pools,
        densities: np.ndarray | None,
        limits: dict[str, float],
        least: np.ndarray,
        most: np.ndarray,
    ) -> np.ndarray:
        """The share of every pool, before it is rounded; float64 `[pools]`."""
        if not pools.sizes.size:
            return np.ones(0)
        if densities is None:
            return WidthProgram()(pools, limits, least=least, most=most)
        rough = DensityWidths(self.rule, one_sided=self.inside)(pools, densities)  # type: ignore[arg-type]
        return to_limits(pools, np.maximum(rough, 1e-4), limits, most)

    def _stuck(self, job: Job, graph: ChannelGraph, atoms: Atoms, plan: Plan) -> np.ndarray:
        """Pools that the eager door can't give their width in this plan, each tried alone; bool `[pools]`."""
        wanted = times_of(graph, plan)
        found = np.zeros(len(atoms.pools), bool)
        for pool in range(found.size):
            times = np.ones_like(wanted)
            members = np.concatenate([atoms.units[number] for number in np.flatnonzero(atoms.pool == pool).tolist()])
            times[members] = wanted[members]
            if (times != 1).any():
                found[pool] = eager_door(job.model, plan_of(graph, times)) is not None
        return found

    @property
    def rule(self) -> str:
        """What `widths` comes to."""
        if self.widths != "auto":
            return self.widths
        return "program" if self.densities == "synexp" else "neighbours"

    def _allowed(self, graph: ChannelGraph) -> set[str]:
        """Groups that may be cropped."""
        stream = streams(graph) if self.inside else np.zeros(graph.units.count, bool)
        free = [group for group in graph.groups if group.fixed is None and not stream[group.ids].any()]
        if any(part in record.name for record in graph.records for part in ATTENTION):
            log.warning("attention: the densities know nothing of it; only exact widths without heads are cropped")
            free = [group for group in free if group.exact and group.kind == "channels"]
        return {group.name for group in free}

    def _weight_score(self, seed: int) -> WeightScore | None:
        """What weights are judged by, where densities are of what it leaves."""
        given: dict[str, WeightScore] = {
            "synflow": scores.SynFlow(rounds=self.rounds),
            "snip": scores.SNIP(),
            "grasp": scores.GraSP(),
            "random": scores.RandomWeights(seed=seed),
        }
        return given.get(self.densities)

    def _densities(self, job: Job, pools: Pools, shares: dict[str, float]) -> np.ndarray:
        """Density of every layer; `shares` of each cost may stay."""
        limits = {
            name: share * float(pools.layers.costs[name if name in pools.layers.costs else "params"].sum())
            for name, share in shares.items()
        }
        limits = {"params" if name == "bytes" else name: limit for name, limit in limits.items()}
        closed: dict[str, budgets.Density] = {
            "synexp": budgets.WaterFilling(self.cap), "erk": budgets.ERK(), "uniform": budgets.EqualDensity()
        }  # fmt: skip
        if self.densities in closed:
            return closed[self.densities](pools.layers, limits)
        how, task = self._weight_score(job.seed), job.task
        assert how is not None
        batches = list(task.calibration(BATCHES, job.seed)) if task is not None and how.needs_data else []
        seen = Seen(job.example, batches, None if task is None else task.loss)
        kept = masks(job.model, pools.names, min(1.0, *shares.values()), how=how, seen=seen)
        found = np.array([max(int(kept[name].sum()), 1) / kept[name].numel() for name in pools.names])
        if empty := [name for name in pools.names if not bool(kept[name].any())]:
            log.warning("%s leaves nothing of %s: they keep what the floor says", self.densities, ", ".join(empty))
        return found

    def _warn(self, graph: ChannelGraph, plan: Plan) -> None:
        """Say where so few channels stay that the method is known to fail."""
        few = [name for name, kept in plan.kept.items() if len(kept) < FEW <= graph.group(name).units]
        if few:
            log.warning("fewer than %d channels stay of %s: there densities alone do not decide", FEW, ", ".join(few))


def _unmeasured(plan: Plan) -> Plan:
    """A plan that grows, without the times that were read off beyond the widths that were measured."""
    read = sorted(set(budgets.TIMES) & set(plan.promised))
    if read:
        log.warning("no %s is promised: layers were measured up to their own widths, and some grow", " or ".join(read))
    return replace(plan, promised={name: value for name, value in plan.promised.items() if name not in read})
