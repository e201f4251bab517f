"""First-order estimates, by hand and beside finite differences; and the gradients they come from."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import niwaki
from niwaki.evidence import Need
from niwaki.scores import Magnitude, Taylor


def net() -> nn.Sequential:
    """y = sum_u v_u * (w_u x): w = (2, -3, 0), v = (1, 2, 5)."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0], [-3.0], [0.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, 2.0, 5.0]]))
    return model


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).sum()


def scores(model: nn.Module, how: Any, batches: list[Tensor], loss: Any = loss) -> list[float]:
    graph = niwaki.trace(model, batches[0])
    evidence = niwaki.collect(model, graph, how.needs, batches=batches, loss=loss)
    (values,) = niwaki.score(graph, evidence, how=how).values.values()
    return values.tolist()


@pytest.mark.parametrize("over", ["out", "in", "all"])
def test_by_hand(over: Any) -> None:
    """x = 1: dL/dw_u = v_u, so |w g| = |2 * 1|, |-3 * 2|, 0; at the consumer dL/dv_u = w_u: the same numbers."""
    assert scores(net(), Taylor(over=over), [torch.ones(1, 1)]) == [2.0, 6.0, 0.0]


def test_the_mean_gradient_over_batches() -> None:
    """x = 1 and x = 3: the mean gradient is that of x = 2; opposite inputs cancel."""
    assert scores(net(), Taylor(), [torch.ones(1, 1), 3 * torch.ones(1, 1)]) == [4.0, 12.0, 0.0]
    assert scores(net(), Taylor(), [torch.ones(1, 1), -torch.ones(1, 1)]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("over", ["out", "in"])
def test_beside_finite_differences(over: Any) -> None:
    """A slice scaled by 1 - h changes the loss by -h times the estimate, to first order; also past a bend (tanh)."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False)).double()
    batch, h = torch.randn(4, 3, dtype=torch.float64), 1e-6
    found = scores(model, Taylor(over=over), [batch], square)
    for unit in range(5):
        piece = model[0].weight[unit] if over == "out" else model[2].weight[:, unit]
        assert found[unit] == pytest.approx(abs(slope(model, [piece], batch, h)), rel=1e-4)


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(2).mean()


def slope(model: nn.Module, pieces: list[Tensor], batch: Tensor, h: float) -> float:
    """Change of the loss per h when all `pieces` of parameters are scaled by 1 - h."""
    with torch.no_grad():
        kept = [piece.clone() for piece in pieces]
        before = square(model, batch).item()
        for piece in pieces:
            piece *= 1 - h
        change = (square(model, batch).item() - before) / h
        for piece, old in zip(pieces, kept, strict=True):
            piece.copy_(old)
    return change


class Stream(nn.Module):
    """Two blocks write to one stream through batch norms; three layers read it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 1)
        self.na, self.nb = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.c, self.d = nn.Conv1d(4, 3, 1), nn.Conv1d(4, 3, 1)
        with torch.no_grad():
            for norm in (self.na, self.nb):
                for tensor in (norm.weight, norm.bias, norm.running_mean):
                    tensor.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.na(self.a(x)).relu()
        x = x + self.nb(self.b(x)).relu()
        return self.c(x) + self.d(x)


def test_a_stream_is_judged_by_all_who_read_it_at_once() -> None:
    """The removal of a unit silences every reader, so their parts add up with their signs; batch norm included."""
    torch.manual_seed(4)
    model = Stream().double().eval()
    batch = torch.randn(5, 2, 6, dtype=torch.float64)
    graph = niwaki.trace(model, batch)
    how = Taylor()
    evidence = niwaki.collect(model, graph, how.needs, batches=[batch], loss=square)
    values = niwaki.score(graph, evidence, how=how).values
    (stream,) = (group for group in graph.groups if not group.fixed)
    for unit in range(4):
        pieces = [layer.weight[:, unit] for layer in (model.b, model.c, model.d)]
        wanted = abs(slope(model, pieces, batch, 1e-6))
        assert values[stream.name][unit].item() == pytest.approx(wanted, rel=1e-4)


def test_signed_parts_may_cancel_and_others_may_not() -> None:
    """y = (v + u) h with v = 1, u = -1: the unit does nothing; readers judged one by one do not see it."""
    model = Twice()
    assert scores(model, Taylor(), [torch.ones(1, 1)]) == [0.0, 8.0]
    assert scores(model, Taylor(over="in", merge="mean"), [torch.ones(1, 1)]) == [2.0, 4.0]


class Twice(nn.Module):
    """h = (2, 2) x, read by (1, 1) and by (-1, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.v, self.u = (nn.Linear(*sizes, bias=False) for sizes in ((1, 2), (2, 1), (2, 1)))
        with torch.no_grad():
            self.h.weight.copy_(torch.tensor([[2.0], [2.0]]))
            self.v.weight.copy_(torch.tensor([[1.0, 1.0]]))
            self.u.weight.copy_(torch.tensor([[-1.0, 3.0]]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.h(x)
        return self.v(x) + self.u(x)


def test_the_model_is_as_before_and_old_gradients_do_not_enter() -> None:
    model = net().train()
    model[0].weight.grad = torch.full((3, 1), 100.0)
    model[1].weight.requires_grad_(False)
    assert scores(model, Taylor(over="in"), [torch.ones(1, 1)]) == [2.0, 6.0, 0.0]  # frozen weights are judged too
    assert model[0].weight.grad.tolist() == [[100.0]] * 3 and model[1].weight.grad is None
    assert [p.requires_grad for p in model.parameters()] == [True, False] and model.training


def test_dropout_and_batch_norm_are_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Dropout(0.9), nn.Linear(3, 1)).train()
    before = model[1].running_mean.clone()
    one, two = (scores(model, Taylor(), [torch.ones(2, 1)]) for _ in range(2))
    assert one == two and torch.equal(model[1].running_mean, before)


def test_refusals() -> None:
    model = net()
    graph = niwaki.trace(model, torch.ones(1, 1))
    needs = Taylor().needs
    assert needs == {Need.WEIGHT, Need.GRADIENT}
    for given in ({}, {"batches": [torch.ones(1, 1)]}, {"loss": loss}):
        with pytest.raises(niwaki.errors.InputError, match="no batches or no loss"):
            niwaki.collect(model, graph, needs, **given)
    with pytest.raises(niwaki.errors.InputError, match="no batches came"):
        niwaki.collect(model, graph, needs, batches=[], loss=loss)
    with pytest.raises(
        niwaki.errors.NotFiniteError, match=r"gradients as evidence; found: NaN or infinity; where: 0\.weight"
    ):
        niwaki.collect(model, graph, needs, batches=[torch.full((1, 1), float("nan"))], loss=loss)
    with pytest.raises(niwaki.errors.InputError, match="the model has no"):
        niwaki.collect(nn.Sequential(nn.ReLU(), nn.Linear(1, 1)), graph, needs)


def test_weights_alone_are_not_gradients() -> None:
    """Evidence collected for another score is refused with words, not with an assertion."""
    model = net()
    graph = niwaki.trace(model, torch.ones(1, 1))
    evidence = niwaki.collect(model, graph, Magnitude().needs)
    with pytest.raises(niwaki.errors.InputError):
        niwaki.score(graph, evidence, how=Taylor())


def test_an_error_in_the_loss_restores_the_model() -> None:
    model = net().train()
    model[1].weight.requires_grad_(False)

    def broken(m: nn.Module, b: Tensor) -> Tensor:
        raise ZeroDivisionError

    graph = niwaki.trace(model, torch.ones(1, 1))
    with pytest.raises(ZeroDivisionError):
        niwaki.collect(model, graph, Taylor().needs, batches=[torch.ones(1, 1)], loss=broken)
    assert model.training and [p.requires_grad for p in model.parameters()] == [True, False]


def test_batches_may_be_an_iterator() -> None:
    def stream() -> Iterator[Tensor]:
        yield torch.ones(1, 1)

    model = net()
    graph = niwaki.trace(model, torch.ones(1, 1))
    assert niwaki.collect(model, graph, Taylor().needs, batches=stream(), loss=loss).batches == 1
