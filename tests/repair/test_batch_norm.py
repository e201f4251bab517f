"""Statistics as plain averages over batches, by hand; nothing else changes."""

from typing import Any

import pytest
import torch
from torch import nn

import niwaki
from niwaki.repair import BatchNormStatistics


def net() -> nn.Sequential:
    """The norm sees its input as it is: a linear layer that copies."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        model[1].running_mean.fill_(7.0)
        model[1].running_var.fill_(9.0)
    return model


BATCHES = [torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [0.0], [6.0]])]


def test_means_and_unbiased_variances_by_hand() -> None:
    """Batch means 2 and 2; unbiased variances 2 and 12: averages 2 and 7. The second channel is twice the first."""
    model = net().eval()
    assert BatchNormStatistics()(model, BATCHES) == 2
    assert model[1].running_mean.tolist() == pytest.approx([2.0, 4.0])
    assert model[1].running_var.tolist() == pytest.approx([7.0, 28.0])


def test_one_batch_replaces_the_old_statistics() -> None:
    model = net().eval()
    assert BatchNormStatistics()(model, BATCHES[:1]) == 1
    assert model[1].running_mean.tolist() == pytest.approx([2.0, 4.0])


@pytest.mark.parametrize("momentum", [0.1, None, 0.9])
def test_the_norms_momentum_does_not_matter_and_stays(momentum: Any) -> None:
    model = net().eval()
    model[1].momentum = momentum
    BatchNormStatistics()(model, BATCHES)
    assert model[1].momentum == momentum and model[1].running_mean.tolist() == pytest.approx([2.0, 4.0])


@pytest.mark.parametrize("training", [True, False])
def test_weights_modes_gradients_and_random_state_stay(training: bool) -> None:
    model = net().train(training)
    model[2].train(not training)
    model[0].weight.grad = torch.ones(2, 1)
    before = [p.detach().clone() for p in model.parameters()]
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    BatchNormStatistics()(model, iter(BATCHES))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and model[0].weight.grad.tolist() == [[1.0], [1.0]]


def test_a_norm_called_twice_averages_over_its_calls() -> None:
    """x and 10 x go through the same norm: means 2 and 20 in one batch, 11 together."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.norm(10 * x)

    model = Twice().eval()
    BatchNormStatistics()(model, [BATCHES[0]])
    assert model.norm.running_mean.tolist() == pytest.approx([11.0])


def test_later_norms_see_what_earlier_ones_put_out_in_training() -> None:
    """Second norm's input is the first one's, normalised by the batch: mean 0, unbiased variance n / (n - 1) = 2."""
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1)).eval()
    BatchNormStatistics()(model, BATCHES[:1])
    assert model[1].running_mean.tolist() == pytest.approx([0.0], abs=1e-6)
    assert model[1].running_var.tolist() == pytest.approx([2.0], rel=1e-4)


def test_models_without_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert BatchNormStatistics()(model, BATCHES) == 0
    assert BatchNormStatistics()(nn.Linear(1, 1), []) == 0


def test_inputs_as_dictionaries_and_tuples() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.norm(x + y)

    model = Named().eval()
    BatchNormStatistics()(model, [{"x": BATCHES[0], "y": BATCHES[0]}, (BATCHES[0], BATCHES[0])])
    assert model.norm.running_mean.tolist() == pytest.approx([4.0])


def test_no_batches_are_refused_and_the_old_statistics_stay() -> None:
    model = net().eval()
    with pytest.raises(niwaki.errors.InputError, match="re-estimate batch norm; found: no batches"):
        BatchNormStatistics()(model, [])
    assert model[1].running_mean.tolist() == [7.0, 7.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_and_the_old_statistics_are_back(bad: float) -> None:
    model = net().eval()
    with pytest.raises(niwaki.errors.NotFiniteError, match=r"1\.running_mean"):
        BatchNormStatistics()(model, [BATCHES[0], torch.tensor([[bad], [1.0]])])
    assert model[1].running_mean.tolist() == [7.0, 7.0] and model[1].running_var.tolist() == [9.0, 9.0]
    assert int(model[1].num_batches_tracked) == 0


def test_an_interruption_brings_the_old_statistics_back() -> None:
    def stream() -> Any:
        yield BATCHES[0]
        raise KeyboardInterrupt

    model = net().train()
    with pytest.raises(KeyboardInterrupt):
        BatchNormStatistics()(model, stream())
    assert model[1].running_mean.tolist() == [7.0, 7.0] and model[1].momentum == 0.1 and model.training


def test_through_the_exported_door() -> None:
    """A model whose forward hard-codes a width is cut by torch.export; its statistics are estimated all the same."""

    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.norm(self.a(x)).view(-1, 8).relu())

    torch.manual_seed(0)
    model, batches = Hard().eval(), [torch.randn(6, 3) for _ in range(3)]
    graph = niwaki.trace(model, batches[0])
    how = niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="units"))
    small = niwaki.cut(model, plan)
    assert niwaki.verify(model, small, plan, batches[0]).door == "exported"
    assert BatchNormStatistics()(small, batches) == 3
    values = [
        batch @ small.get_parameter("a.weight").detach().T + small.get_parameter("a.bias").detach() for batch in batches
    ]
    mean = torch.stack([v.mean(0) for v in values]).mean(0)
    variance = torch.stack([v.var(0) for v in values]).mean(0)
    assert torch.allclose(small.get_buffer("norm.running_mean"), mean, atol=1e-5)
    assert torch.allclose(small.get_buffer("norm.running_var"), variance, atol=1e-5)
