"""Forwards that do what no tracer likes: a right cut or a reason by name, and never a wrong answer.

Each network is cut by several random plans; what is cut must equal the masked original, and what is refused must say
why.
"""

import inspect
import json
import logging
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import niwaki
from niwaki.errors import CannotCutError

ROWS, WIDTH = 4, 12
NUMPY = "left torch through numpy in the model, "


class Net(nn.Module):
    """Six inputs, twelve and ten channels, three outputs; `middle` does something odd between the first two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 10), nn.Linear(10, 3)
        self.other, self.part = nn.Linear(WIDTH, 10), nn.Parameter(torch.randn(4))

    def middle(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(self.middle(F.relu(self.first(x))))))


# -- numbers leave torch ---------------------------------------------------------------------------------------------


class ThroughNumpy(Net):
    def middle(self, y: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(y.detach().numpy()))


class ThroughArray(Net):
    def middle(self, y: Tensor) -> Tensor:
        return torch.from_numpy(np.cumsum(np.asarray(y.detach()), 1))


class ThroughLists(Net):
    def middle(self, y: Tensor) -> Tensor:
        return torch.tensor(y.tolist(), dtype=y.dtype)


class MeanByNumpy(Net):
    """What comes back is a number, which then is no factor that depends on a width."""

    def middle(self, y: Tensor) -> Tensor:
        return y * float(y.detach().numpy().mean())


class NumpyLate(Net):
    """What numpy sees was computed from channels that are cut: it is another number in the cut model."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.first(x)))
        return self.third(y * float(np.abs(y.detach().numpy()).max()))


class OrderByNumpy(Net):
    """Positions from numpy look like a constant, and are none."""

    def middle(self, y: Tensor) -> Tensor:
        order = torch.from_numpy(np.argsort(y.detach().numpy()[0]).copy())
        return y[:, order]


class WeightByNumpy(Net):
    def forward(self, x: Tensor) -> Tensor:
        weight = torch.from_numpy(self.first.weight.detach().numpy() * 2)
        return self.third(F.relu(self.second(F.linear(x, weight, self.first.bias))))


# -- numbers decide --------------------------------------------------------------------------------------------------


class Branch(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return self.third(self.second(y) if y.sum() > -1 else self.other(y))


class While(Net):
    def middle(self, y: Tensor) -> Tensor:
        for _ in range(5):
            if y.norm() < 1e-3:
                break
            y = y / 2
        return y


class SumAsFactor(Net):
    """A number read out, used as a factor: what the cut model would read differs, and nothing is folded for it."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return self.third(F.relu(self.second(y)) * y.sum().item())


class OneAsFactor(Net):
    """The number of one channel."""

    def middle(self, y: Tensor) -> Tensor:
        return y * y[0, 3].item()


class PickedByNumber(Net):
    def middle(self, y: Tensor) -> Tensor:
        largest = int(y.mean(0).argmax())
        return y + y[:, largest : largest + 1]


class Rows(Net):
    """As many rows as the data say."""

    def middle(self, y: Tensor) -> Tensor:
        rows = (y.sum(1) > 0).nonzero().squeeze(1)
        return y.index_select(0, rows).mean(0, keepdim=True)


class Equal(Net):
    def middle(self, y: Tensor) -> Tensor:
        return y + 1 if torch.equal(y, y * 2) else y


class AllClose(Net):
    def middle(self, y: Tensor) -> Tensor:
        return y + 1 if torch.allclose(y, y * 2) else y


# -- writing to views ------------------------------------------------------------------------------------------------


class AddToPart(Net):
    def middle(self, y: Tensor) -> Tensor:
        y = y.clone()
        y[:, 2:6] += self.part
        return y


class ZeroPart(Net):
    def middle(self, y: Tensor) -> Tensor:
        y = y.clone()
        y[:, 2:6] = 0
        return y


class DoubleHalf(Net):
    def middle(self, y: Tensor) -> Tensor:
        y = y.clone()
        y[:, :6].mul_(2)
        return y


class DoubleFirstHalf(Net):
    """Where six channels stay, the first half is all there is, and slicing it is no call."""

    def middle(self, y: Tensor) -> Tensor:
        return torch.cat([y[:, :6] * 2, y[:, 6:]], 1)


class SetOne(Net):
    def middle(self, y: Tensor) -> Tensor:
        y = y.clone()
        y[:, 3] = 1.0
        return y


class AddThroughView(Net):
    """What is zero where channels are removed is so no longer, once somebody wrote to it under another shape."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        y.view(-1, 3, 4).add_(1.0)
        return self.third(F.relu(self.second(y))) * y.sum(1, keepdim=True)


class Swap(Net):
    def middle(self, y: Tensor) -> Tensor:
        y = y.clone()
        kept = y[:, :3].clone()
        y[:, :3] = y[:, 3:6]
        y[:, 3:6] = kept
        return y


class Fill(Net):
    def middle(self, y: Tensor) -> Tensor:
        made = y.new_zeros(y.shape[0], WIDTH)
        made[:, :] = y
        return made


class OrderThroughView(Net):
    """A table of positions is written through a view: what was known of it is known no longer."""

    def middle(self, y: Tensor) -> Tensor:
        order = torch.arange(WIDTH)
        order[1:].copy_(order[1:].flip(0))
        return y[:, order]


class WriteByNumpy(Net):
    """numpy shares the memory, and writes to it."""

    def middle(self, y: Tensor) -> Tensor:
        y = y.detach().clone()
        y.numpy()[:, 1] = 5
        return y


# -- custom functions ------------------------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return 2 * gradient * weight, (gradient * x).sum(0)  # twice what it would be: this very code must run


class CustomFunction(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def middle(self, y: Tensor) -> Tensor:
        return Scaled.apply(y, self.scale)


class InNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.cumsum(x.detach().numpy(), 1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.flip(1).cumsum(1).flip(1)


class CustomNumpy(Net):
    def middle(self, y: Tensor) -> Tensor:
        return InNumpy.apply(y)


class Identity(Net):
    """A square matrix made in forward: its size is nobody's choice."""

    def middle(self, y: Tensor) -> Tensor:
        return y @ torch.eye(WIDTH, dtype=y.dtype)


HELD = {
    ThroughNumpy: NUMPY,
    ThroughArray: NUMPY.replace("numpy", "array"),
    ThroughLists: "left torch through tolist in the model, ",
    MeanByNumpy: NUMPY,
    OrderByNumpy: NUMPY,
    WeightByNumpy: NUMPY,
    CustomNumpy: NUMPY,
    WriteByNumpy: NUMPY,
    PickedByNumber: "picked by a number read out of data",
    Equal: "its value is read by forward",
    AllClose: "its value is read by forward",
    OrderThroughView: "indexed by data",
    Identity: "meets a constant made in forward by eye",
}
"""Networks that hold the odd layer's channels, with the reason; the next layer's are free all the same."""
CUT = (
    NumpyLate, Branch, While, SumAsFactor, Rows, AddToPart, ZeroPart, DoubleHalf, DoubleFirstHalf, SetOne,
    AddThroughView, Swap, Fill, CustomFunction,
)  # fmt: skip
"""Networks that are cut rightly."""
REFUSED = {OneAsFactor: "picks or fills other places than it did"}
"""Networks that are refused wherever the odd layer is cut."""


def made(kind: type[Net]) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return kind().eval(), torch.randn(ROWS, 6)


def plans(net: nn.Module, graph: niwaki.ChannelGraph) -> list[niwaki.Plan]:
    evidence = niwaki.collect(net, graph, frozenset())
    listed = []
    for seed in range(9):
        scores = niwaki.score(graph, evidence, how=niwaki.scores.Random(seed=seed))
        budget = niwaki.Budget(keep=(0.5, 0.7, 0.35)[seed % 3], of="units")
        listed.append(niwaki.choose(graph, scores, budget))
    return listed


@pytest.mark.parametrize("kind", [*HELD, *CUT, *REFUSED], ids=lambda kind: kind.__name__)
def test_never_a_wrong_answer(kind: type[Net]) -> None:
    net, example = made(kind)
    graph = niwaki.trace(net, example)
    cut = 0
    for plan in plans(net, graph):
        try:
            small = niwaki.cut(net, plan)
        except CannotCutError as refused:
            assert kind not in HELD and "eager: " in str(refused)
            continue
        cut += 1
        receipt = niwaki.verify(net, small, plan, example, seed=cut)
        if receipt.exact:
            assert receipt.passed, (kind.__name__, receipt)
        assert small(example).shape == (ROWS if kind is not Rows else 1, 3)
    assert cut == 9 if kind in HELD else cut >= (kind in CUT)


@pytest.mark.parametrize("kind", HELD, ids=lambda kind: kind.__name__)
def test_what_is_held_says_why(kind: type[Net]) -> None:
    net, example = made(kind)
    graph = niwaki.trace(net, example)
    reasons = {m.tensor: group.fixed for group in graph.groups for m in group.members if m.role == "out" or m.axis == 0}
    assert str(reasons["first.weight"]).startswith(HELD[kind])
    assert reasons["second.weight"] is None
    if HELD[kind] == NUMPY:
        assert "graph/test_hostile.py:" in str(reasons["first.weight"])


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_is_refused_says_why(kind: type[Net]) -> None:
    net, example = made(kind)
    graph = niwaki.trace(net, example)
    with pytest.raises(CannotCutError, match=REFUSED[kind]):
        for plan in plans(net, graph):
            niwaki.cut(net, plan)


@pytest.mark.parametrize("kind", [CustomFunction, DoubleFirstHalf, AddToPart], ids=lambda kind: kind.__name__)
def test_gradients_of_the_cut_model_are_the_masked_ones(kind: type[Net]) -> None:
    net, example = made(kind)
    net, example = net.double(), example.double()
    graph = niwaki.trace(net, example)
    plan = plans(net, graph)[1]
    small, masked = niwaki.cut(net, plan), niwaki.mask(net, plan)
    for model in (small, masked):
        model(example).square().sum().backward()
    cuts = plan.by_tensor()
    wide = dict(masked.named_parameters())
    for name, parameter in small.named_parameters():
        if wide[name].grad is None:
            assert parameter.grad is None
            continue
        expected = niwaki.plan.apply_cuts(wide[name].grad, cuts.get(name, []), name)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)


def test_reads_are_listed_with_their_place_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(6, 6), Branch())
    graph = niwaki.trace(net, torch.randn(2, 6))
    line = inspect.getsourcelines(Branch.forward)[1] + 2
    (read,) = graph.data_reads
    assert (read.operation, read.module, read.where) == ("item", "1", f"graph/test_hostile.py:{line}")
    told = json.loads(json.dumps(graph.to_json()))["data_reads"]
    assert told == [{"operation": "item", "module": "1", "where": f"graph/test_hostile.py:{line}"}]
    with caplog.at_level(logging.WARNING, logger="niwaki"):
        niwaki.cut(net, plans(net, graph)[0])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "only the path of the example is judged" in warning and f"test_hostile.py:{line}" in warning
    assert "never used: 1.part, 1.other.weight" in warning


def test_a_forward_without_reads_has_none(caplog: pytest.LogCaptureFixture) -> None:
    net, example = made(Net)
    assert niwaki.trace(net, example).data_reads == ()
    with caplog.at_level(logging.WARNING, logger="niwaki"):
        niwaki.cut(net, plans(net, niwaki.trace(net, example))[0])
    assert not caplog.records


class CountsConstants(Net):
    """Reads numbers of its own making: they are no data."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor([1, 2]))

    def middle(self, y: Tensor) -> Tensor:
        return y * int(self.steps.sum()) + int(torch.arange(3)[1])  # type: ignore[operator]


def test_numbers_that_the_model_made_are_no_data() -> None:
    net, example = made(CountsConstants)
    graph = niwaki.trace(net, example)
    assert graph.device == "meta" and not graph.data_reads
    small = niwaki.cut(net, plans(net, graph)[0])
    assert niwaki.verify(net, small, plans(net, graph)[0], example).passed


def test_a_plan_of_a_forward_that_reads_travels() -> None:
    """Cut by the file alone: the trace reads zeros then, and the check hears the same zeros."""
    net, example = made(SumAsFactor)
    plan = niwaki.Plan.from_json(plans(net, niwaki.trace(net, example))[0].to_json())
    small = niwaki.cut(net, plan)
    assert niwaki.verify(net, small, plan, example).passed
