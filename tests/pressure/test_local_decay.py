"""Which scales dynamic sparse training lets go of, and when."""

import pytest
import torch
from torch import nn

from niwaki.errors import InputError
from niwaki.pressure import LocalDecay, Moment


def normed(*scales):
    """Batch norms with these scales, and gradients of 0."""
    net = nn.Sequential(*(nn.BatchNorm1d(len(gamma)) for gamma in scales))
    for norm, gamma in zip(net, scales, strict=True):
        norm.weight.data, norm.weight.grad = torch.tensor(gamma), torch.zeros(len(gamma))
    return net


def added(how, net, epoch, epochs=10):
    for norm in net:
        norm.weight.grad.zero_()
    how(net, how.memory(net), Moment(epoch, epochs, epoch, epochs))
    return [norm.weight.grad.tolist() for norm in net]


def test_defaults_are_those_of_the_authors_code():
    assert vars(LocalDecay()) == {"rate": 1e-3, "switch": 0.4, "quantile": 0.65, "protected": 0.01, "sets": None}


def test_both_phases_by_hand():
    """gamma (0.9, -0.2, 0.05, 0.5), q = 0.65: the third of four, 0.5, is the limit, 0.9 and 0.5 are protected."""
    how, net = LocalDecay(1e-3), normed([0.9, -0.2, 0.05, 0.5])
    assert how.limit([net[0].weight]) == 0.5
    assert added(how, net, 0)[0] == pytest.approx([1e-3, -1e-3, 1e-3, 1e-3])
    assert added(how, net, 5)[0] == pytest.approx([1e-5, -1e-3, 1e-3, 1e-5])


def test_the_switch_is_the_first_epoch_after_its_share():
    """Of 10 epochs, number 4 (0.4 of 10) is uniform still; in the next one small ones get 100 times what large get."""
    how, net = LocalDecay(1e-3), normed([0.9, -0.2, 0.05, 0.5])
    assert len({abs(x) for x in added(how, net, 4)[0]}) == 1
    large, small, _, _ = added(how, net, 5)[0]
    assert abs(small) / large == pytest.approx(100)


def test_shares_that_binary_misses():
    """0.29 of 100 is 28.999999999999996 as a float: epoch 29 is uniform still, and value 29 of the sorted is the limit.
    No share below 1 protects nothing."""
    how, net = LocalDecay(1e-3, switch=0.29, quantile=0.5), normed([0.9, 0.1])
    assert len({abs(x) for x in added(how, net, 29, 100)[0]}) == 1
    assert len({abs(x) for x in added(how, net, 30, 100)[0]}) == 2
    hundred = [nn.Parameter(torch.arange(100.0))]
    assert LocalDecay(1e-3, quantile=0.29).limit(hundred) == 29
    assert LocalDecay(1e-3, quantile=1 - 1e-13).limit(hundred) == 99


def test_a_scale_of_zero_gets_nothing():
    net = normed([0.0, 1.0, -1.0])
    assert added(LocalDecay(0.5), net, 0)[0] == [0, 0.5, -0.5]
    assert added(LocalDecay(0.5), net, 9)[0][0] == 0


def test_the_limit_is_of_the_whole_network_unless_sets_are_given():
    """Scales 1..4 and 0.1..0.4: of all eight the upper half is protected, or the upper half of each set."""
    net = normed([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4])
    kept = [[x < 0.1 for x in row] for row in added(LocalDecay(0.5, quantile=0.5), net, 9)]
    assert kept == [[True] * 4, [False] * 4]
    apart = LocalDecay(0.5, quantile=0.5, sets=(("0.weight",), ("1.weight",)))
    assert [[x < 0.1 for x in row] for row in added(apart, net, 9)] == [[False, False, True, True]] * 2


def test_the_protected_follow_the_scales_from_step_to_step():
    how, net = LocalDecay(0.5, quantile=0.5), normed([1.0, 2.0])
    assert added(how, net, 9)[0] == pytest.approx([0.5, 0.005])
    net[0].weight.data = torch.tensor([3.0, 2.0])
    assert added(how, net, 9)[0] == pytest.approx([0.005, 0.5])


def test_a_quantile_of_zero_is_global_decay():
    assert added(LocalDecay(0.5, quantile=0.0), normed([1.0, 2.0]), 9)[0] == pytest.approx([0.005, 0.005])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0}, "a rate above 0"),
        ({"switch": 1.5}, r"switch=1.5\); do: give a share in \[0, 1\]"),
        ({"quantile": 1.0}, r"quantile=1.0\); do: give a share in \[0, 1\)"),
        ({"quantile": float("nan")}, "quantile=nan"),
        ({"protected": -0.1}, "protected=-0.1"),
        ({"sets": (("a.weight",), ("b.weight", "a.weight"))}, "a.weight; found: it is in two sets"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(InputError, match=message):
        LocalDecay(**settings)
