"""Where channels can be taken over by others, by structure alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import niwaki
from niwaki.repair.sites import Site, bend_of, structure_of

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def sites(model: nn.Module, example: Any = X) -> dict[str, Site]:
    return {
        site.weight.removesuffix(".weight"): site for site in structure_of(niwaki.trace(model.eval(), example)).sites
    }


def reasons(model: nn.Module, example: Any = X) -> dict[str, str | None]:
    return {name: site.reason for name, site in sites(model, example).items()}


class Block(nn.Module):
    """Stem, two branches of a sum with a bottleneck in one, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.b(F.silu(self.norm(self.a(x))))
        return self.head(x.mean((2, 3)))


def test_a_residual_block_keeps_its_sum() -> None:
    found = sites(Block())
    assert {name: site.reason for name, site in found.items()} == {
        "stem": "add in the model reads them",
        "a": None,
        "b": "add in the model reads them",
        "head": "output of the model",
    }
    (path,) = found["a"].paths
    assert path.reader == "b.weight" and path.rows == (0, 6) and path.inexact == ()
    assert path.members.tolist() == [0, 1, 2, 3] and path.positions.tolist() == [[0], [1], [2], [3]]
    (norm,) = path.norms
    assert (norm.gamma, norm.variance, norm.eps) == ("norm.weight", "norm.running_var", 1e-5)
    assert norm.positions.tolist() == [0, 1, 2, 3]
    assert bend_of(path.bend)[0] == "silu"


class Chain(nn.Module):
    """Largest of a window, then every place laid end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))


def test_channels_laid_end_to_end() -> None:
    (path,) = sites(Chain())["conv"].paths
    assert path.positions.tolist() == [list(range(9 * c, 9 * c + 9)) for c in range(4)]
    assert path.inexact == ("max_pool2d_with_indices",)


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.filter, self.down = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu6(self.second(self.filter(F.relu6(self.first(self.up(x)))))))


def test_a_depthwise_filter_lies_on_the_path() -> None:
    model = Separable()
    (path,) = sites(model)["up"].paths
    assert path.depthwise is not None and path.depthwise.weight == "filter.weight"
    assert path.depthwise.positions.tolist() == [0, 1, 2, 3]
    assert [norm.mean for norm in path.norms] == ["first.running_mean"]
    assert [norm.mean for norm in path.after] == ["second.running_mean"]
    assert bend_of(path.bend)[0] == bend_of(path.bend_after)[0] == "relu6"
    assert path.reader == "down.weight"
    graph = niwaki.trace(model.eval(), X)
    assert [(layer.weight, layer.depthwise) for layer in structure_of(graph).layers] == [
        ("up.weight", False), ("filter.weight", True), ("down.weight", False)
    ]  # fmt: skip


class Dense(nn.Module):
    """Two layers side by side, bent by one norm each time they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.one, self.two = nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.a(x), self.b(x)], 1)
        return self.one(F.relu(self.norm(both))) + self.two(both)


def test_a_concatenation_shifts_positions_and_every_reader_has_its_path() -> None:
    found = sites(Dense())
    assert found["a"].reason is None and found["b"].reason is None
    one, two = found["b"].paths
    assert (one.reader, two.reader) == ("one.weight", "two.weight")
    assert one.positions.ravel().tolist() == two.positions.ravel().tolist() == [2, 3, 4]
    assert one.norms[0].positions.tolist() == [2, 3, 4] and two.norms == ()
    assert one.bend is not None and two.bend is None


class Halves(nn.Module):
    """One half goes on to one layer, the other to another, which has groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 6, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).relu().chunk(2, 1)
        return self.left(a).mean() + self.right(b).mean()


def test_halves_and_groups_are_paths_of_their_own() -> None:
    left, first, second = sites(Halves())["conv"].paths
    assert left.members.tolist() == [0, 1, 2, 3] and left.rows == (0, 2)
    assert first.members.tolist() == [4, 5] and first.rows == (0, 3) and first.positions.tolist() == [[0], [1]]
    assert second.members.tolist() == [6, 7] and second.rows == (3, 6) and second.positions.tolist() == [[0], [1]]


class Odd(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.head = how, nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        self.norm, self.twice, self.up = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 2, 1)
        self.gate, self.slope = nn.Conv2d(4, 4, 1), nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "gate":
            return self.head(x * torch.sigmoid(self.gate(x)))
        if self.how == "norm behind":
            return self.head(self.norm(x.relu()))
        if self.how == "twice bent":
            return self.head(x.relu().tanh())
        if self.how == "slope":
            return self.head(self.slope(x))
        if self.how == "called twice":
            return self.head(self.twice(self.twice(x)))
        if self.how == "transposed":
            return self.up(x)
        if self.how == "read twice":
            return F.conv2d(torch.cat([x, x.relu()], 1), torch.cat([self.head.weight, self.head.weight], 1))
        if self.how == "written through a view":
            view = x.view(x.shape)
            torch.relu_(x)
            return self.head(view)
        if self.how == "a slice bent in place":
            x[:, :2].relu_()
            return self.head(x)
        if self.how == "an exponent":
            return self.head(torch.pow(2.0, x))
        if self.how == "own weight elsewhere":
            return self.head(x) * self.conv.weight.sum()
        if self.how == "reader elsewhere":
            return self.head(x) + self.head.weight.sum(1)
        if self.how == "computed norm":
            norm = self.norm
            return self.head(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight * 2, norm.bias))
        assert self.how == "instance"
        return self.head(F.instance_norm(x))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("gate", "mul in the model reads them"),
        ("norm behind", "a batch norm behind the activation, in norm"),
        ("twice bent", "tanh in the model bends them once more"),
        ("slope", "_prelu_kernel in slope reads them"),
        ("called twice", "twice.weight reads them and is called more than once"),
        ("transposed", "a transposed convolution in up reads them"),
        ("written through a view", "convolution in head reads them after a part of them was written over"),
        ("a slice bent in place", "convolution in head reads them after a part of them was written over"),
        ("an exponent", "pow in the model reads them"),
        ("own weight elsewhere", "sum in the model reads conv.weight besides"),
        ("reader elsewhere", "sum in the model reads head.weight besides"),
        ("computed norm", "the batch norm in the model takes tensors that the model computes"),
    ],
)
def test_what_is_refused_and_why(how: str, reason: str) -> None:
    assert reasons(Odd(how))["conv"] == reason


@pytest.mark.parametrize("how", ["read twice", "instance"])
def test_what_is_not_understood_is_refused(how: str) -> None:
    assert reasons(Odd(how))["conv"] is not None


def test_activations_come_with_their_settings_and_leave_the_input_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU(0.3, inplace=True), nn.Conv2d(4, 2, 1))
    (path,) = sites(model)["0"].paths
    name, bend = bend_of(path.bend)
    x = torch.tensor([-1.0, 2.0])
    assert name == "leaky_relu" and np.allclose(bend(x), [-0.3, 2.0]) and x.tolist() == [-1.0, 2.0]


class Bare(nn.Module):
    """A matrix `[inputs, outputs]`, one turned twice, and activations in place behind views."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(5, 2)
        self.matrix, self.other = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.second(torch.relu_(self.first(x)))) @ self.matrix
        return self.last(torch.relu(x) @ self.other.t())


def test_a_bare_matrix_is_no_layer_unless_it_is_turned() -> None:
    x = torch.randn(2, 5, 3)
    assert reasons(Bare(), x) == {
        "first": None,
        "second": "a product with a matrix of [inputs, outputs] in the model reads them",
        "matrix": "a product with a matrix of [inputs, outputs]",
        "other": None,
        "last": "output of the model",
    }
    assert {layer.weight: layer.axis for layer in structure_of(niwaki.trace(Bare().eval(), x)).layers} == {
        "first.weight": 0, "second.weight": 0, "matrix": 1, "other": 0, "last.weight": 0,
    }  # fmt: skip
    up = niwaki.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 2, 1)).eval(), X)
    assert [layer.axis for layer in structure_of(up).layers] == [0, 1]


class Split(nn.Module):
    """The second half goes through a depthwise filter, the first around it; borders filled with ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.each = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, groups=4)
        self.left, self.right = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.conv(x).relu().chunk(2, 1)
        return self.left(F.pad(left, (1, 1), value=1.0)), self.right(self.each(right))


def test_a_depthwise_filter_of_some_channels() -> None:
    left, right = sites(Split())["conv"].paths
    assert left.members.tolist() == [0, 1, 2, 3] and left.inexact == ("constant_pad_nd",)
    assert right.members.tolist() == [4, 5, 6, 7]
    assert right.depthwise is not None and right.depthwise.positions.tolist() == [0, 1, 2, 3]


class MaskedWhileTraining(nn.Module):
    """A vector that stands in for masked tokens, in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.stand_in = nn.Linear(6, 8), nn.Linear(8, 6), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.training:
            y[torch.arange(5, device=x.device).expand(2, 5) % 2 == 0] = self.stand_in
        return self.down(y)


def test_what_only_training_ties_to_channels_is_seen() -> None:
    assert reasons(MaskedWhileTraining(), torch.randn(2, 5, 6))["up"] == "stand_in shares them"
