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


def test_beside_finite_differences() -> None:
    """A slice scaled by 1 - h changes the loss by -h times the estimate, to first order."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False)).double()
    batch, h = torch.randn(4, 3, dtype=torch.float64), 1e-6

    def square(m: nn.Module, b: Tensor) -> Tensor:
        return m(b).pow(2).mean()

    found = scores(model, Taylor(), [batch], square)
    for unit in range(5):
        with torch.no_grad():
            before = square(model, batch).item()
            kept = model[0].weight[unit].clone()
            model[0].weight[unit] *= 1 - h
            change = (square(model, batch).item() - before) / h
            model[0].weight[unit] = kept
        assert found[unit] == pytest.approx(abs(change), rel=1e-4)


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
