"""`compress_stored`: trace, score, choose and cut weights that stay on disk."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import nn

from niwaki.errors import InputError, RunExistsError, Setting
from niwaki.evidence import collect
from niwaki.graph import ChannelGraph, trace
from niwaki.methods.one_shot import OneShot
from niwaki.plan import Plan
from niwaki.scores import score
from niwaki.scores.score import describe
from niwaki.stored import Stored
from niwaki.surgery import cut_stored
from niwaki.units import Budget, budgets_of


@final
@dataclass(frozen=True, eq=False)
class StoredOutcome:
    """A folder of cut weights and how it came to be. The network itself never ran, so nothing judged or timed it."""

    folder: Path
    model: nn.Module
    """The cut network, its parameters where those of the given one were; `fill_stored(model, folder)` fills it."""
    plan: Plan
    method: dict[str, Any]
    bytes_before: int
    bytes_after: int
    files: tuple[str, ...]
    graph: ChannelGraph = field(repr=False)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data: sizes before and after, groups, seconds."""
        promised = self.plan.promised
        return {
            "folder": str(self.folder),
            "model": {"class": self.plan.model, "fingerprint": self.plan.fingerprint},
            "method": self.method,
            "budget": list(self.plan.budget),
            "before": {**{k: promised[f"{k}_before"] for k in ("params", "macs")}, "bytes": self.bytes_before},
            "after": {**{k: promised[k] for k in ("params", "macs")}, "bytes": self.bytes_after},
            "files": list(self.files),
            "judged": False,
            "inexact": dict(self.plan.inexact),
            "groups": {name: {"units": self.plan.units[name], "kept": len(k)} for name, k in self.plan.kept.items()},
            "fixed": {group.name: group.fixed for group in self.graph.groups if group.fixed is not None},
            "unknown": [vars(u) for u in self.graph.unknown],
            "data_reads": [vars(read) for read in self.graph.data_reads],
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def compress_stored(
    model: nn.Module,
    example: Any,
    stored: Stored | str | Path,
    folder: str | Path,
    *,
    method: OneShot,
    budget: Budget | Sequence[Budget],
    protect: Sequence[str] = (),
    seed: int = 0,
    force: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> StoredOutcome:
    """Trace, score, choose and cut, with the weights read from disk and written to `folder` one tensor at a time.

    `model` says what the tensors are and may be on the meta device (`niwaki.models.outline`); it is left alone. There
    is no forward pass with numbers: `verify` judges the plan where the whole model fits into memory.

    Args:
        progress: called after each stage, and after each file written, with its name and seconds.

    Raises:
        InputError and its kin: a score that needs gradients or data, a budget that can't be met, weights with NaN, ...
        CannotCutError: the eager door does not open.
    """
    if not isinstance(method, OneShot):
        raise InputError(
            f"{type(method).__name__} on stored weights",
            found="it needs the network in memory",
            do="use a method that scores units by weights (magnitude, norm_scale, random), or load the whole model",
        )
    how = method.score(seed)
    for name in ("fold", "refit"):
        if getattr(method, name):
            raise InputError(
                (f"{type(method).__name__} with ", Setting(name, True), " on stored weights"),
                found="it needs to run the network",
                do=f"leave {name} out, or load the whole model",
            )
    if Path(folder).exists() and not force:
        raise RunExistsError(
            f"write to {folder}", found="it exists", do=("choose another folder, or give ", Setting("force", True))
        )
    budgets = budgets_of(budget)
    stored = stored if isinstance(stored, Stored) else Stored(stored)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def done(stage: str, *, keep: bool = True) -> None:
        nonlocal clock
        now = time.perf_counter()
        if keep:
            seconds[stage] = now - clock
        if progress is not None:
            progress(stage, now - clock)
        clock = now if keep else clock

    graph = trace(model, example, protect=protect)
    done("trace")
    numbers = score(graph, collect(model, graph, how.needs, stored=stored), how=how)
    done("score")
    plan = method.choose(graph, numbers, budgets)
    done("choose")

    def file(name: str, number: int, count: int) -> None:
        done(f"{name} ({number} of {count})", keep=False)

    small = cut_stored(model, plan, stored, folder, force=force, progress=file)
    done("cut")
    after = Stored(folder)
    return StoredOutcome(
        folder=Path(folder),
        model=small,
        plan=plan,
        method=describe(method),
        bytes_before=stored.bytes,
        bytes_after=after.bytes,
        files=tuple(after.files),
        graph=graph,
        seconds=seconds,
    )
