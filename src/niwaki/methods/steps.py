"""What the methods' bodies share: the plan, the judged cut, the recovery, what is measured in between, the outcome."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, final

from torch import nn

from niwaki import budgets
from niwaki.distill import Distilled
from niwaki.errors import CannotCutError, InputError, Setting
from niwaki.files import PLAN, first_process, write_text
from niwaki.graph import ChannelGraph
from niwaki.measure import COUNTS, Measurement, Memory, Meter, RuntimeEnergy, RuntimeLatency, measure
from niwaki.methods.job import Job, Method, Outcome, Request, Stage
from niwaki.plan import Plan
from niwaki.quantize import Quantised
from niwaki.scores.score import describe
from niwaki.surgery import cut, surgery_of, verify
from niwaki.train import Checkpoints, Trainable
from niwaki.train.processes import told_by_first
from niwaki.units import Receipt

log = logging.getLogger(__name__)

RECOVER = ("recover", "measure recovered")
"""What the seconds of a recovery and of the measuring after it are called."""


@final
class Steps:
    """One run of a method on a job: its clock, and what was measured after which step.

    Raises:
        InputError, MissingExtraError, NiwakiError: see `refuse`.
    """

    def __init__(self, job: Job, method: Method) -> None:
        refuse(method, job.wanted)
        self.job, self.method = job, method
        self.seconds: dict[str, float] = {}
        self.stages: list[Stage] = []
        self.before: dict[str, Measurement] = {}
        self.receipt: Receipt | None = None
        self._last = time.perf_counter()

    def done(self, step: str) -> None:
        """`step` is done; the job hears of its seconds."""
        now = time.perf_counter()
        self.seconds[step], self._last = now - self._last, now
        self.job.tell(step, self.seconds[step])

    def look_before(self) -> None:
        """Measure the job's model."""
        self.before = look(self.job.model, self.job)
        self.done("measure before")

    def look(self, stage: str, model: nn.Module, step: str, *, more: Mapping[str, Measurement] | None = None) -> None:
        """Measure the model after a stage; `step` is the measuring itself, and `more` what else is known of it."""
        self.stages.append(Stage(stage, look(model, self.job) | dict(more or {})))
        self.done(step)

    def planned(
        self, graph: ChannelGraph, scored: Callable[[ChannelGraph], budgets.Choose]
    ) -> tuple[Plan, ChannelGraph]:
        """The plan, and the graph with all costs that it was chosen by; of a job that was killed, the plan of then.

        Of several processes the first one scores, measures and chooses; the others wait for its plan.
        With a target the plan promises its latency; where a budget is of latency, what was chosen is measured there,
        and chosen again until the budget is met.

        Args:
            scored: looks at the model as far as is needed, and gives what chooses by that; called where there is no
                plan yet.
        """
        made: list[tuple[Plan, ChannelGraph]] = []

        def make() -> str:
            made.append(self._chosen(graph, scored))
            return made[0][0].to_json()

        text = told_by_first(self.job.model, make)
        return made[0] if made else (Plan.from_json(text), graph)

    def _chosen(
        self, graph: ChannelGraph, scored: Callable[[ChannelGraph], budgets.Choose]
    ) -> tuple[Plan, ChannelGraph]:
        """What `planned` gives in the first process."""
        job = self.job
        plan = kept_plan(job)
        if plan is not None:
            return plan, graph
        choose = scored(graph)
        self.done("score")
        if job.target is None:
            plan = choose(graph, job.budget)
            self.done("choose")
            return plan, graph
        steps = job.steps
        hear = None if steps is None else (lambda number, of, what: steps(number + 1, of, f"measuring {what}"))
        where: dict[str, Any] = {"target": job.target, "table": job.table, "progress": hear}
        graph = budgets.timed(job.model, job.example, graph, **where)
        self.done("measure layers")
        plan, found = budgets.choose_measured(job.model, job.example, graph, job.budget, choose, **where)
        self.done("choose")
        return plan, graph if found is None else found.graph

    def cut(self, model: nn.Module, plan: Plan) -> nn.Module:
        """`model` cut by `plan`, and judged; then a killed job finds the plan.

        Raises:
            CannotCutError: it does not compute what the plan promised.
        """
        small = cut(model, plan)
        self.done("cut")
        self.receipt = judged(self.job, model, small, plan)
        keep_plan(self.job, plan)
        self.done("verify")
        return small

    def recover(
        self, small: nn.Module, plan: Plan, *, stage: str = "recovery", steps: tuple[str, str] = RECOVER
    ) -> dict[str, Any] | None:
        """The history of the job's recovery, if it has one; `small` is trained in place, and measured as `stage`."""
        if self.job.recovery is None:
            return None
        history = recovered(self.job, small, plan)
        self.done(steps[0])
        self.look(stage, small, steps[1])
        return history

    def outcome(
        self,
        small: nn.Module,
        plan: Plan,
        graph: ChannelGraph,
        *,
        history: dict[str, Any] | None = None,
        quantised: dict[str, Quantised] | None = None,
        details: dict[str, Any] | None = None,
        unfolded: tuple[str, ...] = (),
    ) -> Outcome:
        """What the method gives; what was measured last is what the job's model is compared with."""
        assert self.receipt is not None
        surgery = surgery_of(small)
        return Outcome(
            model=small,
            plan=plan.with_mends(surgery.mends, surgery.door),
            receipt=self.receipt,
            before=self.before,
            after=self.stages[-1].measurements,
            stages=tuple(self.stages),
            graph=graph,
            method=describe(self.method),
            job=self.job,
            surgery=surgery,
            history=history,
            seconds=self.seconds,
            quantised=quantised or {},
            details=details or {},
            unfolded=unfolded,
        )


def judged(job: Job, model: nn.Module, small: nn.Module, plan: Plan) -> Receipt:
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
        do=("please report this model; ", Setting("exact_only", True), " or ", Setting("protect"), " may help"),
    )


def recovered(job: Job, small: nn.Module, plan: Plan) -> dict[str, Any]:
    """The history of the job's recovery of `small`, cut by `plan`; the uncut model teaches where the job says so.

    Raises:
        InputError: taps that do not fit.
    """
    assert job.recovery is not None and job.task is not None
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
    plan = Plan.from_json(file.read_text(encoding="utf-8"), file=str(file))
    log.info("the plan is that of %s", file)
    return plan


def keep_plan(job: Job, plan: Plan) -> None:
    """Write down the plan where a killed job looks for it; whole or not at all."""
    if job.partial is not None and first_process():
        job.partial.mkdir(parents=True, exist_ok=True)
        write_text(job.partial / PLAN, plan.to_json())


def refuse(method: Method, wanted: Request) -> None:
    """Refuse what a method can't do whatever the model is: nothing was read or measured yet.

    Raises:
        InputError: a recovery without data; a budget of what is measured, and no target to measure on; a table of
            another machine or target, or that can't be written; what the method itself refuses.
        FileDamagedError: the table is none.
        MissingExtraError: the target's runtime is not installed.
        NiwakiError: there are no counters of energy.
    """
    method.refuse(wanted)
    if wanted.recovery and not wanted.data:
        raise InputError("recovery without data", found="no task", do=("give ", Setting("data", written="a task")))
    need_target(wanted)
    if wanted.target is not None:
        budgets.Table.open(wanted.table, wanted.target.machine())


def need_target(job: Request) -> None:
    """Refuse a budget of what is measured where nothing says on what.

    Raises:
        InputError: there is such a budget, and no target.
        MissingExtraError: the target's runtime is not installed.
        NiwakiError: there are no counters of energy.
    """
    wanted = {budget.of for budget in job.budget} & set(budgets.TIMES)
    there = set() if job.target is None else {job.target.of}
    if wanted - there:
        name = min(wanted - there)
        more = "" if name == "latency" else f", of={name!r}"
        raise InputError(
            (Setting("of", name, f"Budget(of={name!r})"),),
            found=f"a target that measures {min(there)}" if there else "no target to measure on",
            do=("give ", Setting("target", "onnxruntime", f"target=niwaki.measure.Target('onnxruntime'{more})")),
        )
    if job.target is not None:
        job.target.need()


def look(model: nn.Module, job: Job) -> dict[str, Measurement]:
    """Counts, what the budgets are about, and the task's metric where there is one; nothing in all but the first of
    several processes."""
    if not first_process():
        return {}
    wanted = {budget.of for budget in job.budget}
    extra: list[Meter] = [Memory(fused=False)] if "memory" in wanted else []
    if job.target is not None:
        kind = RuntimeLatency if job.target.of == "latency" else RuntimeEnergy
        extra.append(kind(job.target.runtime, batch=job.target.batch, threads=job.target.threads))
    known = {meter.name for meter in job.meters}
    meters = (*COUNTS, *job.meters, *(meter for meter in extra if meter.name not in known))
    found = measure(model, job.example, meters=meters)
    if job.task is not None:
        found |= job.task.metrics(model, limit=job.limit)
    return found
