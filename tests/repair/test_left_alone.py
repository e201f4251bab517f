"""What a refit must not touch, or touch once: shared tensors and norms, branches, modes, empty inputs, scaled norms."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import niwaki
from niwaki.repair import FoldedConstants, LeastSquares
from repair.test_constants import keeping
from repair.test_in_turn import CORNERS

INPUTS = ("whole", "cut")


class Two(nn.Module):
    """Three units, of which the third is told by the first (2 x1 + 1), read by two layers, each with a norm or none."""

    def __init__(self, *, tied: str = "", norm: str = "", bias: bool = True) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 3)
        self.one, self.two = (nn.Linear(3, 2, bias=bias) for _ in range(2))
        with torch.no_grad():
            self.hidden.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
            self.hidden.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
        if tied:
            setattr(self.two, tied, getattr(self.one, tied))
        self.norm, self.norms = norm, nn.BatchNorm1d(2)
        with torch.no_grad():
            self.norms.running_mean.copy_(torch.tensor([0.5, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        if self.norm == "inline":
            norms = self.norms
            return F.batch_norm(self.one(h), norms.running_mean, norms.running_var) + self.two(h)
        one, two = self.one(h), self.two(h)
        return self.norms(one) + self.norms(two) if self.norm == "shared" else one + two


def refitted(model: nn.Module, x: Tensor, gone: str = "hidden", **settings: Any) -> tuple[Any, tuple[str, ...]]:
    plan = keeping(model, x, {gone: [0, 1]})
    small = niwaki.cut(model, plan)
    return small, LeastSquares(ridge=1e-9, **settings)(model, small, plan, batches=[x])


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("tied", ["weight", "bias"])
def test_layers_that_share_a_tensor_are_named_and_stay(tied: str, inputs: Any) -> None:
    torch.manual_seed(0)
    model = Two(tied=tied).eval()
    small, skipped = refitted(model, CORNERS, inputs=inputs)
    assert sorted(skipped) == ["one", "two"]
    for name in ("one", "two"):
        assert torch.equal(getattr(small, name).weight, getattr(model, name).weight[:, :2])
        assert torch.equal(getattr(small, name).bias, getattr(model, name).bias)


def test_constants_of_layers_that_share_a_bias_stay_out_of_it() -> None:
    torch.manual_seed(0)
    model = Two(tied="bias").eval()
    plan = keeping(model, CORNERS, {"hidden": [0, 1]})
    small = niwaki.cut(model, plan)
    assert sorted(FoldedConstants("mean")(model, small, plan, batches=[CORNERS])) == ["one", "two"]
    assert torch.equal(small.one.bias, model.one.bias)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("norm", ["shared", "inline"])
def test_a_norm_of_two_layers_or_of_no_module_takes_no_constant(norm: str, inputs: Any) -> None:
    """What is removed is told whole by what stays, so that the cut network computes what it did."""
    torch.manual_seed(0)
    model = Two(norm=norm, bias=False).eval()
    small, skipped = refitted(model, CORNERS, inputs=inputs)
    assert skipped == ()
    assert torch.equal(small.norms.running_mean, model.norms.running_mean)
    assert torch.allclose(small(CORNERS), model(CORNERS), atol=1e-4)


class Tokens(nn.Module):
    """A norm over places, which are where channels would be, behind a layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.read, self.norm = nn.Linear(2, 3), nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.read(input=self.hidden(x)))


@pytest.mark.parametrize("inputs", INPUTS)
def test_a_norm_over_places_takes_no_constant(inputs: Any) -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    with torch.no_grad():
        model.hidden.weight[2] = 2 * model.hidden.weight[0]
        model.hidden.bias[2] = 2 * model.hidden.bias[0] + 1
    x = torch.randn(16, 4, 2)
    small, skipped = refitted(model, x, inputs=inputs)
    assert skipped == ()
    assert torch.equal(small.norm.running_mean, model.norm.running_mean)
    assert torch.allclose(small(x), model(x), atol=1e-4)


def test_one_position_settles_no_norm() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    small, _ = refitted(model, torch.ones(1, 2), gone="0", inputs="cut")
    assert all(bool(tensor.isfinite().all()) for tensor in small.state_dict().values())


@pytest.mark.parametrize("inputs", INPUTS)
def test_layers_whose_weight_is_computed_are_named_and_stay(inputs: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    model.eval()
    small, skipped = refitted(model, CORNERS, gone="0", inputs=inputs)
    assert any(name.startswith("1") for name in skipped)
    direction = model[1].parametrizations.weight.original1
    assert torch.equal(small[1].parametrizations.weight.original1, direction[:, :2])


class Branch(nn.Module):
    """A sum that has lost one unit before a layer whose output is added to it, and put out by itself, too."""

    def __init__(self, *, read: bool) -> None:
        super().__init__()
        self.hidden, self.out, self.inner, self.last = (nn.Linear(2, 2, bias=False) for _ in range(4))
        self.read = read
        with torch.no_grad():
            for layer in (self.hidden, self.out, self.inner, self.last):
                layer.weight.copy_(torch.eye(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x + self.out(self.hidden(x))
        y = self.last(self.inner(x))
        return (x + y, y * 2) if self.read else (x + y,)


@pytest.mark.parametrize("read", [False, True])
def test_a_branch_that_is_read_elsewhere_is_not_bent(read: bool) -> None:
    """(2 x1, 2 x2), and the same once more. Without the second hidden unit the sum has x2 there. What is added then is
    3 x2 where nothing else reads it, and 2 x2, as it was, where something does.
    """
    model = Branch(read=read).eval()
    plan = keeping(model, CORNERS, {"hidden": [0]})
    small = niwaki.cut(model, plan)
    LeastSquares(ridge=1e-9, inputs="cut", raises=0)(model, small, plan, batches=[CORNERS])
    x = torch.tensor([[1.0, 1.0]])
    found = small.last(small.inner(x + small.out(small.hidden(x))))
    assert found.tolist()[0] == pytest.approx([2.0, 2.0 if read else 3.0], abs=1e-4)


class Merging(nn.Linear):
    """Takes a second matrix into its weight for evaluation."""

    merged = False

    def train(self, mode: bool = True) -> "Merging":
        self.merged = not mode
        return super().train(mode)


def test_modes_that_are_more_than_a_flag_are_taken_back() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), Merging(2, 2))
    plan = keeping(model, CORNERS, {"0": [0, 1]})
    small = niwaki.cut(model, plan).train()
    model.train()
    LeastSquares(inputs="cut")(model, small, plan, batches=[CORNERS])
    assert all(network.training and not network[2].merged for network in (model, small))


class Seldom(nn.Module):
    """A layer that is called on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.read, self.never = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.read(h) + self.never(h[:0]).sum()


@pytest.mark.parametrize("inputs", INPUTS)
def test_a_layer_that_was_given_nothing_is_named_and_stays(inputs: Any) -> None:
    model = Seldom().eval()
    small, skipped = refitted(model, CORNERS, inputs=inputs)
    assert skipped == ("never",)
    assert torch.equal(small.never.weight, model.never.weight[:, :2])
    assert torch.equal(small.never.bias, model.never.bias)
    assert all(bool(tensor.isfinite().all()) for tensor in small.state_dict().values())


class Widened(nn.Module):
    """A factor that follows the width, which the norm before it makes good."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        return self.out(x * x.shape[1])


def test_a_layer_before_a_scaled_norm_stays() -> None:
    torch.manual_seed(0)
    model = Widened().eval()
    small, _ = refitted(model, CORNERS, gone="first", inputs="cut")
    assert torch.allclose(small.norm.weight, 2 * model.norm.weight[:2])
    assert torch.equal(small.first.weight, model.first.weight[:2])


class Normed(nn.Module):
    """A layer without a bias, with a norm behind it that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.read, self.norm = nn.Linear(2, 3), nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)
        with torch.no_grad():
            self.hidden.weight[2] = 2 * self.hidden.weight[0]
            self.hidden.bias[2] = 2 * self.hidden.bias[0] + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.read(self.hidden(x)))


@pytest.mark.parametrize("inputs", INPUTS)
def test_a_norm_called_by_keyword_takes_the_constant(inputs: Any) -> None:
    torch.manual_seed(0)
    model, x = Normed().eval(), torch.randn(64, 2)
    small, skipped = refitted(model, x, inputs=inputs)
    assert skipped == ()
    assert small.read.bias is None
    assert not torch.equal(small.norm.running_mean, model.norm.running_mean)
    assert torch.allclose(small(x), model(x), atol=1e-4)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("tensor", ["one.weight", "one.bias", "norm.running_mean", "norm.weight"])
def test_what_lies_in_the_memory_of_another_tensor_is_not_written(tensor: str, inputs: Any) -> None:
    """Of four numbers the last two, or two rows, are the layer's or the norm's too; those beside them are not."""
    torch.manual_seed(0)
    model = Normed().eval() if "norm" in tensor else Two().eval()
    x = torch.randn(64, 2)
    plan = keeping(model, x, {"hidden": [0, 1]})
    small = niwaki.cut(model, plan)
    path, _, leaf = tensor.partition(".")
    owner = small.get_submodule(path)
    part = getattr(owner, leaf).detach()
    small.register_buffer("whole", torch.cat([torch.zeros_like(part), part]))
    view = small.whole[len(part) :]
    setattr(owner, leaf, nn.Parameter(view) if leaf in ("weight", "bias") else view)
    before = small.whole.clone()
    skipped = LeastSquares(ridge=1e-9, inputs=inputs)(model, small, plan, batches=[x])
    assert skipped == (("one",) if path == "one" else ())
    assert torch.equal(small.whole, before)
    if path == "norm":  # the layer takes the constant itself
        assert torch.allclose(small(x), model(x), atol=1e-4)
