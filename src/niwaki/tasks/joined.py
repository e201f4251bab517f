"""Several tasks on one network, each with its own batches, loss and metrics."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from niwaki.errors import InputError
from niwaki.measure import Measurement
from niwaki.tasks import Task
from niwaki.tasks.outputs import named_outputs
from niwaki.tasks.task import Shown

Batches = dict[str, Any]
Ran = list[tuple[Any, Any]]
"""What a network was called on, and what it put out."""


@final
@dataclass(frozen=True, eq=False)
class Joined(Task):
    """Several tasks of any kind on one network. A batch is a batch of each task, by its name.

    The network puts out a dictionary (or named fields) with each task's name, or a tuple in their order; each task sees
    a network that puts out its own part. Where batches of two tasks have the same inputs, the network runs once.

    Raises:
        InputError: no tasks, weights or a reference that do not fit them.
    """

    tasks: Mapping[str, Task]
    """Name -> task. The names are the network's outputs, and stand before those of losses and metrics."""
    weights: Mapping[str, float] | None = None
    """Name -> what a task's loss is multiplied by in their sum, above 0; 1 for tasks without. None: 1 for all."""
    reference: Mapping[str, float] | None = None
    """Name -> the task's metric for the network to compare with (say, uncut): `evaluate` then gives the mean gain over
    tasks in percent of these. None: the mean of the tasks' metrics."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError("join tasks", found="none", do="give at least one, by its name")
        for what, given, all_of in (("weights", self.weights, False), ("a reference", self.reference, True)):
            wrong = sorted(set(given or ()) - set(self.tasks))
            wrong += sorted(set(self.tasks) - set(given)) if given is not None and all_of else []
            if wrong or not all(0 < value < float("inf") for value in (given or {}).values()):
                found = f"odd: {', '.join(wrong) or 'a value not above 0'}"
                do = f"give numbers above 0 for {', '.join(self.tasks)}"
                raise InputError(f"join tasks with {what}", found=found, do=do)

    @property
    def extra(self) -> nn.Module | None:
        """The tasks' own parameters."""
        found = {name: task.extra for name, task in self.tasks.items()}
        modules = {name: module for name, module in found.items() if module is not None}
        return nn.ModuleDict(modules) if modules else None

    @property
    def nonnegative(self) -> bool:
        return all(task.nonnegative for task in self.tasks.values())

    @property
    def steps(self) -> int:
        """Of the task with the most; the others begin anew, in another order."""
        return max(task.steps for task in self.tasks.values())

    def late(self, epoch: int, epochs: int) -> "Joined":
        """The tasks as they are in an epoch (from 0) of so many."""
        return replace(self, tasks={name: _late(task, epoch, epochs) for name, task in self.tasks.items()})

    def train_batches(self, seed: int) -> Iterator[Batches]:
        turns = {name: _again(task, seed) for name, task in self.tasks.items()}
        return ({name: next(turn) for name, turn in turns.items()} for _ in range(self.steps))

    def calibration(self, n_batches: int, seed: int) -> list[Batches]:
        """As many as the task with the most has; the others' are repeated."""
        found = {name: task.calibration(n_batches, seed) for name, task in self.tasks.items()}
        count = max(map(len, found.values()))
        return [{name: own[at % len(own)] for name, own in found.items()} for at in range(count)]

    def inputs(self, batch: Batches) -> Any:
        """Of all tasks: pictures of several tasks in one batch, the same ones once.

        Raises:
            InputError: inputs that do not fit into one batch.
        """
        apart: list[Any] = []
        for name, task in self.tasks.items():
            given = task.inputs(batch[name])
            if not any(_same(one, given) for one in apart):
                apart.append(given)
        if len(apart) == 1:
            return apart[0]
        if not all(isinstance(one, Tensor) and one.shape[1:] == apart[0].shape[1:] for one in apart):
            found = ", ".join(str(tuple(one.shape)) if isinstance(one, Tensor) else type(one).__name__ for one in apart)
            raise InputError("inputs of joined tasks", found=found, do="give all tasks inputs of one shape")
        return torch.cat(apart)

    def example(self) -> Any:
        return next(iter(self.tasks.values())).example()

    def losses(self, model: nn.Module, batch: Batches) -> dict[str, Tensor]:
        """The parts of each task's loss as TASK_PART, not yet weighted."""
        ran: Ran = []
        found: dict[str, Tensor] = {}
        for name, task in self.tasks.items():
            parts = task.losses(self._seen(model, name, ran), batch[name])
            found |= {_called(name, part): loss for part, loss in parts.items()}
        return found

    def loss(self, model: nn.Module, batch: Batches) -> Tensor:
        """The tasks' losses, weighted and summed."""
        ran: Ran = []
        weights = self.weights or {}
        each = [
            weights.get(name, 1.0) * task.loss(self._seen(model, name, ran), batch[name])
            for name, task in self.tasks.items()
        ]
        return torch.stack(each).sum()

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement:
        """The summary: "gain" in percent with a reference, "score" without; raises what the tasks raise."""
        return list(self.metrics(model, split=split, limit=limit).values())[-1]

    def metrics(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> dict[str, Measurement]:
        """Every task's metrics as TASK_METRIC, each on the task's own data, then the summary."""
        found: dict[str, Measurement] = {}
        own: dict[str, Measurement] = {}
        for name, task in self.tasks.items():
            of_task = task.metrics(self._seen(model, name, None), split=split, limit=limit)
            found |= {_called(name, key): replace(one, name=_called(name, key)) for key, one in of_task.items()}
            own[name] = list(of_task.values())[-1]
        listed = ", ".join(f"{name} ({one.name})" for name, one in own.items())
        device = next(iter(own.values())).device
        if self.reference is None:
            value = sum(one.value for one in own.values()) / len(own)
            units = {one.unit for one in own.values()}
            unit, said = units.pop() if len(units) == 1 else "", f"mean over {listed} of the tasks' metrics"
            summary = Measurement("score", value, unit, said, device=device)
        else:
            gains = [100 * (one.value / self.reference[name] - 1) for name, one in own.items()]
            said = f"mean over {listed} of the gain over the reference in percent of it"
            summary = Measurement("gain", sum(gains) / len(gains), "%", said, device=device)
        return {**found, summary.name: summary}

    def shown(self, models: Mapping[str, nn.Module], *, limit: int | None = None) -> list[Shown]:
        """What each task has to show."""
        found: list[Shown] = []
        for name, task in self.tasks.items():
            found += task.shown({of: self._seen(model, name, None) for of, model in models.items()}, limit=limit)
        return found

    def _seen(self, model: nn.Module, name: str, ran: Ran | None) -> "_Part":
        return _Part(model, tuple(self.tasks), name, ran)


@final
class _Part(nn.Module):
    """The network as one of the tasks sees it. What is in `ran`, which tasks of one batch share, is not run again."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], name: str, ran: Ran | None) -> None:
        super().__init__()
        self.model, self.names, self.name, self.ran = model, names, name, ran
        self.training = model.training

    def forward(self, *args: Any, **more: Any) -> Any:
        output = next((out for given, out in self.ran or () if _same(given, (args, more))), None)
        if output is None:
            output = self.model(*args, **more)
            if self.ran is not None:
                self.ran.append(((args, more), output))
        found = named_outputs(output, self.names)[self.name]
        if found is None:
            said = f"a {type(output).__name__} without {self.name}"
            do = f"return a dictionary with {', '.join(self.names)}, or a tuple in this order"
            raise InputError("outputs of joined tasks", found=said, do=do)
        return found


def _again(task: Task, seed: int) -> Iterator[Any]:
    """Passes over a task's training batches without end, the first in the order of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from task.train_batches(seed)
        seed = int(torch.randint(2**62, (), generator=generator))


def _late(task: Task, epoch: int, epochs: int) -> Task:
    found: Callable[[int, int], Task] | None = getattr(task, "late", None)
    return task if found is None else found(epoch, epochs)


def _same(one: Any, other: Any) -> bool:
    """Whether a network that is called on one puts out what it puts out for the other."""
    (mine, how), (its, as_) = tree_flatten(one), tree_flatten(other)
    return how == as_ and all(a is b or _equal(a, b) for a, b in zip(mine, its, strict=True))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return alike and torch.equal(one, other)
    return type(one) is type(other) and isinstance(one, (int, float, str, bool)) and one == other


def _called(task: str, part: str) -> str:
    """How a part of a task is called among those of others."""
    return task if part in ("loss", task) else part if part.startswith(f"{task}_") else f"{task}_{part}"
