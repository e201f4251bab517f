"""The rate of slimming over the epochs, and what it adds to gradients."""

import pytest
import torch
from torch import nn

from niwaki.errors import InputError, UnknownNameError
from niwaki.pressure import Moment, Slimming


def normed(gamma, beta=None):
    """One batch norm with these scales, and gradients of 0."""
    norm = nn.BatchNorm1d(len(gamma))
    norm.weight.data = torch.tensor(gamma)
    norm.bias.data = torch.tensor(beta or [0.0] * len(gamma))
    norm.weight.grad, norm.bias.grad = torch.zeros(len(gamma)), torch.zeros(len(gamma))
    return norm


def at(epoch, epochs):
    return Moment(epoch, epochs, 10 * epoch, 10 * epochs)


def test_defaults():
    """s of public code for detectors; the schedule of Liu et al."""
    assert vars(Slimming()) == {"rate": 1e-4, "schedule": "constant", "shifts": 0.0, "scales": None}


def test_the_page_s_schedule_by_hand():
    """s = 2e-4 over 100 epochs: 2e-4, 1.1e-4 and 2.18e-5; gamma (0.5, -0.5, 0) gets (1.1e-4, -1.1e-4, 0) half-way."""
    how = Slimming(2e-4, "decreasing")
    assert [how.at(epoch, 100) for epoch in (0, 50, 99)] == pytest.approx([2e-4, 1.1e-4, 2.18e-5])
    net = normed([0.5, -0.5, 0.0])
    how(net, how.memory(net), at(50, 100))
    assert net.weight.grad.tolist() == pytest.approx([1.1e-4, -1.1e-4, 0.0]) and net.weight.grad[2] == 0
    assert net.bias.grad.tolist() == [0, 0, 0]


def test_the_opposite_schedule_and_the_constant_one():
    rising, constant = Slimming(2e-4, "increasing"), Slimming(2e-4)
    assert [rising.at(epoch, 100) for epoch in (0, 50, 100)] == pytest.approx([2e-5, 1.1e-4, 2e-4])
    assert {constant.at(epoch, 7) for epoch in range(7)} == {2e-4}


def test_gradients_are_added_to_not_replaced():
    net = normed([1.0, -1.0])
    net.weight.grad += 3
    Slimming(0.5)(net, {}, at(0, 1))
    assert net.weight.grad.tolist() == [3.5, 2.5]


def test_shifts_have_their_own_rate_that_does_not_fall():
    net = normed([1.0, 1.0], [0.3, -0.3])
    Slimming(1e-4, "decreasing", shifts=10.0)(net, {}, at(50, 100))
    assert net.bias.grad.tolist() == pytest.approx([1e-3, -1e-3])
    assert net.weight.grad.tolist() == pytest.approx([5.5e-5, 5.5e-5])


def test_named_scales_alone_and_scales_that_no_loss_reached():
    net = nn.Sequential(normed([1.0]), normed([1.0]))
    net[1].weight.grad = None
    Slimming(0.5, scales=("1.weight",))(net, {}, at(0, 1))
    assert net[0].weight.grad.tolist() == [0] and net[1].weight.grad is None


@pytest.mark.parametrize("rate", [0, -1e-4, float("nan"), float("inf"), "1"])
def test_rates_that_are_none(rate):
    with pytest.raises(InputError, match="a rate above 0"):
        Slimming(rate)


def test_other_refusals():
    with pytest.raises(UnknownNameError, match="constant, decreasing, increasing"):
        Slimming(schedule="falling")
    with pytest.raises(InputError, match="shifts=-1"):
        Slimming(shifts=-1)
    plain = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(InputError, match=r"no batch norm.*not folded into its convolutions"):
        Slimming().memory(plain)
    with pytest.raises(InputError, match="batch norms without a trained scale"):
        Slimming().memory(nn.BatchNorm1d(2, affine=False))
    with pytest.raises(UnknownNameError, match="parameter to press"):
        Slimming(scales=("norm.weight",)).memory(plain)
    with pytest.raises(InputError, match=r"press 0.weight; found: shape \(2, 2\)"):
        Slimming(scales=("0.weight",)).memory(plain)
    with pytest.raises(InputError, match="an empty list"):
        Slimming(scales=()).memory(plain)
    frozen = nn.BatchNorm1d(2).requires_grad_(False)
    with pytest.raises(InputError, match="it is not trained"):
        Slimming(scales=("weight",)).memory(frozen)
