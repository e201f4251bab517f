"""What is asked of a task that is taught, and what tasks around another one leave to it."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor, nn

from niwaki.measure import Measurement


class Taught(Protocol):
    """What is asked of a task; `niwaki.tasks.Task` has it."""

    @property
    def steps(self) -> int: ...

    def train_batches(self, seed: int) -> Iterator[Any]: ...

    def calibration(self, n_batches: int, seed: int) -> list[Any]: ...

    def inputs(self, batch: Any) -> Any: ...

    def example(self) -> Any: ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement: ...


@runtime_checkable
class Covering(Protocol):
    """A task whose batches say where things lie; `niwaki.tasks.Detection` is one."""

    def covered(self, batch: Any, cells: tuple[int, int]) -> Bool[Tensor, "batch rows columns"]:
        """Which cells of a grid of (rows, columns) over each picture some thing lies on."""


class Around:
    """A task around another one: everything but the loss is the inner task's."""

    task: Taught

    @property
    def steps(self) -> int:
        return self.task.steps

    def late(self, epoch: int, epochs: int) -> Taught:
        """The task that makes the batches of an epoch, where those change as a training goes on."""
        found: Callable[[int, int], Taught] | None = getattr(self.task, "late", None)
        return self.task if found is None else found(epoch, epochs)

    def train_batches(self, seed: int) -> Iterator[Any]:
        return self.task.train_batches(seed)

    def calibration(self, n_batches: int, seed: int) -> list[Any]:
        return self.task.calibration(n_batches, seed)

    def inputs(self, batch: Any) -> Any:
        return self.task.inputs(batch)

    def example(self) -> Any:
        return self.task.example()

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement:
        """The task's own metric of `model`; the teacher has no part in it."""
        return self.task.evaluate(model, split=split, limit=limit)


def covering(task: Taught) -> Covering | None:
    """The task itself, or the one inside, if it says where things lie."""
    while isinstance(task, Around):
        task = task.task
    return task if isinstance(task, Covering) else None
