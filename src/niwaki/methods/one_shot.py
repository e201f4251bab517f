"""The common body of one-shot methods: trace, collect, score, choose, cut, verify, fold, repair, recover, measure."""

import logging
import time
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from niwaki import budgets
from niwaki.budgets import choose
from niwaki.budgets.atoms import Blocks, Bundle, Grids
from niwaki.budgets.global_rank import Normalise, Per
from niwaki.distill import Distilled
from niwaki.errors import CannotCutError, InputError
from niwaki.evidence import Need, collect
from niwaki.files import first_process, write_text
from niwaki.graph import ChannelGraph, trace
from niwaki.measure import COUNTS, Measurement, Memory, Meter, RuntimeLatency, measure
from niwaki.methods.job import Job, Method, Outcome, Stage
from niwaki.plan import Plan
from niwaki.repair import BatchNormStatistics, FoldedConstants, repair
from niwaki.scores import Score, Scores, score
from niwaki.scores.score import describe, known
from niwaki.surgery import cut, surgery_of, verify
from niwaki.train import Checkpoints, Trainable
from niwaki.units import Budget, Receipt

log = logging.getLogger(__name__)

PLAN = "plan.json"
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

    def __post_init__(self) -> None:
        choices = {
            "rule": RuleName,
            "normalise": Normalise,
            "per": Per,
            "grids": Grids,
            "bundle": Bundle,
            "blocks": Blocks,
        }
        known(self, **{name: get_args(choice) for name, choice in choices.items()})
        if self.rule == "uniform" and self.per != "unit":
            raise InputError(
                f"{type(self).__name__}(rule='uniform', per={self.per!r})",
                found="uniform compares no groups, so there is nothing to weigh",
                do="use rule='global_rank', or leave per out",
            )

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
        InputError: the score or the folding of constants needs data but the job has no task.
        CannotCutError: the cut model does not compute what the plan promised.
    """
    if method.fold and job.task is None:
        raise InputError(
            f"{type(method).__name__}(fold=True) without data",
            found="it needs batches to take the constants from",
            do="give a task (--data on the command line)",
        )
    need_target(job)
    how = method.score(job.seed)
    done = Clock(job)
    model, example, task = job.model, job.example, job.task
    graph = trace(model, example, protect=job.protect)
    done("trace")
    before = look(model, job)
    done("measure before")
    if Need.GRADIENT in how.needs and task is None:
        raise InputError(
            f"{type(method).__name__} without data",
            found="its score needs gradients",
            do="give a task (--data on the command line)",
        )
    plan = kept_plan(job)
    if plan is None:
        seen = collect(
            model,
            graph,
            how.needs,
            batches=task.calibration(batches, job.seed) if task and Need.GRADIENT in how.needs else None,
            loss=task.loss if task else None,
        )
        numbers = score(graph, seen, how=how)
        done("score")
    if plan is None:
        plan, graph = planned(job, graph, lambda seen, budget: method.choose(seen, numbers, budget), done)
    small = cut(model, plan)
    done("cut")
    receipt = judged(job, model, small, plan)
    keep_plan(job, plan)
    done("verify")
    surgery = surgery_of(small)
    plan = plan.with_mends(surgery.mends, surgery.door)
    stages = [Stage("cut", look(small, job))]
    done("measure cut")
    unfolded: tuple[str, ...] = ()
    if method.fold and task is not None:
        inputs = (task.inputs(b) for b in task.calibration(job.calibration, job.seed))
        unfolded = repair(small, inputs, how=FoldedConstants("mean"), model=model, plan=plan)
        if unfolded:
            log.info("constants not folded into %s", ", ".join(unfolded))
        done("fold")
        stages.append(Stage("folded constants", look(small, job)))
        done("measure folded")
    if job.repair and task is not None:
        used = BatchNormStatistics()(small, (task.inputs(b) for b in task.calibration(job.calibration, job.seed)))
        done("repair")
        if used:
            stages.append(Stage("batch-norm", look(small, job)))
            done("measure repaired")
    history: dict[str, Any] | None = None
    if job.recovery is not None:
        history = recovered(job, small, plan)
        done("recover")
        stages.append(Stage("recovery", look(small, job)))
        done("measure recovered")
    return Outcome(
        model=small,
        plan=plan,
        receipt=receipt,
        before=before,
        after=stages[-1].measurements,
        stages=tuple(stages),
        graph=graph,
        method=describe(method),
        job=job,
        surgery=surgery_of(small),
        history=history,
        seconds=done.seconds,
        unfolded=unfolded,
    )


class Clock:
    """Seconds of a method's stages; the job hears of each."""

    def __init__(self, job: Job) -> None:
        self.job, self.seconds, self.last = job, dict[str, float](), time.perf_counter()

    def __call__(self, stage: str) -> None:
        """`stage` is done."""
        now = time.perf_counter()
        self.seconds[stage], self.last = now - self.last, now
        self.job.tell(stage, self.seconds[stage])


def judged(job: Job, model: Any, small: Any, plan: Plan) -> Receipt:
    """The judge's receipt of `small`, cut from `model`.

    Raises:
        CannotCutError: it does not compute what the plan promised.
    """
    receipt = verify(model, small, plan, job.example, seed=job.seed)
    if receipt.passed:
        return receipt
    raise CannotCutError(
        f"cut {plan.model}",
        found=f"cut and masked outputs differ by {receipt.difference:.3g} in float64 (scale {receipt.scale:.3g})",
        where=f"through the {receipt.door} door",
        do="please report this model; exact_only=True or protect= may help",
    )


def recovered(job: Job, small: Any, plan: Plan) -> dict[str, Any]:
    """The history of the job's recovery of `small`, cut by `plan`; the uncut model teaches where the job says so.

    Raises:
        InputError: the job has no task, or taps that do not fit.
    """
    if job.task is None:
        raise InputError("recovery without data", found="no task", do="give a task (--data on the command line)")
    assert job.recovery is not None
    task: Trainable = job.task
    if job.distill:
        task = Distilled(job.task, job.model, job.distill, plan, small, seed=job.seed)
    small.train()
    how = job.recovery
    if job.partial is not None:
        how = replace(how, folder=str(job.partial / "recovery"), checkpoints=how.checkpoints or Checkpoints())
    history = how(small, task, progress=job.steps, resume=job.partial is not None).to_json()
    small.train(job.model.training)
    return {**history, "settings": job.recovery.to_json()}


def kept_plan(job: Job) -> Plan | None:
    """The plan that this job chose before it was killed."""
    file = None if job.partial is None else job.partial / PLAN
    if file is None or not file.is_file():
        return None
    plan = Plan.from_json(file.read_text(encoding="utf-8"))
    log.info("the plan is that of %s", file)
    return plan


def keep_plan(job: Job, plan: Plan) -> None:
    """Write down the plan where a killed job looks for it; whole or not at all."""
    if job.partial is not None and first_process():
        job.partial.mkdir(parents=True, exist_ok=True)
        write_text(job.partial / PLAN, plan.to_json())


def need_target(job: Job) -> None:
    """Refuse a budget of what is measured where nothing says on what.

    Raises:
        InputError: there is such a budget, and no target.
        MissingExtraError: the target's runtime is not installed.
    """
    wanted = {budget.of for budget in job.budget} & set(budgets.TIMES)
    if wanted and job.target is None:
        raise InputError(
            f"Budget(of={min(wanted)!r})",
            found="no target to measure on",
            do="give target=niwaki.measure.Target('onnxruntime') (--target onnxruntime)",
        )
    if job.target is not None:
        job.target.need()


def planned(job: Job, graph: ChannelGraph, choose: budgets.Choose, done: Clock) -> tuple[Plan, ChannelGraph]:
    """The plan by `choose`, and the graph with all costs that it was chosen by.

    With a target the plan promises its latency; where a budget is of latency, what was chosen is measured there, and
    chosen again until the budget is met.
    """
    if job.target is None:
        plan = choose(graph, job.budget)
        done("choose")
        return plan, graph
    steps = job.steps
    hear = None if steps is None else (lambda number, of, what: steps(number + 1, of, f"measuring {what}"))
    where: dict[str, Any] = {"target": job.target, "table": job.table, "progress": hear}
    graph = budgets.timed(job.model, job.example, graph, **where)
    done("measure layers")
    plan, found = budgets.choose_measured(job.model, job.example, graph, job.budget, choose, **where)
    done("choose")
    return plan, graph if found is None else found.graph


def look(model: Any, job: Job) -> dict[str, Measurement]:
    """Counts, what the budgets are about, and the task's metric where there is one."""
    wanted = {budget.of for budget in job.budget}
    extra: list[Meter] = [Memory(fused=False)] if "memory" in wanted else []
    if job.target is not None:
        extra.append(RuntimeLatency(job.target.runtime, batch=job.target.batch, threads=job.target.threads))
    known = {meter.name for meter in job.meters}
    meters = (*COUNTS, *job.meters, *(meter for meter in extra if meter.name not in known))
    found = measure(model, job.example, meters=meters)
    if job.task is not None:
        found |= job.task.metrics(model, limit=job.limit)
    return found
