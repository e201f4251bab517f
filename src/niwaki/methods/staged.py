"""The common body of methods of several trainings: dense, sparse, then, after the cut, tuned and taught."""

import logging
import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, final, get_args

import torch
from torch import nn

from niwaki import budgets
from niwaki.budgets import Layer, scaled_layers
from niwaki.distill import Distilled, OutputTaught, Weighted
from niwaki.distill.taps import module_at
from niwaki.errors import InputError, NothingChangedWarning, Setting
from niwaki.graph import ChannelGraph, trace
from niwaki.graph.skeleton import copy_with, like
from niwaki.methods.job import Job, Method, Outcome, Request
from niwaki.methods.steps import Steps
from niwaki.plan import Plan
from niwaki.pressure import Pressure
from niwaki.repair import BatchNormStatistics, FoldedConstants, LeastSquares, repair
from niwaki.repair.least_squares import Inputs
from niwaki.scores.score import known
from niwaki.surgery import surgery_of
from niwaki.surgery.cut import eager_door
from niwaki.tasks import Task
from niwaki.train import Checkpoints, Recovery
from niwaki.units import Budget

log = logging.getLogger(__name__)

DENSE, SPARSE, TUNE, DISTIL = "dense", "sparse", "tune", "distil"
ROWS = {DENSE: "dense training", SPARSE: "sparse training", TUNE: "fine-tuning", DISTIL: "distillation"}
"""What the reports call the trainings."""
DECAYED = "weights"
"""What the weight decay of every training is on."""
QUIET = 0.01
"""A scale this far below the median of all counts as gone; none there means that the pressure was too weak."""
RISING = 3
"""Epochs in a row with a rising loss that are worth a warning."""


@dataclass(frozen=True, kw_only=True)
class Staged(Method):
    """What methods of several trainings share. Each training has its folder of checkpoints in a run, so that a killed
    run goes on in the training that it was killed in; 0 epochs leave a training out.

    The job's recovery, where there is one, says how all of them train, but for `decayed` (no training has weight decay
    on norms and biases), and how many epochs the last of them has.

    Raises:
        InputError: epochs below 0.
    """

    trains: ClassVar[bool] = True
    dense_epochs: int = 100
    """Of ordinary training before all else, of networks that are not trained yet; others leave it out."""
    sparse_epochs: int = 100
    """Of training under pressure."""
    tune_epochs: int = 100
    """Of ordinary training after the cut."""
    distil_epochs: int = 100
    """Of training after that in which the dense network teaches."""
    fold: Literal["shift", "mean", "refit", "none"] = "shift"
    """What removed channels still put out goes into what reads them: as if their scales were zero (shift), by their
    mean over the calibration batches (mean), as far as channels that stay tell it there (refit), or not at all."""
    refit_inputs: Inputs = "whole"
    """For refit: inputs of the uncut network, or then, of all layers in turn, those of the network as it is cut and
    refitted so far (cut). See `LeastSquares`."""
    grids: Literal["rows", "columns"] = "rows"
    """Where an axis is a grid: whole rows or equally many columns of every row."""
    exact_only: bool = False
    """Leave groups whole whose removal changes more than zeroing does."""

    def __post_init__(self) -> None:
        known(self, fold=("shift", "mean", "refit", "none"), grids=("rows", "columns"), refit_inputs=get_args(Inputs))
        if self.refit_inputs != "whole" and self.fold != "refit":
            raise InputError(
                (f"{type(self).__name__} with ", Setting("refit_inputs", self.refit_inputs)),
                found="nothing is refitted",
                do=("give ", Setting("fold", "refit"), ", or leave ", Setting("refit_inputs"), " out"),
            )
        for name in ("dense_epochs", "sparse_epochs", "tune_epochs", "distil_epochs"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise InputError(f"{type(self).__name__}({name}={value!r})", do="give 0 or more epochs")

    @abstractmethod
    def pressure(self, graph: ChannelGraph, layers: Sequence[Layer]) -> Pressure:
        """What the sparse training presses with."""

    @abstractmethod
    def losses(self, graph: ChannelGraph) -> tuple[Weighted, ...]:
        """By what the dense network teaches, places among it; none leave the teacher out."""

    def taught(self, task: Task, dense: nn.Module) -> Task | OutputTaught:
        """The task whose loss the last training has, before the losses at places: the given one, or one that looks at
        what the dense network's heads put out.

        Raises:
            InputError: they are asked for, and not known.
        """
        return task

    def advise(self, task: Task) -> None:
        """Say what is known of such tasks, before anything is trained."""

    @abstractmethod
    def choose(self, graph: ChannelGraph, model: nn.Module, task: Task | None, job: Job) -> budgets.Choose:
        """What chooses by the scales of `model`; without a task, as well as can be without data (to see whether the
        budgets can be met)."""

    def told(self, graph: ChannelGraph, plan: Plan, sparse: nn.Module) -> dict[str, Any]:
        """What the report says of the plan."""
        return {}

    @property
    def after(self) -> tuple[int, int, int]:
        """Epochs of the trainings that follow the dense one."""
        return self.sparse_epochs, self.tune_epochs, self.distil_epochs

    def asked(self, job: Job) -> Self:
        """With the epochs of the job's recovery, where there is one, for the last training."""
        last = next((stage for stage in (DISTIL, TUNE, SPARSE, DENSE) if getattr(self, f"{stage}_epochs")), None)
        if job.recovery is None or last is None:
            return self
        more: dict[str, Any] = {f"{last}_epochs": job.recovery.epochs}
        return replace(self, **more)

    def refuse(self, wanted: Request) -> None:
        """Refuse to train without data."""
        if not wanted.data:
            raise InputError(
                f"{type(self).__name__} without data",
                found="it trains before and after the cut",
                do=("give ", Setting("data", written="a task")),
            )
        if wanted.distill and not self.distil_epochs:
            raise InputError(
                f"{type(self).__name__} with losses of distillation",
                found=(Setting("distil_epochs", 0), ": no training that the dense network teaches in"),
                do=("give it epochs, or leave out ", Setting("distill", written="the losses")),
            )

    def __call__(self, job: Job) -> Outcome:
        """Run the method.

        Raises:
            InputError: no task to train on; nothing that batch norms scale; places that are none.
            BudgetError: the budgets can't be met; said before anything is trained.
        """
        if (asked := self.asked(job)) != self:
            return asked(job)
        steps = Steps(job, self)
        task = job.task
        assert task is not None
        graph = trace(job.model, job.example, protect=job.protect)
        steps.done("trace")
        layers = scaled_layers(graph, job.model)
        for one in self.losses(graph) if self.distil_epochs else ():
            for _, path in one.pairs:
                module_at(job.model, path)
        if self.distil_epochs:
            self.taught(task, job.model)
        self.advise(task)
        if not set(budgets.TIMES) & {budget.of for budget in job.budget}:  # what is measured, is known afterwards
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NothingChangedWarning)
                self._refuse_rewritten(job, graph, self.choose(graph, job.model, None, job)(graph, job.budget))
        why = None if job.drawn else trained(job)
        if job.recovery is not None and not any(self.after) and (why is not None or not self.dense_epochs):
            raise InputError(
                f"{type(self).__name__} with settings of training",
                found="every training has 0 epochs" if why is None else f"0 epochs, and no dense training: {why}",
                do=("give epochs to one, such as ", Setting("tune_epochs", 20), ", or leave out the recovery"),
            )
        trainings = Trainings(self, job, steps)

        dense = job.model
        if why is None and self.dense_epochs:
            dense = owned(job.model)
            trainings(DENSE, dense, task)
        elif why is None:
            log.warning("the network is not trained, and dense_epochs=0: it can't teach well")
        if steps.stages:
            steps.before = steps.stages[-1].measurements
        else:
            steps.look_before()
        sparse = dense
        if self.sparse_epochs:
            sparse = owned(dense)
            trainings(SPARSE, sparse, task, pressure=self.pressure(graph, layers))
            warn_of_scales(dense, sparse, layers, trainings.histories[SPARSE])

        plan, graph = steps.planned(graph, lambda now: self.choose(now, sparse, task, job))
        small = steps.cut(sparse, plan)
        steps.look("cut", small, "measure cut")
        unfolded = self._repaired(job, task, steps, sparse, small, plan)
        if self.tune_epochs:
            trainings(TUNE, small, task)
        taught: dict[str, float] = {}
        if self.distil_epochs:
            eager = steps.receipt is not None and steps.receipt.door == "eager"
            losses = (*(self.losses(graph) if eager else ()), *job.distill)
            base = self.taught(task, dense) if eager else task
            last: Task | OutputTaught | Distilled = base
            if losses:
                last = Distilled(base, dense, losses, plan, small, seed=job.seed)
            for looked in (last, base):
                if isinstance(looked, Distilled | OutputTaught):
                    taught |= shares_of(looked, small, job)
            trainings(DISTIL, small, last)
        details = {**self.told(graph, plan, sparse), "trainings": trainings.histories, "losses_at_first": taught}
        history = next(reversed(trainings.histories.values()), None)
        return steps.outcome(small, plan, graph, history=history, unfolded=unfolded, details=details)

    def _refuse_rewritten(self, job: Job, graph: ChannelGraph, plan: Plan) -> None:
        """Refuse, before anything is trained, a network that can be cut as a rewritten graph only, where its own
        modules are needed afterwards.
        """
        if self.fold == "none" and not (self.distil_epochs and self.losses(graph)):
            return
        why = eager_door(job.model, plan)
        if why is not None:
            raise InputError(
                f"{type(self).__name__} of {type(job.model).__name__}",
                found=f"it can be cut as a rewritten graph only, whose modules are others: {why}",
                do=("protect that layer, or leave out folding and teaching: ", Setting("fold", "none"), ", ",
                    Setting("distil_epochs", 0)),
            )  # fmt: skip

    def _repaired(
        self, job: Job, task: Task, steps: Steps, sparse: nn.Module, small: nn.Module, plan: Plan
    ) -> tuple[str, ...]:
        """Constants folded and batch norm estimated again, as asked for; layers that could not take their constant."""
        unfolded: tuple[str, ...] = ()

        def inputs() -> list[Any]:
            return [task.inputs(batch) for batch in task.calibration(job.calibration, job.seed)]

        if surgery_of(small).door != "eager":  # its modules are not those that were tried at first
            log.warning("cut as a rewritten graph: constants are not folded, and places inside can't be compared")
        elif self.fold != "none":
            batches = inputs()[:1] if self.fold == "shift" else inputs()
            refit = LeastSquares(
                seed=job.seed, inputs=self.refit_inputs, settle=not (self.tune_epochs or self.distil_epochs)
            )
            how = refit if self.fold == "refit" else FoldedConstants(self.fold)
            unfolded = repair(small, batches, how=how, model=sparse, plan=plan)
            if unfolded:
                log.info("%s: %s", "not refitted" if self.fold == "refit" else "constants not folded into",
                         ", ".join(unfolded))  # fmt: skip
            steps.done("fold")
            steps.look("refitted layers" if self.fold == "refit" else "folded constants", small, "measure folded")
        if job.repair:
            BatchNormStatistics()(small, inputs())
            steps.done("repair")
            steps.look("batch-norm", small, "measure repaired")
        return unfolded


@final
class Trainings:
    """The trainings of one run, each with its own folder, history and row of measurements.

    None of them has weight decay on norms and biases: decay on scales is a pressure of its own, and where only some
    trainings had it, what they do to scales could not be compared.

    Source: the optimiser of Chu et al. 2022, arXiv:2306.01526, official code (decay on convolutions' weights only).
    """

    def __init__(self, method: Staged, job: Job, steps: Steps) -> None:
        self.job, self.steps = job, steps
        if job.recovery is not None and job.recovery.decayed != DECAYED and job.recovery.weight_decay:
            log.info("no weight decay on norms and biases in any training of %s", type(method).__name__)
        self.how = replace(job.recovery or Recovery(), decayed=DECAYED)
        self.epochs: dict[str, int] = {stage: getattr(method, f"{stage}_epochs") for stage in ROWS}
        self.histories: dict[str, dict[str, Any]] = {}

    def __call__(self, stage: str, model: nn.Module, task: Any, *, pressure: Pressure | None = None) -> None:
        """Train `model` in place, from the newest checkpoint of this stage where there is one, and measure it."""
        job, how = self.job, replace(self.how, epochs=self.epochs[stage])
        if pressure is not None:  # no end before the schedule's
            watch = None if how.validation is None else replace(how.validation, patience=None)
            how = replace(how, validation=watch)
            said = {name: value for name, value in vars(pressure).items() if name not in ("scales", "sets")}
            name = type(pressure).__name__
            log.info("%s %s, once in each of the optimiser's steps (%d batches)", name, said, how.accumulate)
        if job.partial is not None:
            how = replace(how, folder=str(job.partial / stage), checkpoints=how.checkpoints or Checkpoints())
        elif how.folder is not None:
            how = replace(how, folder=f"{how.folder}/{stage}")
        mode = model.training
        history = how(model, task, progress=job.steps, resume=job.partial is not None, pressure=pressure)
        model.train(mode)
        settings = replace(how, folder=None, checkpoints=None).to_json()
        self.histories[stage] = {**history.to_json(), "settings": settings}
        self.steps.done(ROWS[stage])
        self.steps.look(ROWS[stage], model, f"measure after {ROWS[stage]}")


def owned(model: nn.Module) -> nn.Module:
    """A copy with its own tensors."""
    return copy_with(model, lambda tensor: like(tensor, tensor.detach().clone()))


def trained(job: Job) -> str | None:
    """Why the network of a job seems to be trained, or None: its weights came from somewhere, or a batch norm counted
    batches. A network without batch norm in memory can't be told from an untrained one.
    """
    if job.weights not in ("", "random"):
        return f"weights from {job.weights}"
    for name, module in job.model.named_modules():
        count = getattr(module, "num_batches_tracked", None)
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or not isinstance(count, torch.Tensor):
            continue
        if not count.is_meta and int(count) > 0:
            return f"{name} has seen {int(count)} batches"
    return None


def in_multiples(budget: Sequence[Budget], multiple: int) -> tuple[Budget, ...]:
    """Budgets under which every cut group keeps a multiple of `multiple`, besides their own."""
    return tuple(replace(one, multiple=math.lcm(one.multiple, multiple)) for one in budget)


def shares_of(task: Distilled | OutputTaught, small: nn.Module, job: Job) -> dict[str, float]:
    """The parts of a taught loss on one batch, before the first step: how they compare. The network is as before."""
    buffers = {name: tensor.clone() for name, tensor in small.named_buffers()}  # batch norms count while they train
    with torch.no_grad():
        parts = task.parts(small, task.calibration(1, job.seed)[0])
        for name, tensor in small.named_buffers():
            tensor.copy_(buffers[name])
    found = {name: float(value) for name, value in parts.items()}
    log.info("loss at first: %s", ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return found


def warn_of_scales(dense: nn.Module, sparse: nn.Module, layers: Sequence[Layer], history: dict[str, Any]) -> None:
    """Say where the pressure was too weak to tell channels apart, or so strong that it broke what it pressed."""
    named, before = dict(sparse.named_parameters()), dict(dense.named_parameters())
    sizes = {layer.name: named[layer.name].detach().abs() for layer in layers}
    every = torch.cat([size.flatten() for size in sizes.values()])
    weak = not bool((every < QUIET * every.median()).any())
    if weak:
        log.warning("no scale is below %g of their median: the pressure was weak, and pruning will be destructive; "
                    "raise its rate or its epochs", QUIET)  # fmt: skip
    gone = [
        name for name, size in sizes.items() if float(size.max()) < QUIET * float(before[name].detach().abs().max())
    ]
    if gone:
        log.warning("all scales of %s collapsed: try a tenth of the rate", ", ".join(gone[:4]))
    losses = [epoch["loss"] for epoch in history["epochs"]]
    rising = [all(losses[i + k + 1] > losses[i + k] for k in range(RISING)) for i in range(len(losses) - RISING)]
    if any(rising):
        advice = "the pressure was weak, so try a lower learning rate" if weak else "try a tenth of the rate"
        log.warning("the loss rose for %d epochs in a row under pressure: %s", RISING, advice)
