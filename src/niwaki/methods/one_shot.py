"""The common body of one-shot methods: trace, collect, score, choose, cut, verify, repair, recover, measure."""

import logging
import time
from typing import Any, Literal

from niwaki import budgets
from niwaki.budgets import choose
from niwaki.errors import CannotCutError, InputError
from niwaki.evidence import Need, collect
from niwaki.graph import trace
from niwaki.measure import COUNTS, Measurement, measure
from niwaki.methods.job import Job, Method, Outcome, Stage
from niwaki.repair import BatchNormStatistics
from niwaki.scores import Score, score
from niwaki.scores.score import describe
from niwaki.surgery import cut, surgery_of, verify

log = logging.getLogger(__name__)

RuleName = Literal["global_rank", "uniform"]
Grids = Literal["rows", "columns"]
Normalise = Literal["none", "mean", "max", "sum"]


def one_shot(
    job: Job,
    method: Method,
    how: Score,
    *,
    rule: RuleName,
    grids: Grids,
    exact_only: bool,
    normalise: Normalise = "max",
    batches: int = 16,
    bundle: Literal["sum", "mean", "max"] = "mean",
) -> Outcome:
    """Run a score and a rule on a job.

    Raises:
        InputError: the score needs gradients but the job has no task; an unknown rule.
        CannotCutError: the cut model does not compute what the plan promised.
    """
    if rule not in ("global_rank", "uniform"):
        raise InputError(f"rule {rule!r}", found="known: global_rank, uniform", do="use one of them")
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[stage] = now - clock
        clock = now
        job.tell(stage, seconds[stage])

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
    seen = collect(
        model,
        graph,
        how.needs,
        batches=task.calibration(batches, job.seed) if task and Need.GRADIENT in how.needs else None,
        loss=task.loss if task else None,
    )
    numbers = score(graph, seen, how=how)
    done("score")
    chosen: budgets.Rule = budgets.Uniform() if rule == "uniform" else budgets.GlobalRank(normalise=normalise)
    plan = choose(graph, numbers, job.budget, how=chosen, exact_only=exact_only, grids=grids, bundle=bundle)
    done("choose")
    small = cut(model, plan)
    done("cut")
    receipt = verify(model, small, plan, example, seed=job.seed)
    if not receipt.passed:
        raise CannotCutError(
            f"cut {plan.model}",
            found=f"cut and masked outputs differ by {receipt.difference:.3g} in float64 (scale {receipt.scale:.3g})",
            where=f"through the {receipt.door} door",
            do="please report this model; exact_only=True or protect= may help",
        )
    done("verify")
    surgery = surgery_of(small)
    plan = plan.with_mends(surgery.mends, surgery.door)
    stages = [Stage("cut", look(small, job))]
    done("measure cut")
    if job.repair and task is not None:
        used = BatchNormStatistics()(small, (task.inputs(b) for b in task.calibration(job.calibration, job.seed)))
        done("repair")
        if used:
            stages.append(Stage("batch-norm", look(small, job)))
            done("measure repaired")
    history: dict[str, Any] | None = None
    if job.recovery is not None:
        if task is None:
            raise InputError("recovery without data", found="no task", do="give a task (--data on the command line)")
        small.train()
        history = job.recovery(small, task, progress=job.steps).to_json()
        small.train(model.training)
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
        seconds=seconds,
    )


def look(model: Any, job: Job) -> dict[str, Measurement]:
    """Counts, and the task's metric where there is one."""
    found = measure(model, job.example, meters=(*COUNTS, *job.meters))
    if job.task is not None:
        metric = job.task.evaluate(model, limit=job.limit)
        found[metric.name] = metric
    return found
