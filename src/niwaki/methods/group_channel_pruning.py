"""Group channel pruning and spatial attention distilling."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

from torch import nn

from niwaki import budgets
from niwaki.budgets import (
    GroupThreshold,
    Layer,
    LayerGroup,
    at_pace,
    choose,
    groups_by_scale,
    groups_given,
    loss_rises,
    realised,
    scaled_layers,
)
from niwaki.budgets.group_threshold import Meet
from niwaki.distill import BoxOutputs, Heads, OutputTaught, SpatialAttention, Weighted, covering
from niwaki.errors import BudgetError, InputError, Setting
from niwaki.graph import ChannelGraph
from niwaki.graph.stages import stages_of, stride_at
from niwaki.methods.job import Job
from niwaki.methods.staged import Staged
from niwaki.plan import Plan
from niwaki.pressure import LocalDecay, Pressure, Slimming
from niwaki.scores.score import known
from niwaki.tasks import Task
from niwaki.units import Budget

log = logging.getLogger(__name__)

Pressing = Literal["local", "groups", "global", "constant"]
PUBLISHED = 416
"""Pixels of the pictures that the published weights of places are for."""
FEW = 10
"""Classes below which the authors' detectors lost little without sparse training."""
BATCHES = 4
"""Batches that the groups' losses are measured on."""


@final
@dataclass(frozen=True, kw_only=True)
class GroupChannelPruning(Staged):
    """Sparse training that lets go of large scales, a threshold for each group of layers, tuning, attention distilling.

    The dense network teaches by its attention maps. For any network with batch norm. A network that is not trained is
    trained first.

    Source: Chu et al. 2022, arXiv:2306.01526, and its official code (YOLOv4). Differs: exactly the fractions go, of
    buffers that are filled rightly; coupled layers keep their floor after the vote; the layers before an upsampling, a
    pyramid pooling, a depthwise layer and a split are cut as well; the penalty is added once a step; the teacher is
    always in evaluation mode; attention maps are compared by sums over positions. How the fractions were found is not
    said: they are measured here unless given. Trainings are `Recovery`'s, not the authors' recipe: SGD of lr 1e-4 and
    momentum 0.937, cosine to a twentieth, a warm-up of 3 epochs or 500 steps in which the momentum rises, too,
    gradients of 64 pictures a step, growing masks of bars over pictures and no shifts, 416 pixels.
    """

    sparse_epochs: int = 200
    """Of training under pressure; 200 in the published curves."""
    tune_epochs: int = 50
    """Of ordinary training after the cut; 20 to 50 in the authors' words."""
    distil_epochs: int = 50
    """Of training after that in which the dense network teaches."""
    rate: float = 1e-3
    """s of the pressure, once a step; 1e-4 loses less accuracy, the authors say."""
    pressing: Pressing = "local"
    """local: after the switch the largest scales of all keep hundredths of it; groups: the largest of each group of
    layers; global: all scales do; constant: none."""
    switch: float = 0.4
    """Share of the sparse epochs up to and with which the pressure is uniform."""
    quantile: float = 0.65
    """Share of all scales that keep all of it afterwards."""
    protected: float = 0.01
    """What the others keep of it."""
    groups: tuple[str, ...] = ()
    """A pattern of module paths for each group of layers; none finds groups by the scale of outputs."""
    fractions: tuple[float, ...] = ()
    """Share of each group's scales that goes, relative to the others': they are scaled to the budget together. None
    measures what each group costs the loss, and cuts where it costs equally little."""
    literal: bool = False
    """Take the fractions as they are; the budgets must hold all the same (found out after the sparse training). Parts
    of a split lose as many as each of them would, so that nothing above its threshold goes."""
    meet: Meet = "majority"
    """How coupled layers agree: majority (ties stay), union, least, or mean (of their scales)."""
    floor: float = 0.01
    """Share of its channels that every layer keeps at least, rounded up."""
    least: int = 1
    """Channels that every layer keeps at least; 16 in the authors' code for layers below 100 channels."""
    backbone: float = 1e6
    """Weight of the attention places in the backbone, but for its coarsest stage; 0 leaves them out."""
    coarsest: float = 1e3
    """Weight of those at the coarsest scale."""
    pyramid: float = 1e4
    """Weight of the others."""
    backbone_places: tuple[str, ...] = ()
    """Module paths; where no places are given at all, they are the modules that close the stages of the forward, but
    for a lone first layer."""
    coarsest_places: tuple[str, ...] = ()
    """Module paths."""
    pyramid_places: tuple[str, ...] = ()
    """Module paths."""
    things: bool = False
    """Compare the maps where things lie only, in detections (an option of the authors' code)."""
    outputs: float = 0.0
    """Weight of what the dense detector's heads put out, classes and boxes alike (an option of the authors' code, with
    1e-3 for YOLOv4 and 1e-2 for YOLOv3); 0 leaves it out."""
    temperature: float = 3.0
    """Of their classes."""
    resolution_free: bool = True
    """Sum over positions, with weights that come to the published ones on pictures of 416 pixels, whatever the size is;
    else the mean as published, which rises as pictures get smaller until nothing else is learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known(self, pressing=get_args(Pressing), meet=get_args(Meet))
        LocalDecay(self.rate, self.switch, self.quantile, self.protected)
        if self.fractions:
            GroupThreshold(self.fractions, self.meet)
        elif self.literal:
            raise InputError("GroupChannelPruning(literal=True)", found="no fractions", do="give fractions, too")
        BoxOutputs(self.temperature)
        for name in ("backbone", "coarsest", "pyramid", "outputs"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"GroupChannelPruning({name}={getattr(self, name)!r})", do="give 0 or more")
        if not 0 < self.floor <= 1 or type(self.least) is not int or self.least < 1:
            found = f"floor={self.floor!r}, least={self.least!r}"
            raise InputError("GroupChannelPruning's floor", found=found, do="give a share in (0, 1] and a count from 1")

    def pressure(self, graph: ChannelGraph, layers: Sequence[Layer]) -> Pressure:
        names = tuple(layer.name for layer in layers)
        if self.pressing == "constant":
            return Slimming(self.rate, scales=names)
        if self.pressing == "groups":
            sets = tuple(group.scales for group in self.layer_groups(graph, layers))
            return LocalDecay(self.rate, self.switch, self.quantile, self.protected, sets)
        quantile = self.quantile if self.pressing == "local" else 0.0
        return LocalDecay(self.rate, self.switch, quantile, self.protected, (names,))

    def losses(self, graph: ChannelGraph) -> tuple[Weighted, ...]:
        how = SpatialAttention(over="sum" if self.resolution_free else "mean", things=self.things)
        found = []
        for weight, places in zip((self.backbone, self.coarsest, self.pyramid), self.places(graph), strict=True):
            if weight and self.resolution_free:
                found += [Weighted(how, weight * (stride_at(graph, p) / PUBLISHED) ** 2, taps=(p,)) for p in places]
            elif weight and places:
                found.append(Weighted(how, weight, taps=places))
        return tuple(found)

    def advise(self, task: Task) -> None:
        classes = getattr(getattr(task, "detector", None), "classes", FEW)
        if classes < FEW and self.sparse_epochs:
            log.warning("detectors of fewer than %d classes (here %d) may need no sparse training, the authors report: "
                        "compare with sparse_epochs=0", FEW, classes)  # fmt: skip

    def taught(self, task: Task, dense: nn.Module) -> Task | OutputTaught:
        if self.things and covering(task) is None:
            raise InputError(
                "GroupChannelPruning(things=True)",
                found=f"a {type(task).__name__}, whose batches do not say where things lie",
                do=("use it in a detection, or ", Setting("things", False)),
            )
        if not self.outputs:
            return task
        heads = getattr(task, "detector", None)
        if not isinstance(heads, Heads):
            raise InputError(
                f"GroupChannelPruning(outputs={self.outputs})",
                found=f"a {type(task).__name__} without heads that are known",
                do=("use a detector of darknet: or ultralytics:, or ", Setting("outputs", 0.0)),
            )
        return OutputTaught(task, dense, BoxOutputs(self.temperature, self.outputs, self.outputs), heads)

    def places(self, graph: ChannelGraph) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Modules whose maps are compared: in the backbone, at the coarsest scale, elsewhere."""
        given = (self.backbone_places, self.coarsest_places, self.pyramid_places)
        if any(given):
            return given
        every = stages_of(graph)
        stem = len(every) > 1 and len(every[0].scales) == 1  # a lone first layer sees edges, not things
        stages = [stage for stage in every[stem:] if stage.place is not None and stage.turn <= 2]
        deep = max((stage.stride for stage in stages), default=1)
        parts: tuple[list[str], list[str], list[str]] = ([], [], [])
        for stage in stages:
            parts[1 if stage.stride == deep else 0 if stage.turn == 0 else 2].append(str(stage.place))
        first, second, third = (tuple(dict.fromkeys(part)) for part in parts)
        return first, second, third

    def layer_groups(self, graph: ChannelGraph, layers: Sequence[Layer]) -> tuple[LayerGroup, ...]:
        """The groups that share a threshold."""
        return groups_given(self.groups, layers) if self.groups else groups_by_scale(graph, layers)

    def choose(self, graph: ChannelGraph, model: nn.Module, task: Task | None, job: Job) -> budgets.Choose:
        layers = scaled_layers(graph, model)
        groups = self.layer_groups(graph, layers)
        if self.fractions:
            how = GroupThreshold(self.fractions, self.meet)
        elif task is None:
            how = GroupThreshold((0.5,) * len(groups), self.meet)
        else:
            batches = task.calibration(BATCHES, job.seed)
            how = GroupThreshold(
                rises=loss_rises(model, layers, groups, batches=batches, loss=task.loss), meet=self.meet
            )
        paces = how(graph, layers, groups)

        def choosing(now: ChannelGraph, asked: tuple[Budget, ...]) -> Plan:
            more: dict[str, Any] = {"grids": self.grids, "splits": "even", "exact_only": self.exact_only}
            floors = (
                Budget(keep=1.0, of="units", floor=float(self.floor)),
                Budget(keep=1.0, of="units", floor=self.least),
            )
            if self.literal:
                try:
                    return at_pace(now, paces, (*asked, *floors), bundle="max", **more)
                except BudgetError as error:  # how coupled layers vote may change with the scales, and so what goes
                    if task is not None:
                        raise
                    log.warning("by the scales of now the fractions miss the budget: %s", error)
            return choose(now, paces, (*asked, *floors), how=budgets.GlobalRank(normalise="none"), **more)

        return choosing

    def told(self, graph: ChannelGraph, plan: Plan, sparse: nn.Module) -> dict[str, Any]:
        layers = scaled_layers(graph, sparse)
        groups = self.layer_groups(graph, layers)
        return {"layer_groups": realised(graph, plan, layers, groups), "mixed": mixed(graph, groups)}


def mixed(graph: ChannelGraph, groups: Sequence[LayerGroup]) -> dict[str, list[str]]:
    """Groups of units whose layers are in several groups of layers -> which voted."""
    home = {name: group.name for group in groups for name in group.scales}
    found = {}
    for group in graph.groups:
        voted = {home[m.tensor] for m in group.members if m.role == "scale" and m.tensor in home}
        if len(voted) > 1:
            found[group.name] = sorted(voted)
    return found
