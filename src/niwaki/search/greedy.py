"""Groups one after the other, each cut as far as no task's loss rises too much, on the network as already cut."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, final

from niwaki.errors import InputError, NotFiniteError, Setting
from niwaki.scores.score import known
from niwaki.units import share_down

Gate = Literal["all", "selected"]
Scan = Literal["grid", "bisect"]
PARTS = 20
"""Of a group: the shares tried are whole twentieths, 1 to 19, counted in integers, which a float's floor gets wrong."""
SPREAD = 1e-4
"""How far two evaluations of one network may be apart, relative: sums on GPUs differ by about 1e-6 from run to run."""


@final
@dataclass(frozen=True)
class Choice:
    """A group that can be cut: what goes first is the judge's affair."""

    name: str
    size: int
    """Channels (or whole heads) that could go, at the start of the round."""
    least: int = 1
    """How many stay at least."""
    value: float = 0.0
    """What cutting it is worth, to order groups by."""


@final
@dataclass(frozen=True)
class Candidate:
    """A network to be judged: what is gone already, and what goes from one more group."""

    gone: Mapping[str, int]
    """Group -> how many of its lowest are gone, in the order in which they went."""
    group: str | None = None
    count: int = 0
    bounds: Mapping[str, float] | None = None
    """Losses by task above which it is refused anyhow: a judge may then stop, and say a `Partial`."""

    @property
    def all(self) -> dict[str, int]:
        """Both together."""
        return {**self.gone, **({self.group: self.count} if self.group is not None and self.count else {})}


Judge = Callable[[Candidate], Mapping[str, float]]
"""Losses by task, lower is better, the same every time it is asked."""


@final
class Partial(dict[str, float]):
    """Losses by task of some of the samples, none of them above what it is over all."""


@final
@dataclass(frozen=True)
class Trial:
    """One candidate and what was said of it."""

    part: int
    """In twentieths of the group."""
    count: int
    losses: dict[str, float]
    task: str
    """Whose loss rose most."""
    rise: float
    """By what share of the reference, of the task that decides."""
    partial: bool = False
    """Losses and rise are at least so much: it was refused before all samples were seen."""


@final
@dataclass(frozen=True)
class Step:
    """What became of one group."""

    group: str
    size: int
    allowance: float
    reference: dict[str, float]
    """What losses were compared with."""
    trials: tuple[Trial, ...]
    accepted: int | None = None
    """Which of the trials; None leaves the group whole."""
    decides: str | None = None
    """The task that alone was asked, where one was chosen."""

    @property
    def taken(self) -> Trial | None:
        return None if self.accepted is None else self.trials[self.accepted]

    @property
    def count(self) -> int:
        return 0 if self.taken is None else self.taken.count

    @property
    def after(self) -> dict[str, float]:
        """The reference for the next group: it never falls."""
        if self.taken is None:
            return dict(self.reference)
        return {task: max(value, self.taken.losses[task]) for task, value in self.reference.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is no number is null."""
        trials = [
            {**asdict(one), "losses": {t: _said(v) for t, v in one.losses.items()}, "rise": _said(one.rise)}
            for one in self.trials
        ]
        return {**{k: v for k, v in vars(self).items() if k != "trials"}, "trials": trials}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Step":
        trials = tuple(
            Trial(
                **{
                    **one,
                    "losses": {t: math.nan if v is None else float(v) for t, v in one["losses"].items()},
                    "rise": math.inf if one["rise"] is None else float(one["rise"]),
                }
            )
            for one in data["trials"]
        )
        return cls(**{**data, "trials": trials})


@final
@dataclass(frozen=True)
class Found:
    """What a search came to."""

    base: dict[str, float]
    """Losses of the network that it began with."""
    steps: tuple[Step, ...]
    """Of the groups that were looked at, in their order."""
    reached: bool = False
    """Whether it ended because enough was cut."""

    @property
    def gone(self) -> dict[str, int]:
        """Group -> how many of its lowest go, in order."""
        return {step.group: step.count for step in self.steps if step.count}


@final
@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Cut each group in turn by growing shares, until the next would raise a task's loss by more than is allowed.

    Losses are compared with those of the network as cut so far, so what groups do to each other is in them. With every
    task asked and every step within its allowance, no loss ends above its start times the product of all
    `1 + allowance`. A group that can't be cut within its allowance leaves that allowance to the next.

    Source: Ye et al. 2023, arXiv:2303.11923. Differs: shares are counted in integers; a group that bears every share is
    cut by the largest and the later ones are judged with it gone (the published code judges them without).

    Raises:
        InputError: an unknown gate or scan.
    """

    gate: Gate = "all"
    """Whose loss may not rise too much: all tasks', or that of the task that the group's first cut hurts most."""
    scan: Scan = "grid"
    """Which shares are tried: each in turn up to the first that is too much, or by halving what is unknown, with fewer
    evaluations and the same end where losses grow with the share."""
    multiple: int = 1
    """What stays of a group is a multiple of this, where it has that many."""

    def __post_init__(self) -> None:
        known(self, gate=("all", "selected"), scan=("grid", "bisect"))
        if type(self.multiple) is not int or self.multiple < 1:
            do = "give a whole number from 1"
            found = "no whole number above 0"
            raise InputError(("search with ", Setting("multiple", self.multiple)), found=found, do=do)

    def __call__(
        self,
        choices: Sequence[Choice],
        judge: Judge,
        allowances: Sequence[float],
        *,
        enough: Callable[[Mapping[str, int]], bool] = lambda gone: False,
        done: Found | None = None,
        tell: Callable[[Found], None] = lambda found: None,
    ) -> Found:
        """Search.

        Args:
            choices: groups in the order in which they are cut.
            allowances: relative rises, one for each group that is really cut.
            enough: whether what is gone will do: then the search ends, at the smallest share that does.
            done: what an earlier call told before it was killed; it is not judged again.
            tell: hears what is found so far, after the start and after each group.

        Raises:
            InputError: a task's loss is 0 or negative at the start; a judge that says something else of the same
                network the second time, or names other tasks.
            NotFiniteError: a loss is NaN or infinite at the start.
        """
        if done is None:
            found = Found(base=self._base(judge), steps=(), reached=enough({}))
            tell(found)
        else:
            found = done
        reference = found.steps[-1].after if found.steps else found.base
        for choice in choices[len(found.steps) :]:
            if found.reached:
                break
            gone = found.gone
            rest = allowances[min(len(gone), len(allowances) - 1)]
            counts = self.counts(choice)
            full = next((at for at, (_, n) in enumerate(counts) if enough({**gone, choice.name: n})), None)
            counts = counts if full is None else counts[: full + 1]
            step = self._step(Step(choice.name, choice.size, rest, dict(reference), ()), gone, counts, judge)
            reference = step.after
            found = replace(found, steps=(*found.steps, step))
            found = replace(found, reached=full is not None and enough(found.gone))
            tell(found)
        return found

    def counts(self, choice: Choice) -> list[tuple[int, int]]:
        """(twentieths, how many go) of every share that takes anything and leaves enough; each count once."""
        found: dict[int, int] = {}
        for part in range(1, PARTS):
            count = self.most(choice, choice.size * part // PARTS)
            if count > 0:
                found.setdefault(count, part)
        return [(part, count) for count, part in found.items()]

    def most(self, choice: Choice, count: int) -> int:
        """How many of that many may go, as what has to stay and the multiple allow; 0 or less where none may."""
        count = min(count, choice.size - choice.least)
        if choice.size >= self.multiple:
            count = choice.size - math.ceil((choice.size - count) / self.multiple) * self.multiple
        return count

    def grain(self, choice: Choice) -> float:
        """By what share of the group its cuts grow: a twentieth, or more where it has too few for that."""
        return max(1 / PARTS, (self.multiple if choice.size >= self.multiple else 1) / choice.size)

    def _step(self, step: Step, gone: dict[str, int], counts: list[tuple[int, int]], judge: Judge) -> Step:
        trials: list[Trial] = []
        decides: str | None = None
        passed: int | None = None  # which of the counts

        def allowed(at: int) -> bool:
            nonlocal decides
            part, count = counts[at]
            bounds = None
            if trials:  # the first is heard to the end: its rise is reported, and may choose the task
                asked = step.reference if decides is None else (decides,)
                bounds = {task: (1 + step.allowance) * step.reference[task] for task in asked}
            said = judge(Candidate(gone, step.group, count, bounds))
            losses = {task: float(value) for task, value in said.items()}
            if losses.keys() != step.reference.keys():
                found = f"{', '.join(losses)}; at the start {', '.join(step.reference)}"
                raise InputError("judge a cut network", found=found, do="name the same tasks every time")
            rises = {task: _rise(losses[task], before) for task, before in step.reference.items()}
            task = max(rises, key=rises.__getitem__)
            if self.gate == "selected":
                decides = decides or task
            rise = rises[decides or task]
            trials.append(Trial(part, count, losses, task, rise, isinstance(said, Partial)))
            asked = step.reference if decides is None else (decides,)
            return all(losses[task] <= (1 + step.allowance) * step.reference[task] for task in asked)

        low, high = -1, len(counts)
        while high - low > 1:
            at = low + 1 if self.scan == "grid" or low < 0 else (low + high) // 2
            if allowed(at):
                low, passed = at, len(trials) - 1
            else:
                high = at
        return replace(step, trials=tuple(trials), accepted=passed, decides=decides)

    @staticmethod
    def _base(judge: Judge) -> dict[str, float]:
        first, again = (dict(judge(Candidate({}))) for _ in range(2))
        if not first:
            raise InputError("search by losses", found="the judge names no task", do="give a task with a loss")
        for task, loss in first.items():
            if not math.isfinite(loss):
                raise NotFiniteError(
                    f"search by {loss_of(task)}",
                    found=f"{loss} before anything is cut",
                    do="look for NaN in the weights, or for batches without a target of this task",
                )
            if loss <= 0:
                zero = "give data that the network does not fit perfectly, or leave this task out"
                raise InputError(
                    f"search by {loss_of(task)}",
                    found=f"it is {loss:g} before anything is cut: no rise is a share of that",
                    do=zero if loss == 0 else "give a loss that is above 0, say with a constant added",
                )
            spread = abs(again.get(task, math.inf) - loss) / loss
            if not spread <= SPREAD:
                raise InputError(
                    f"search by {loss_of(task)}",
                    found=f"two evaluations of the same network are {spread:.2g} apart, in shares of the loss",
                    do="have the loss draw no numbers and keep no state in evaluation mode, on fixed batches",
                )
        return {task: float(loss) for task, loss in first.items()}


def best_share(
    found: Found, saved: Mapping[str, float], share: float, groups: int, *, relative: bool = True
) -> dict[str, int]:
    """The groups of a search whose cut costs least loss for what it saves: `int(groups * share)` of them, in the order
    in which they were cut.

    Source: Ye et al. 2023, arXiv:2303.11923 (`topk`). Differs: tasks' rises are taken in shares of their losses at the
    start unless `relative` is False, so that weights of tasks don't matter.

    Args:
        saved: group -> what its cut saved on the network as it then was.
        share: of all groups, cut or not.
        groups: how many these are.

    Raises:
        InputError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError((Setting("topk", share),), found="no share of groups", do=("give e.g. ", Setting("topk", 0.8)))
    scores: dict[str, float] = {}
    for step in found.steps:
        if step.taken is not None:
            by = found.base if relative else dict.fromkeys(found.base, 1.0)
            rise = sum((step.taken.losses[task] - step.reference[task]) / by[task] for task in by)
            scores[step.group] = rise / max(saved[step.group], 1e-12)
    best = sorted(scores, key=scores.__getitem__)[: share_down(share, groups)]
    return {group: count for group, count in found.gone.items() if group in best}


def loss_of(task: str) -> str:
    """How messages call it."""
    return "the loss" if task == "loss" else f"the loss of {task}"


def _rise(loss: float, before: float) -> float:
    """In shares of the loss before; infinite where the new one is no number."""
    return loss / before - 1 if math.isfinite(loss) else math.inf


def _said(value: float) -> float | None:
    return value if math.isfinite(value) else None
