"""A task of your own as two functions: a loss and a metric."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, NotFiniteError, UnknownNameError
from niwaki.measure import Measurement
from niwaki.measure.measurement import device_name, evaluating
from niwaki.tasks import Task
from niwaki.tasks.parts import SPLITS, known
from niwaki.tasks.scalars import place_of, scalars
from niwaki.units import device_of, map_tensors, tensors_in


def first_of(batch: Any) -> Any:
    """The first part of a tuple or list; anything else whole."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


@final
class Custom(Task):
    """What `loss` and `metric` say, on batches of any structure.

    Args:
        loss: (model, batch) -> the scalar to minimise, or several by name, whose sum it is; it calls the model once.
        metric: (model, batches) -> a number, higher is better; the model is in evaluation mode, without gradients.
        splits: "train", "val" and "test" -> batches: a list, or anything with a length and an index.
        inputs: what of a batch the model is called on; by default the first of a tuple or list.
        example: one input to trace with; by default the first sample of the first batch (tensors' first rows).
        name, unit, definition: of the metric, for reports.
        nonnegative: whether no part of the loss is ever below 0 on any batch.

    Tensors of a batch are on the model's device before either function sees them; their precision is left alone.

    Raises:
        InputError: no training batches, or a split without any; a loss that is neither a scalar tensor nor several by
            name.
        NotFiniteError: the metric is NaN or infinite.

    Examples:
        >>> batches = [(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]]))]
        >>> task = Custom(
        ...     loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
        ...     metric=lambda model, batches: -sum((model(x) - y).abs().sum().item() for x, y in batches),
        ...     splits={"train": batches, "test": batches},
        ... )
        >>> task.evaluate(nn.Identity()).value, tuple(task.example().shape)
        (-3.0, (1, 1))
    """

    def __init__(
        self,
        *,
        loss: Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]],
        metric: Callable[[nn.Module, Iterable[Any]], float],
        splits: Mapping[str, Sequence[Any]],
        inputs: Callable[[Any], Any] = first_of,
        example: Any = None,
        name: str = "metric",
        unit: str = "",
        definition: str = "what the task's own metric says",
        nonnegative: bool = False,
    ) -> None:
        if unknown := sorted(set(splits) - set(SPLITS)):
            raise UnknownNameError.of("split", unknown[0], SPLITS)
        if "train" not in splits or not len(splits["train"]):
            raise InputError("a task of your own", found="no training batches", do='give splits={"train": [...], ...}')
        self.splits = splits
        self._loss, self._metric, self._inputs, self._example = loss, metric, inputs, example
        self._said, self._nonnegative = (name, unit, definition), nonnegative

    @property
    def nonnegative(self) -> bool:
        return self._nonnegative

    @property
    def steps(self) -> int:
        return len(self.splits["train"])

    def train_batches(self, seed: int) -> Iterator[Any]:
        """Every training batch once, in an order drawn by `seed`."""
        order = torch.randperm(self.steps, generator=torch.Generator().manual_seed(seed)).tolist()
        return (self.splits["train"][at] for at in order)

    def calibration(self, n_batches: int, seed: int) -> list[Any]:
        if n_batches < 1:
            raise InputError(f"{n_batches} calibration batches", do="ask for at least 1")
        batches = self.train_batches(seed)
        return [next(batches) for _ in range(min(n_batches, self.steps))]

    def inputs(self, batch: Any) -> Any:
        return self._inputs(batch)

    def example(self) -> Any:
        if self._example is not None:
            return self._example
        return map_tensors(self.inputs(self.splits["train"][0]), lambda tensor: tensor[:1])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return torch.stack(list(self.losses(model, batch).values())).sum()

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """What the function gives: its parts by name, or all of it as "loss"."""
        return scalars(self._loss(model, self._moved(batch, model)), where=place_of(self._loss))

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None) -> Measurement:
        """The metric on a split, or on its first batches that together have `limit` samples (rows of first tensors)."""
        batches = self.splits.get(known(split), ())
        if not len(batches) or (limit is not None and limit < 1):
            found = f"{len(batches)} batches, limit {limit}"
            raise InputError(f"evaluate on the {split} split", found=found, do="use a split and a limit above 0")
        taken: list[int] = []
        with evaluating(model):
            value = float(self._metric(model, self._first(batches, limit, model, taken)))
        name, unit, definition = self._said
        if not math.isfinite(value):
            raise NotFiniteError(
                f"evaluate on the {split} split", found=f"{name} {value}", do="look for NaN in the weights"
            )
        where = f"{sum(taken)} samples in {len(taken)} of {len(batches)} batches of the {split} split"
        return Measurement(name, value, unit, f"{definition}; {where}", device=device_name(device_of(model)))

    def _first(self, batches: Sequence[Any], limit: int | None, model: nn.Module, taken: list[int]) -> Iterator[Any]:
        for at in range(len(batches)):
            if limit is not None and sum(taken) >= limit:
                return
            batch = self._moved(batches[at], model)
            found = tensors_in(batch)
            taken.append(len(found[0]) if found and found[0].dim() else 1)
            yield batch

    @staticmethod
    def _moved(batch: Any, model: nn.Module) -> Any:
        place = device_of(model)
        return map_tensors(batch, lambda tensor: tensor.to(place))
