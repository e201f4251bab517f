"""The common body of one-shot methods: from the trace over the cut and its repair to what is measured at the end."""

import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

from niwaki import budgets
from niwaki.budgets import choose
from niwaki.budgets.atoms import Blocks, Bundle, Grids
from niwaki.budgets.global_rank import Normalise, Per
from niwaki.errors import InputError, Setting
from niwaki.evidence import Need, collect
from niwaki.graph import ChannelGraph, trace
from niwaki.methods.job import Job, Method, Outcome, Request
from niwaki.methods.steps import Steps
from niwaki.plan import Plan
from niwaki.repair import BatchNormStatistics, FoldedConstants, LeastSquares, repair
from niwaki.repair.least_squares import Inputs
from niwaki.repair.readers import need_modules
from niwaki.scores import Score, Scores, score
from niwaki.scores.score import known
from niwaki.units import Budget

log = logging.getLogger(__name__)

RuleName = Literal["global_rank", "uniform"]


@dataclass(frozen=True, kw_only=True)
class OneShot(Method):
    """What one-shot methods share: settings of the rule, of grids and of the repair. A method adds its score.

    Raises:
        InputError: an unknown choice, or a setting of the ranking where the rule has none.
    """

    rule: RuleName = "global_rank"
    """"global_rank" (one ranking over the network) or "uniform" (one share for all groups)."""
    normalise: Normalise = "max"
    """For global_rank: divide scores by their group's mean, largest or sum before comparing groups."""
    per: Per = "unit"
    """For global_rank: compare scores as they are, or per multiply-add or parameter that removing the unit saves."""
    grids: Grids = "rows"
    """Where an axis is a grid: whole rows (heads, groups) or equally many columns of every row."""
    bundle: Bundle = "mean"
    """How the scores of the units of a row (or column of every row) become one."""
    blocks: Blocks = "keep"
    """Residual blocks that can be left out whole: keep them, let them go beside channels, or let nothing else go."""
    exact_only: bool = False
    """Leave groups whole whose removal changes more than zeroing does."""
    fold: bool = False
    """Move the mean that removed units put out, over the calibration batches, into the next layers' biases (needs a
    task). It saves what a network without batch norm loses at the cut; batch-norm re-estimation does the same where
    every reader has a batch norm behind it, so it is off unless asked for."""
    refit: bool = False
    """Refit what the next layers read, by least squares over the calibration batches, so that units that stay tell what
    removed ones told (needs a task); it folds the constants, too. A pass over the batches more, and much of what the
    cut costs before any training."""
    refit_inputs: Inputs = "whole"
    """For refit: inputs of the uncut network, or then, of all layers in turn, those of the network as it is cut and
    refitted so far (cut): longer, and much better where there are residual branches. See `LeastSquares`."""

    def __post_init__(self) -> None:
        choices = {
            "rule": RuleName,
            "normalise": Normalise,
            "per": Per,
            "grids": Grids,
            "bundle": Bundle,
            "blocks": Blocks,
            "refit_inputs": Inputs,
        }
        known(self, **{name: get_args(choice) for name, choice in choices.items()})
        if self.rule == "uniform" and self.per != "unit":
            raise InputError(
                (f"{type(self).__name__} with ", Setting("rule", "uniform"), " and ", Setting("per", self.per)),
                found="uniform compares no groups, so there is nothing to weigh",
                do=("use ", Setting("rule", "global_rank"), ", or leave ", Setting("per"), " out"),
            )
        if self.fold and self.refit:
            raise InputError(
                (f"{type(self).__name__} with ", Setting("fold", True), " and ", Setting("refit", True)),
                found="a refit folds the constants, too",
                do=("leave ", Setting("fold"), " out"),
            )
        if self.refit_inputs != "whole" and not self.refit:
            raise InputError(
                (f"{type(self).__name__} with ", Setting("refit_inputs", self.refit_inputs)),
                found="nothing is refitted",
                do=("give ", Setting("refit", True), ", or leave ", Setting("refit_inputs"), " out"),
            )
        self.score(0)  # its settings, too, are refused now

    def refuse(self, wanted: Request) -> None:
        """Refuse what needs data where there are none."""
        found = ""
        if Need.GRADIENT in self.score(0).needs:
            asked: tuple[str | Setting, ...] = (f"{type(self).__name__} without data",)
            found = "its score needs gradients"
        elif self.fold or self.refit:
            asked = (f"{type(self).__name__} with ", Setting("fold" if self.fold else "refit", True), " without data")
            found = f"it needs batches to {'take the constants from' if self.fold else 'refit layers to'}"
        if found and not wanted.data:
            raise InputError(asked, found=found, do=("give ", Setting("data", written="a task")))

    @abstractmethod
    def score(self, seed: int) -> Score:
        """What units are judged by; `seed` is for what draws numbers."""

    def choose(self, graph: ChannelGraph, numbers: Scores, budget: tuple[Budget, ...]) -> Plan:
        """The plan by the method's rule."""
        rule: budgets.Rule = budgets.Uniform()
        if self.rule == "global_rank":
            rule = budgets.GlobalRank(normalise=self.normalise, per=self.per)
        return choose(
            graph,
            numbers,
            budget,
            how=rule,
            exact_only=self.exact_only,
            grids=self.grids,
            bundle=self.bundle,
            blocks=self.blocks,
        )


def one_shot(job: Job, method: OneShot, *, batches: int = 16) -> Outcome:
    """Run the method's score on a job, with its rule and repair.

    Args:
        batches: of training data, for scores that need gradients.

    Raises:
        InputError: the score, the folding or the refit needs data but the job has no task.
        CannotCutError: the cut model does not compute what the plan promised.
    """
    steps = Steps(job, method)
    how = method.score(job.seed)
    model, example, task = job.model, job.example, job.task
    graph = trace(model, example, protect=job.protect)
    steps.done("trace")
    steps.look_before()

    def scored(graph: ChannelGraph) -> budgets.Choose:
        seen = collect(
            model,
            graph,
            how.needs | {Need.WEIGHT},  # weights that are no numbers are refused, whatever is read of them
            batches=task.calibration(batches, job.seed) if task and Need.GRADIENT in how.needs else None,
            loss=task.loss if task else None,
            seed=job.seed,
        )
        numbers = score(graph, seen, how=how)
        return lambda now, budget: method.choose(now, numbers, budget)

    plan, graph = steps.planned(graph, scored)
    small = steps.cut(model, plan)
    if method.fold or method.refit:  # told before anything is measured
        need_modules(small, "fold constants" if method.fold else "refit layers")
    steps.look("cut", small, "measure cut")
    unfolded: tuple[str, ...] = ()
    if (method.fold or method.refit) and task is not None:
        inputs = (task.inputs(b) for b in task.calibration(job.calibration, job.seed))
        settle = job.recovery is None  # training goes further from norms with the spread that they had
        refit = LeastSquares(seed=job.seed, inputs=method.refit_inputs, settle=settle)
        how_taken = FoldedConstants("mean") if method.fold else refit
        unfolded = repair(small, inputs, how=how_taken, model=model, plan=plan)
        if unfolded:
            log.info("%s: %s", "constants not folded into" if method.fold else "not refitted", ", ".join(unfolded))
        steps.done("fold" if method.fold else "refit")
        if method.fold:
            steps.look("folded constants", small, "measure folded")
        else:
            steps.look("refitted layers", small, "measure refitted")
    if job.repair and task is not None:
        used = BatchNormStatistics()(small, (task.inputs(b) for b in task.calibration(job.calibration, job.seed)))
        steps.done("repair")
        if used:
            steps.look("batch-norm", small, "measure repaired")
    history = steps.recover(small, plan)
    return steps.outcome(small, plan, graph, history=history, unfolded=unfolded)
