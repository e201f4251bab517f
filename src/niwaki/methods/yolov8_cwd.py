"""The framework for YOLOv8: sparsity-aware training, one share of every layer, channel-wise distillation."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

from torch import nn

from niwaki import budgets, scores
from niwaki.budgets import Layer, LayerGroup, at_pace, choose, realised, scaled_layers
from niwaki.distill import ChannelWise, Weighted
from niwaki.errors import InputError, Setting
from niwaki.evidence import Need, collect
from niwaki.graph import ChannelGraph
from niwaki.graph.stages import stages_of
from niwaki.methods.job import Job
from niwaki.methods.staged import Staged, in_multiples
from niwaki.plan import Plan
from niwaki.pressure import Pressure, Slimming
from niwaki.scores import score
from niwaki.scores.score import known
from niwaki.tasks import Task
from niwaki.units import Budget

log = logging.getLogger(__name__)

Schedule = Literal["decreasing", "increasing", "constant"]


@final
@dataclass(frozen=True, kw_only=True)
class YOLOv8CWD(Staged):
    """Train under pressure, cut every layer by the same share of its scales, tune, and let the dense network teach.

    For any network with batch norm, not only YOLOv8. A network that is not trained is trained first.

    Source: Sabaghian et al. 2025, arXiv:2509.12918 (as its reviews tell it; its tables and its temperature and weight
    could not be read). Differs: coupled layers decide by the mean of their scales; what removed channels still put out
    is folded; the rate falls, as the formula says, not rises, as the words do; the share is what the budget asks for;
    inner layers of a detector's head are cut as all others, where the paper's sizes suggest that its head was cut in
    part: protect the head (`model.22`), or its box branches (`model.22.cv2.*`), to leave them.
    """

    rate: float = 1e-4
    """s of the pressure; 1e-4 to 2e-4 are usual, 1e-3 is known to cost accuracy."""
    schedule: Schedule = "decreasing"
    """Of the rate over the epochs: decreasing to a tenth, increasing from a tenth, or constant."""
    shifts: float = 0.0
    """Of a like pressure on the norms' shifts, times the rate; 10 in public code."""
    share: float = 0.0
    """Every layer keeps this share, rounded up (the paper's rule with 0.5), and the budgets must hold; 0 finds the
    largest share that the budgets allow."""
    multiple: int = 8
    """Every cut layer keeps a multiple of this many channels; runtimes are known to gain nothing from odd widths."""
    temperature: float = 4.0
    """Of channel-wise distillation."""
    alpha: float = 5.0
    """Its weight, in all; each place has an equal part. 0 leaves the teacher out."""
    places: tuple[str, ...] = ()
    """Paths of the modules whose outputs are compared; none means those that close the stages of the neck (of the
    backbone, where there is no neck)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known(self, schedule=get_args(Schedule))
        Slimming(self.rate, self.schedule, self.shifts)
        ChannelWise(self.temperature)
        if not 0 <= self.alpha < float("inf"):
            raise InputError(f"YOLOv8CWD(alpha={self.alpha!r})", do="give 0 or more")
        if not 0 <= self.share <= 1:
            raise InputError(f"YOLOv8CWD(share={self.share!r})", do="give what every layer keeps, in (0, 1], or 0")
        if type(self.multiple) is not int or self.multiple < 1:
            raise InputError(f"YOLOv8CWD(multiple={self.multiple!r})", do="give a whole number from 1")

    def pressure(self, graph: ChannelGraph, layers: Sequence[Layer]) -> Pressure:
        return Slimming(self.rate, self.schedule, self.shifts, tuple(layer.name for layer in layers))

    def losses(self, graph: ChannelGraph) -> tuple[Weighted, ...]:
        if self.alpha == 0:
            return ()
        places = self.places or neck(graph)
        if not places:
            raise InputError(
                "places to distil at",
                found="no module whose output closes a stage of the forward",
                do=("name modules: ", Setting("places", written="places=('model.15', 'model.18')"), ", or ",
                    Setting("alpha", 0.0)),
            )  # fmt: skip
        return (Weighted(ChannelWise(self.temperature), self.alpha / len(places), taps=places),)

    def choose(self, graph: ChannelGraph, model: nn.Module, task: Task | None, job: Job) -> budgets.Choose:
        if self.multiple == 1 and any(budget.of in budgets.TIMES for budget in job.budget):
            log.warning("a budget of time with multiple=1: cases are known that got slower; try 8 or 16")
        evidence = collect(model, graph, frozenset({Need.WEIGHT}))
        numbers = score(graph, evidence, how=scores.NormScale(merge="mean"))

        def choosing(now: ChannelGraph, asked: tuple[Budget, ...]) -> Plan:
            held = in_multiples(asked, self.multiple)
            more: dict[str, Any] = {"grids": self.grids, "splits": "even", "exact_only": self.exact_only}
            if self.share:
                return at_pace(now, numbers, held, pace=1 - self.share, how=budgets.Uniform(), **more)
            return choose(now, numbers, held, how=budgets.Uniform(), **more)

        return choosing

    def told(self, graph: ChannelGraph, plan: Plan, sparse: nn.Module) -> dict[str, Any]:
        layers = scaled_layers(graph, sparse)
        alone = [LayerGroup(layer.name, (layer.name,)) for layer in layers]
        return {"layers": [{"layer": one["group"], "channels": one["channels"], "kept": one["kept"]}
                           for one in realised(graph, plan, layers, alone)]}  # fmt: skip


def neck(graph: ChannelGraph) -> tuple[str, ...]:
    """The modules that close the stages of the first way up and the first way down again behind a backbone; those that
    close the backbone's own stages where there is nothing behind it.
    """
    stages = [stage for stage in stages_of(graph) if stage.place is not None]
    chosen = [stage.place for stage in stages if stage.turn in (1, 2)] or [stage.place for stage in stages]
    return tuple(dict.fromkeys(place for place in chosen if place is not None))
