"""Labels through one call, beside the same call on plain index numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import niwaki
from niwaki.graph.labels import LabelSpace
from niwaki.graph.recorder import Recorder
from niwaki.graph.values import Value
from niwaki.units import tensors_in


class Net(nn.Module):
    """Modules by name and a forward `f(net, *inputs)`."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class Seen:
    """What the recorder knows after `operator` ran on a tensor whose `axes` carry the labels 0, 1, 2, ..."""

    def __init__(
        self, operator: Callable[..., Any], shape: Sequence[int], axes: Sequence[int], *, others: int = 0
    ) -> None:
        self.space = LabelSpace()
        self.recorder = Recorder(self.space)
        ones = [n if a in axes else 1 for a, n in enumerate(shape)]
        labels = self.space.new(int(np.prod(ones))).reshape(ones)
        self.first_new = self.space.count
        x = torch.empty(tuple(shape), device="meta")
        self.recorder.know(x, Value(tuple(shape), (labels,), zero=True))
        self.input, self.labels = x, labels
        with self.recorder:
            self.result = operator(x)
        self.outputs = tensors_in(self.result)

    def fields(self, number: int = 0) -> tuple[np.ndarray, ...]:
        return self.recorder.value(self.outputs[number]).fields

    @property
    def names(self) -> set[str]:
        return {record.name for record in self.recorder.records}


def numbers(operator: Callable[..., Any], shape: Sequence[int], axes: Sequence[int]) -> list[Tensor]:
    """The operator applied to a tensor that holds, everywhere, its own index along `axes`."""
    ones = [n if a in axes else 1 for a, n in enumerate(shape)]
    index = torch.arange(int(np.prod(ones)), dtype=torch.float32).reshape(ones)
    return [t.clone() for t in tensors_in(operator(index.expand(tuple(shape)).contiguous()))]


def tied(space: LabelSpace, size: int) -> np.ndarray:
    """Number of the strict component of each of the first `size` labels."""
    from niwaki.graph.groups import components

    return components(space.count, space.strict)[:size]


def group_of(graph: Any, tensor: str, axis: int) -> Any:
    """The group that holds position 0 of an axis."""
    (found,) = [g for g in graph.groups for m in g.members if (m.tensor, m.axis) == (tensor, axis) and 0 in m.index]
    return found


def coupled(graph: Any, *axes: str) -> bool:
    """Whether these axes ("tensor:axis") belong to one group, position by position."""
    owners = []
    for text in axes:
        tensor, axis = text.rsplit(":", 1)
        parts = {}
        for number, group in enumerate(graph.groups):
            for member in group.members:
                if (member.tensor, member.axis) == (tensor, int(axis)):
                    for i, u in zip(member.index.tolist(), member.unit.tolist(), strict=True):
                        parts[i] = (number, u)
        owners.append([parts[i] for i in sorted(parts)])
    return all(owner == owners[0] for owner in owners) and bool(owners[0])


def cut_and_judge(
    net: nn.Module, example: Any, *, keep: float = 0.5, of: str = "units", grids: Any = "rows", **budget: Any
) -> Any:
    """Trace, random scores, choose, cut, verify -> (plan, small, receipt)."""
    graph = niwaki.trace(net, example)
    how = niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(net, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=keep, of=of, **budget), grids=grids)
    small = niwaki.cut(net, plan)
    return plan, small, niwaki.verify(net, small, plan, example)
