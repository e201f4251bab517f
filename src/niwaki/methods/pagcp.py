"""Global channel pruning of networks with several tasks, judged by each task's own loss."""

import hashlib
import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from niwaki import budgets
from niwaki.budgets.atoms import Grids
from niwaki.budgets.choose import priced
from niwaki.errors import BudgetError, BudgetMissedWarning, InputError, NothingChangedWarning, Setting
from niwaki.evidence import Need, collect
from niwaki.files import SEARCH
from niwaki.graph import ChannelGraph, trace
from niwaki.graph.plans import alive_of, plan_of
from niwaki.graph.skeleton import copy_with, like, named_tensors
from niwaki.methods.job import Job, Method, Outcome, Request
from niwaki.methods.steps import Steps, recovered
from niwaki.plan import Plan, apply_cuts
from niwaki.repair import BatchNormStatistics
from niwaki.scores.score import describe, fitting
from niwaki.search import Found, Geometric, Greedy, Masked, best_share
from niwaki.search.greedy import PARTS, Choice, Gate, Scan
from niwaki.search.masked import Statistics
from niwaki.search.state import State
from niwaki.surgery import cut, surgery_of
from niwaki.train.processes import told_by_first
from niwaki.units import share_down, share_up, tensors_in

log = logging.getLogger(__name__)

TOLD = "search"
"""What the report calls what was searched and found."""
SHOWN = 4
GIB = 1 << 30


@final
@dataclass(frozen=True, kw_only=True)
class PAGCP(Method):
    """Cut groups one after the other, each as far as no task's loss rises more than its allowance.

    Costly groups come first where allowances shrink or are equal, last where they grow: theirs are the largest either
    way.
    A task's loss on fixed training batches is the judge; several tasks (or parts of a loss) each have a say. With a
    recovery, rounds of search and training go on until the budget holds. Where allowances end before the budget, the
    outcome is what was reached, with a warning.

    Source: Ye et al. 2023, arXiv:2303.11923 (TPAMI 2023). Differs from the public code: shares are counted in integers
    (there a float's floor takes one channel less), and by the share itself, not by its place in a list; a group that
    bears every share is cut before later ones are judged (there they are judged with it whole); of equal channels no
    more go than asked; the channels that were tested are those that go; losses are of training batches (there: of the
    validation set that is reported); candidates are masked, not built.
    """

    searches: ClassVar[bool] = True

    initial_rate: float = 0.05
    """Allowed relative rise of a loss at the first group (d_0): 0.05 is five percent."""
    initial_thres: float = 5.0
    """What all groups together may multiply a loss by, before training (D); above 1 + initial_rate. Asked with exp."""
    exp: bool = False
    """Allowances shrink or grow geometrically so that together they allow initial_thres; else each is initial_rate."""
    topk: float = 1.0
    """Share of all groups whose cut is kept: those that cost least loss for what they save."""
    prunemethod: Literal["L1", "L2"] = "L1"
    """Norm of the filters that says which channels of a group go first."""
    gate: Gate = "all"
    """Whose loss may not rise too much: all tasks', or that of the task that the group's first cut hurts most
    (selected), as the paper draws it; then the bound holds for no task."""
    rounds: int = 5
    """Most rounds of search and training; more than one need a recovery."""
    rate_slope: float = 0.0
    """Added to initial_rate in each further round."""
    thres_slope: float = 0.0
    """Added to initial_thres in each further round."""
    batches: int = 16
    """Training batches that losses are summed over; the paper's kind of search wants 1000 pictures or more."""
    scan: Scan = "grid"
    """Shares of a group that are tried: in turn to the first that is too much (grid), or by halving (bisect): fewer
    evaluations, the same end where the loss grows with the share."""
    round_to: int = 1
    """What stays of a group is a multiple of this, where it has that many."""
    relative: bool = True
    """For topk: take tasks' rises in shares of their losses; else as they are, weighted as the tasks are."""
    grids: Grids = "rows"
    """Where an axis is a grid: whole rows (heads, groups) or equally many columns of every row."""
    exact_only: bool = False
    """Leave groups whole whose removal changes more than zeroing does."""
    statistics: Statistics = "running"
    """What batch norms normalise by while candidates are judged: what they ran up in training, as published, or what
    each batch itself has (batch): losses are then nearer to those after statistics are estimated again (ours)."""
    memory: float = 2.0
    """GiB that may be held of what earlier layers put out, so that it is not computed again."""

    def __post_init__(self) -> None:
        fitting(self)
        if not 0 < self.topk <= 1:
            raise InputError((Setting("topk", self.topk),), found="no share", do=("give e.g. ", Setting("topk", 0.8)))
        for name, what in (("rounds", "no round"), ("batches", "no batch"), ("round_to", "no multiple")):
            if getattr(self, name) < 1:
                asked = ("PAGCP with ", Setting(name, getattr(self, name)))
                raise InputError(asked, found=f"that is {what}", do="give a whole number from 1")
        self.allowances(0)
        try:  # a later round's are refused before the first is searched
            for number in range(1, self.rounds):
                self.allowances(number)
        except InputError as error:
            slopes = Setting("rate_slope", self.rate_slope), " and ", Setting("thres_slope", self.thres_slope)
            found = f"no allowances for round {number + 1} ({error})"
            raise InputError(
                slopes, found=found, do=("give smaller ones, or fewer ", Setting("rounds", number))
            ) from error
        if not 0 <= self.memory < math.inf:
            asked = ("PAGCP with ", Setting("memory", self.memory))
            raise InputError(asked, found="that is no amount of GiB", do="give GiB, 0 to hold nothing")

    def allowances(self, number: int) -> Geometric:
        """Of a round, the first being 0."""
        return Geometric(
            initial_rate=self.initial_rate + self.rate_slope * number,
            initial_thres=self.initial_thres + self.thres_slope * number,
            exp=self.exp,
        )

    def refuse(self, wanted: Request) -> None:
        """Refuse a search without losses, and one by what can't be counted."""
        if not wanted.data:
            do = ("give ", Setting("data", written="a task"))
            raise InputError("PAGCP without data", found="it judges cuts by losses", do=do)
        for budget in wanted.budget:
            if budget.of in budgets.TIMES:
                instead = "take macs or params; measured times are reported all the same"
                raise BudgetError(f"PAGCP by {budget.of}", found="it searches by what can be counted", do=instead)

    def __call__(self, job: Job) -> Outcome:
        """Run the method.

        Raises:
            InputError: no task to judge by; a loss that is 0 or negative at the start, or is another one when asked
                again.
            NotFiniteError: a loss is NaN or infinite at the start, or a weight is.
            BudgetError: a budget of what is measured; nothing that can be cut; no group that bears any cut.
            FileDamagedError: what a killed search left can't be read.
        """
        steps = Steps(job, self)
        assert job.task is not None
        graph = priced(trace(job.model, job.example, protect=job.protect), job.budget)
        collect(job.model, graph, frozenset({Need.WEIGHT}))  # refuses weights that are no numbers
        steps.done("trace")
        steps.look_before()
        batches = job.task.calibration(self.batches, job.seed)
        state = self._state(job, graph, batches)
        model, plan = job.model, plan_of(graph, np.ones(graph.units.count, bool))
        for number in range(self.rounds):
            before = plan

            def searched(model: nn.Module = model, before: Plan = before, number: int = number) -> str:
                return self._round(job, model, batches, graph, alive_of(graph, before), number, state).to_json()

            plan = replace(Plan.from_json(told_by_first(job.model, searched)), graph=graph)
            steps.done(f"search {number + 1}" if number else "search")
            last = number + 1 == self.rounds or _fits(job, plan.promised) or plan.kept == before.kept
            if last or job.recovery is None:
                break
            trained = self._trained(job, model, plan, number)
            steps.done(f"train {number + 1}")
            if trained is None:
                break
            model = trained
        if not plan.kept and not _fits(job, plan.promised):
            raise self._nothing(state)
        if not _fits(job, plan.promised):
            short = _short(job, plan.promised, state)
            state.say(short, level=logging.DEBUG)  # the warning is what is heard
            warnings.warn(short, BudgetMissedWarning, stacklevel=2)
        elif not plan.kept:
            warnings.warn("the whole model fits the budget: nothing was cut", NothingChangedWarning, stacklevel=2)
        small = steps.cut(job.model, plan)
        if model is not job.model:
            fill_(small, cut(model, plan))
        steps.look("cut", small, "measure cut")
        if job.repair:
            used = BatchNormStatistics()(
                small, (job.task.inputs(b) for b in job.task.calibration(job.calibration, job.seed))
            )
            steps.done("repair")
            if used:
                steps.look("batch-norm", small, "measure repaired")
        history = steps.recover(small, plan)
        return steps.outcome(small, plan, graph, history=history, details={TOLD: state.to_json()})

    def _round(
        self,
        job: Job,
        model: nn.Module,
        batches: list[Any],
        graph: ChannelGraph,
        alive: np.ndarray,
        number: int,
        state: State,
    ) -> Plan:
        """Search on a network of the whole one's shapes of which `alive` is there."""
        assert job.task is not None
        judge = Masked(
            model,
            graph,
            job.task,
            batches,
            norm=int(self.prunemethod[1]),
            grids=self.grids,
            exact_only=self.exact_only,
            alive=alive,
            memory=int(self.memory * GIB),
            nonnegative=job.task.nonnegative,
            statistics=self.statistics,
        )
        floors = [budget.floor for budget in job.budget]
        choices = [
            replace(one, least=max(one.least, *(_least(judge.whole[one.name], floor) for floor in floors)))
            for one in judge.choices()
        ]
        if not choices:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(judge.left_whole.items())[:SHOWN])
            raise BudgetError(f"PAGCP of {graph.model}", found=f"no group can be cut ({why})", do="protect fewer")
        if not number and share_down(self.topk, len(choices)) < 1:
            least = math.ceil(1000 / len(choices)) / 1000
            none = f"no whole group of {len(choices)} is kept"
            raise InputError((Setting("topk", self.topk),), found=none, do=("give at least ", Setting("topk", least)))
        how = self.allowances(number)
        if how.factor(len(choices)) > 1:  # the most expensive groups get the largest allowances either way
            choices.reverse()
        limits = {budget.of: budget.limit(graph.cost(np.ones_like(alive))[budget.of]) for budget in job.budget}
        multiple = math.lcm(self.round_to, *(budget.multiple for budget in job.budget))
        greedy = Greedy(gate=self.gate, scan=self.scan, multiple=multiple)
        leaves = {
            name: judge.cost({one.name: greedy.most(one, size(one.size)) for one in choices})
            for name, size in (("round", lambda n: n * (PARTS - 1) // PARTS), ("ever", lambda n: n))
        }
        told: dict[str, Any] = {
            "allowances": {"first": how.initial_rate, "total": how.initial_thres, "factor": how.factor(len(choices))},
            "groups": [{**asdict(one), "grain": greedy.grain(one)} for one in choices],
            "least": leaves,
            "selected": None,
        }

        def enough(gone: Mapping[str, int]) -> bool:
            cost = graph.cost(judge.kept(gone))
            return all(cost[name] <= limit for name, limit in limits.items())

        def tell(found: Found) -> None:
            state.note(number, found, told)
            _say_alone(found, state)
            if job.steps is not None and found.steps:
                words = f"search, round {number + 1}: {found.steps[-1].group}"
                job.steps(len(found.steps), len(choices), words)

        done = state.found(number)
        if done is None:
            log.info("at most %d evaluations of %d batches", 19 * len(choices) + 2, len(judge.batches))
        else:
            judge.recall(done)
            _say_alone(done, state)
        if not number:
            _say_coarse(greedy, choices, state)
            whole = graph.cost(np.ones_like(alive))
            for name in (name for name, limit in limits.items() if leaves["ever"][name] > limit):
                log.warning(
                    "no allowance will do: floors, multiples and protection leave %s %.3f of what they were at least, "
                    "asked %.3f", name, leaves["ever"][name] / whole[name], limits[name] / whole[name],
                )  # fmt: skip
        early = enough if self.topk == 1 else lambda gone: False  # what is dropped again has to be cut first
        found = greedy(choices, judge, how(len(choices)), enough=early, done=done, tell=tell)
        kept = judge.kept(found.gone)
        judge.settle(found.gone)
        if self.topk < 1:
            best = best_share(found, self._saved(judge, found), self.topk, len(choices), relative=self.relative)
            gone: dict[str, int] = {}
            for step in found.steps:
                if step.group in best and not enough(gone):
                    tested = sorted(trial.count for trial in step.trials if trial.count <= step.count)
                    gone[step.group] = next((n for n in tested if enough({**gone, step.group: n})), step.count)
            kept = judge.kept(gone)
            state.note(number, replace(found, reached=enough(gone)), told)
            state.tell(number, selected=gone)
        decided = {**describe(self), "groups": {step.group: step.count for step in found.steps}}
        decided["left_whole"] = dict(sorted(judge.left_whole.items()))
        return plan_of(graph, kept, budgets=job.budget, decided_by=decided, grids=self.grids)

    def _state(self, job: Job, graph: ChannelGraph, batches: list[Any]) -> State:
        """What an earlier run found, if there was one of the same search."""
        asked = {
            "settings": asdict(self),
            "network": [graph.fingerprint, digest_of(t for part in named_tensors(job.model) for _, t in part)],
            "set of batches": digest_of(tensors_in(batches)),
            "seed": job.seed,
            "list of protected layers": list(job.protect),
            "budget": [asdict(one) for one in job.budget],
        }
        return State(asked, None if job.partial is None else job.partial / SEARCH)

    @staticmethod
    def _saved(judge: Masked, found: Found) -> dict[str, float]:
        """Multiply-adds that each group's cut saved, on the network as it then was."""
        gone: dict[str, int] = {}
        saved, before = {}, judge.macs(judge.kept({}))
        for group, count in found.gone.items():
            gone[group] = count
            after = judge.macs(judge.kept(gone))
            saved[group], before = before - after, after
        return saved

    def _trained(self, job: Job, model: nn.Module, plan: Plan, number: int) -> nn.Module | None:
        """The network of the whole one's shapes after a round's training, zeros where it is cut; None where a cut can't
        be put back."""
        small = cut(model, plan)
        surgery = surgery_of(small)
        if surgery.scaled or surgery.door != "eager":
            log.warning("one round only: what the cut changed beside slicing can't be put back")
            return None
        partial = None if job.partial is None else job.partial / f"round-{number + 1}"
        recovered(replace(job, partial=partial), small, plan)
        return spread(model, small, plan)

    def _nothing(self, state: State) -> BudgetError:
        """The error where nothing was cut; what was found is of no use to another try."""
        if state.file is not None:
            state.file.unlink(missing_ok=True)
        steps = [step for step in state.rounds[-1].steps if step.trials] if state.rounds else []
        least = sorted(steps, key=lambda step: step.trials[0].rise)[:SHOWN]
        found = "; ".join(
            f"{one.group}: {first.task} rises by {first.rise:.2g} with {first.count} of {one.size} gone"
            for one, first in ((step, step.trials[0]) for step in least)
        )
        return BudgetError(
            "PAGCP within its allowances",
            found=f"no group bears any cut ({found})",
            do=("allow more: ", Setting("initial_rate", 2 * self.initial_rate), ", or give more data"),
        )


def spread(model: nn.Module, small: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` with the numbers of `small`, which was cut from it, where they were, and zeros elsewhere.

    Tables of positions are left as they are.
    """
    cuts, held = plan.by_tensor(), {name: tensor for part in named_tensors(small) for name, tensor in part}
    whole = copy_with(model, lambda tensor: like(tensor, tensor.detach().clone()))
    with torch.no_grad():
        for part in named_tensors(whole):
            for name, tensor in part:
                entries = cuts.get(name, [])
                if any("values" in entry for entry in entries):
                    continue
                places = torch.arange(tensor.numel()).reshape(tensor.shape)
                kept = apply_cuts(places, entries, name).flatten().to(tensor.device)
                flat = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
                flat[kept] = held[name].detach().to(tensor.device).flatten()
                tensor.copy_(flat.reshape(tensor.shape))
    return whole


def fill_(model: nn.Module, other: nn.Module) -> None:
    """The numbers of another network of the same shapes, in place."""
    with torch.no_grad():
        for mine, theirs in zip(named_tensors(model), named_tensors(other), strict=True):
            for (_, tensor), (_, source) in zip(mine, theirs, strict=True):
                tensor.copy_(source)


def _least(size: int, floor: float) -> int:
    """Of a group that had so many before the first round."""
    return floor if isinstance(floor, int) else share_up(floor, size)


def _fits(job: Job, promised: Mapping[str, float]) -> bool:
    return all(promised[b.of] <= b.limit(promised[f"{b.of}_before"]) for b in job.budget)


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Of their bytes."""
    code = hashlib.sha256()
    for tensor in tensors:
        code.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return code.hexdigest()[:16]


def _say_alone(found: Found, state: State) -> None:
    """Where one loss is all there is to judge by."""
    if len(found.base) == 1:
        state.say(
            f"one loss is judged ({next(iter(found.base))}): balance between tasks is lost; name the losses of several "
            "tasks, or the parts of one, to have each held to its allowance"
        )


def _say_coarse(greedy: Greedy, choices: Sequence[Choice], state: State) -> None:
    """Which groups have too few channels for twentieths."""
    coarse = [
        f"{one.name} by {round(greedy.grain(one) * one.size)} of {one.size}"
        for one in choices
        if greedy.grain(one) > 1 / PARTS
    ]
    if coarse:
        more = f" and {len(coarse) - SHOWN} more" if len(coarse) > SHOWN else ""
        state.say(
            f"{len(coarse)} of {len(choices)} groups are cut by coarser shares than twentieths: "
            f"{', '.join(coarse[:SHOWN])}{more}"
        )


def _short(job: Job, promised: Mapping[str, float], state: State) -> str:
    """Why the budget was not met, what was, and what to do."""
    least = state.more[-1]["least"] if state.more else {"ever": {}, "round": {}}
    whys, parts = [], []
    for budget in job.budget:
        name, before = budget.of, promised[f"{budget.of}_before"]
        limit = budget.limit(before)
        if promised[name] <= limit:
            continue
        parts.append(f"{name} {promised[name] / before:.3f} of what they were, asked {limit / before:.3f}")
        for key in ("ever", "round"):
            if least[key].get(name, 0) > limit:
                whys.append((key, f"{name} {least[key][name] / before:.3f}"))
                break
    said = "; ".join(parts)
    if any(key == "ever" for key, _ in whys):
        left = ", ".join(words for key, words in whys if key == "ever")
        return (
            f"what floors, multiples and protection leave is above the budget, whatever is allowed ({left} at least): "
            f"{said}; lower the floor, protect less, or ask for what can be met"
        )
    if whys:
        way = "raise rounds" if job.recovery is not None else "give a recovery, for further rounds"
        left = ", ".join(words for _, words in whys)
        return f"a round takes {PARTS - 1} of {PARTS} of a group at most, which leaves {left}: {said}; {way}"
    way = "raise initial_rate, initial_thres" + (
        " or rounds" if job.recovery is not None else ", or give a recovery, for further rounds"
    )
    return f"the allowances ended before the budget: {said}; {way}"
