"""The simulated network: numbers by hand, and a copy that leaves the model alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from laws.common import same_bits, tensors_of
from niwaki.errors import InputError
from niwaki.quantize import Ranges, Uniform, from_inputs, simulated


def test_by_hand() -> None:
    """Weights 1 and 0.24 in 3 bits: 1 and 1/3. Inputs 0.9 and 2.2 in 2 bits over 0 .. 3: 1 and 2. 1 + 2/3."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).requires_grad_(False)
    model[0].weight.data = torch.tensor([[1.0, 0.24]])
    weights = {"0.weight": Uniform(bits=3)(model[0].weight)}
    x = torch.tensor([[0.9, 2.2]])
    assert float(simulated(model, weights)(x)) == pytest.approx(0.9 + 2.2 / 3)
    assert float(simulated(model, weights, Ranges({"0": (0.0, 3.0)}), bits=2)(x)) == pytest.approx(1 + 2 / 3)
    assert float(simulated(model, {}, Ranges({"0": (0.0, 3.0)}), bits=2)(x)) == pytest.approx(1 + 0.48)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(input=x) + x


def test_terms_of_sums_and_named_arguments_by_hand() -> None:
    """The layer is given 1 for 1.4 and puts out 2.6 * 1, which falls to 3; x itself stays 1.4."""
    model = Sum().requires_grad_(False)
    model.a.weight.data.fill_(2.6)
    ranges = Ranges({"a": (0.0, 3.0)}, outputs={"a": (0.0, 3.0)})
    assert float(simulated(model, {}, ranges, bits=2)(torch.tensor([[1.4]]))) == pytest.approx(4.4)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def test_the_model_stays_as_it_is() -> None:
    model = network().train()
    before, x = copy.deepcopy(model), torch.randn(5, 2, 6, 6)
    weights = {name: Uniform()(p) for name, p in model.named_parameters() if p.dim() > 1}
    reference = simulated(model, weights, from_inputs(model, [x]))
    reference(x)
    assert not reference.training and model.training
    for name, tensor in tensors_of(before).items():
        assert same_bits(tensor, tensors_of(model)[name])
    modules = [*model.modules(), *reference.modules()]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules)


def test_more_bits_come_nearer() -> None:
    model, x = network().eval().requires_grad_(False), torch.randn(5, 2, 6, 6)
    ranges, exact = from_inputs(model, [x]), model(x)
    off = []
    for bits in (2, 4, 6, 8):
        weights = {name: Uniform(bits)(p) for name, p in model.named_parameters() if p.dim() > 1}
        off.append(float((simulated(model, weights, ranges, bits=bits)(x) - exact).norm() / exact.norm()))
    assert off == sorted(off, reverse=True) and off[-1] < 0.02 and off[0] > 0.1
    assert same_bits(simulated(model, {})(x), exact)


def test_refusals() -> None:
    model = network()
    with pytest.raises(InputError, match="no parameter of that name"):
        simulated(model, {"9.weight": Uniform()(torch.ones(2))})
    with pytest.raises(InputError, match=r"simulate 0\.weight \(2,\); found: \(4, 2, 3, 3\)"):
        simulated(model, {"0.weight": Uniform()(torch.ones(2))})
    with pytest.raises(InputError, match="activations at 9"):
        simulated(model, {}, Ranges({"9": (0.0, 1.0)}))
    for bits in (1, 9):
        with pytest.raises(InputError, match="2 to 8"):
            simulated(model, {}, bits=bits)
