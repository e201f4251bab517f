"""Pruning and quantisation in closed form, without data."""

import logging
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal, final, get_args

import numpy as np
import torch

from niwaki import budgets
from niwaki.budgets import choose
from niwaki.errors import InputError, NothingChangedWarning, Setting
from niwaki.graph import ChannelGraph, trace
from niwaki.graph.plans import alive_of, plan_of
from niwaki.graph.skeleton import copy_with, like
from niwaki.measure import Measurement
from niwaki.methods.job import Job, Method, Outcome, Request, on_grid
from niwaki.methods.steps import Steps
from niwaki.quantize import Uniform, packed_sizes
from niwaki.repair.choice import Choice, Space, channel_scores, site_scores
from niwaki.repair.reconstruction import Rounding, Solver, Work, reconstruct_network
from niwaki.repair.sites import Layer, Site, Structure, structure_of
from niwaki.repair.solvers import How, solver
from niwaki.scores.score import known
from niwaki.surgery import cut
from niwaki.units import Group

log = logging.getLogger(__name__)

FLOAT = 32
"""Bits of weights that stay as they are."""
LOW = 4
"""Below so many bits the closed forms are known to hurt."""


@final
@dataclass(frozen=True, kw_only=True)
class UDFC(Method):
    """Remove channels and round weights; the layers that read them take over what is lost. No data, no training.

    Source: Bai et al. 2023, arXiv:2308.07209. Differs: the paper's equations could not be read; the closed form follows
    from its assumption. Channels are chosen by norms (the paper does not say how), and only where the graph shows that
    others can take them over.
    """

    bits: int = 32
    """Of the weights of convolutions and linear layers: 2 to 8, or 32 to leave them as they are."""
    first_bits: int = 0
    """Of the layer that the forward calls first; 0 is as the others."""
    last_bits: int = 0
    """Of the layer that the forward calls last; 0 is as the others."""
    solve: How = "filter"
    """How channels are taken over: filter (the paper's closed form), filter_positive (no negative coefficients),
    diagonal (each kept channel rescaled), activation (behind the non-linearity, by batch-norm statistics), merge (one
    to one), neuron_merging (as published), or none."""
    bias_weight: float = 0.01
    """What an error of the bias counts beside one of the filter (alpha_1)."""
    ridge: float = 0.008
    """Price of leaving what is there (alpha_2)."""
    select: Choice = "path_norm"
    """Which channels stay: those of the largest folded filters (folded_norm), the same times the norm of what reads
    them (path_norm), those that others can least stand in for (residual), or what is left when the least harmful goes,
    again and again (elimination)."""
    inputs: Literal["white", "fitted"] = "white"
    """For activation: what goes into a layer is taken to be white, or such that its batch norm's variances come out."""
    share: Literal["uniform", "error"] = "uniform"
    """One share for all layers, or shares by the predicted error of removing each channel, compared over layers."""
    per: Literal["channel", "tensor"] = "channel"
    """One step of the weights' grid for each output channel, or one for the layer."""
    symmetric: bool = True
    """Whether the grid lies evenly around zero."""
    grid: Literal["zero", "literal"] = "zero"
    """"literal" is the grid of the authors' sibling method, which has no zero."""

    def __post_init__(self) -> None:
        known(
            self,
            solve=get_args(How),
            select=get_args(Choice),
            share=("uniform", "error"),
            inputs=("white", "fitted"),
            per=("channel", "tensor"),
            grid=("zero", "literal"),
        )
        for name in ("bias_weight", "ridge"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"UDFC({name}={value!r})", found="no price", do="give a number from 0")
        if self.inputs == "fitted" and self.solve != "activation":
            raise InputError(
                f"UDFC(inputs='fitted', solve={self.solve!r})",
                found="only solve='activation' asks how channels go together",
                do="leave inputs out, or take solve='activation'",
            )
        for name in ("bits", "first_bits", "last_bits"):
            bits = getattr(self, name)
            allowed = (*range(2, 9), FLOAT) if name == "bits" else (0, *range(2, 9), FLOAT)
            if type(bits) is not int or bits not in allowed:
                raise InputError(f"UDFC({name}={bits!r})", found="no such width", do="give 2 to 8, or 32 for floats")
            if bits not in (0, FLOAT):
                self.quantiser(bits)

    def quantiser(self, bits: int) -> Uniform:
        return Uniform(bits=bits, symmetric=self.symmetric, per=self.per, grid=self.grid)

    def quantisers(self, layers: tuple[Layer, ...]) -> dict[str, Uniform]:
        """Weight -> how it is rounded, for those that are."""
        bits = [self.bits] * len(layers)
        if layers:
            bits[0], bits[-1] = self.first_bits or bits[0], self.last_bits or bits[-1]
        pairs = zip(layers, bits, strict=True)
        return {layer.weight: self.quantiser(width) for layer, width in pairs if width != FLOAT}

    def refuse(self, wanted: Request) -> None:
        """Refuse a recovery, and batches for a batch norm that is not re-estimated."""
        if wanted.recovery:
            raise InputError(
                "UDFC with a recovery",
                found="it trains nothing, and training would move rounded weights off their grid",
                do="leave the recovery out (--recover), or use a method that is trained after its cut",
            )
        if wanted.calibration:
            raise InputError(
                ("UDFC with ", Setting("calibrate", wanted.calibration, f"calibration={wanted.calibration}")),
                found="it looks at no data: batch norms are mended by their own statistics",
                do="leave it out",
            )

    def __call__(self, job: Job) -> Outcome:
        """Run the method.

        Raises:
            InputError: channels are to go and none can be taken over (attention alone); batch norm that was never
                trained, where its statistics are needed; a recovery, which would undo the rounding.
            NotFiniteError: NaN or infinity among the weights.
        """
        steps = Steps(job, self)
        model = job.model
        rounds = any(bits not in (0, FLOAT) for bits in (self.bits, self.first_bits, self.last_bits))
        graph, refused = _traced(job, rounds=rounds)
        steps.done("trace")
        steps.look_before()
        if self.bits < LOW:
            log.warning("%d bits: below %d the closed forms may hurt; compare with solve=none", self.bits, LOW)
        structure = structure_of(graph)
        rule: budgets.Rule = budgets.Uniform()
        if self.share == "error":
            rule = budgets.GlobalRank(normalise="none" if self.select == "elimination" else "sum")

        def scored(graph: ChannelGraph) -> budgets.Choose:
            # where all layers keep the same share, any order says how many of each; which, each says in its turn
            first: Choice = "folded_norm" if self.share == "uniform" and self.solve != "none" else self.select
            judges = self.fitted and first == self.select
            numbers = channel_scores(
                graph, structure.sites, Work(model, judges), first, space=self.space, bias_weight=self.bias_weight
            )
            return lambda now, budget: choose(now, numbers, budget, how=rule)

        with warnings.catch_warnings():
            if rounds:  # then something changes in any case
                warnings.simplefilter("ignore", NothingChangedWarning)
            widths, graph = steps.planned(graph, scored)
        work, alive, found, rounding = self.rewritten(job, graph, structure, alive_of(graph, widths), self.solver())
        chosen = {"name": self.select, "space": self.space, "bias_weight": self.bias_weight}
        plan = plan_of(graph, alive, budgets=job.budget, decided_by={**widths.decided_by, "score": chosen})
        measured = {name: value for name, value in widths.promised.items() if name.partition("_")[0] in budgets.TIMES}
        plan = replace(plan, promised={**plan.promised, **measured})
        steps.done("reconstruct")
        if job.task is not None and self.solve != "none":  # the same channels, the same grid
            plain, _, _, _ = self.rewritten(job, graph, structure, alive, None)
            steps.look("cut, not repaired", cut(plain, plan), "measure unrepaired")
        small = steps.cut(work, plan)
        codes: dict[str, Measurement] = {}
        if rounding.codes:
            state = {name: tensor.detach() for name, tensor in small.state_dict().items()}
            codes["packed_bytes"] = packed_sizes(state, on_grid(state, rounding.codes))["packed_bytes"]
        steps.look("reconstruction" if self.solve != "none" else "cut", small, "measure", more=codes)
        told = {"repaired": [vars(one) for one in found], "left_whole": refused}
        return steps.outcome(small, plan, graph, quantised=rounding.codes, details=told)

    @property
    def fitted(self) -> bool:
        return self.inputs == "fitted"

    @property
    def space(self) -> Space:
        """Where channels are judged: where they are repaired."""
        return "activation" if self.solve == "activation" else "filter"

    def solver(self) -> Solver | None:
        return solver(self.solve, bias_weight=self.bias_weight, ridge=self.ridge)

    def rewritten(
        self, job: Job, graph: ChannelGraph, structure: Structure, alive: np.ndarray, solve: Solver | None
    ) -> tuple[torch.nn.Module, np.ndarray, list[Any], Rounding]:
        """A copy of the model with its weights rewritten, the units that stay, what was predicted, and the codes."""
        work = copy_with(job.model, lambda tensor: like(tensor, tensor.detach().clone()))
        rounding = Rounding(self.quantisers(structure.layers))

        def reconsider(now: Work, site: Site, alive: np.ndarray) -> np.ndarray:
            """The channels chosen from the layer's weights as they are when its turn comes."""
            plain = [g for g in graph.groups if g.kind == "channels" and g.ids.size == site.units.size]
            if not any(np.array_equal(np.sort(g.ids), np.sort(site.units)) for g in plain):
                return alive
            count = site.units.size - int(alive[site.units].sum())
            numbers = site_scores(now, site, self.select, space=self.space, bias_weight=self.bias_weight, most=count)
            alive = alive.copy()
            alive[site.units] = True
            alive[site.units[np.argsort(numbers, kind="stable")[:count]]] = False
            return alive

        alive, found = reconstruct_network(
            work,
            graph,
            structure,
            alive,
            solve=solve,
            rounding=rounding,
            fitted=self.fitted,
            reconsider=None if solve is None else reconsider,
        )
        return work, alive, found, rounding


def _traced(job: Job, *, rounds: bool) -> tuple[ChannelGraph, dict[str, str]]:
    """The graph with all that can't be repaired protected, and why each such layer is left whole.

    Raises:
        InputError: channels are to go, and none can be repaired.
    """
    graph = trace(job.model, job.example, protect=job.protect)
    sites = structure_of(graph).sites
    refused = {site.weight: site.reason for site in sites if site.reason is not None}
    keeps_all = all(isinstance(budget.keep, float) and budget.keep == 1 for budget in job.budget)
    if len(refused) == len(sites) and not (sites and rounds and keeps_all):
        reasons = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:4])
        raise InputError(
            f"UDFC on {type(job.model).__name__}",
            found=f"no layer whose channels others can take over ({reasons or 'no convolution or linear layer'})",
            do=("use another method, e.g. magnitude, or round alone: ", Setting("keep", 1.0), " and 2 to 8 bits"),
        )
    modules = {name for name, _ in job.model.named_modules()}
    paths = [weight.rpartition(".")[0] for weight in refused]
    protect = [path if path and path in modules else weight for path, weight in zip(paths, refused, strict=True)]
    held = trace(job.model, job.example, protect=(*job.protect, *protect))
    free = {group.name for group in graph.groups if group.fixed is None}
    groups = tuple(
        replace(group, fixed=_why(group, refused)) if group.fixed is not None and group.name in free else group
        for group in held.groups
    )  # of those that the method protects the reason is the method's, not the user's
    return replace(held, groups=groups), refused


def _why(group: Group, refused: dict[str, str]) -> str:
    """Why others can't take over the units of a group."""
    makers = [member.tensor for member in group.members if member.role == "out" and member.tensor in refused]
    return f"others can't take over: {refused[makers[0]]}" if makers else "others can't take over"
