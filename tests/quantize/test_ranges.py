"""Ranges of activations: by hand from batch norm, measured from inputs, and named where there are none."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws.common import same_bits, tensors_of
from niwaki.errors import FileDamagedError, InputError, NotFiniteError
from niwaki.quantize import Grid, Ranges, from_batch_norm, from_inputs


def norm(gamma: list[float], beta: list[float]) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(len(gamma))
    with torch.no_grad():
        made.weight.copy_(torch.tensor(gamma))
        made.bias.copy_(torch.tensor(beta))
        made.running_mean.fill_(0.5)  # trained
    return made


def chain(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), norm([1.0, -0.5], [0.5, -1.0]), *middle, nn.Flatten(), nn.Linear(2 * 16, 3)
    )


EXAMPLE = torch.zeros(1, 1, 4, 4)


@pytest.mark.parametrize(
    ("middle", "expected"),
    [
        ([], (-5.5, 6.5)),  # 0.5 -+ 6, -1 -+ 3
        ([nn.ReLU()], (0.0, 6.5)),
        ([nn.ReLU(inplace=True), nn.MaxPool2d(3, 1, 1)], (0.0, 6.5)),
        ([nn.ReLU6()], (0.0, 6.0)),
        ([nn.Dropout(), nn.LeakyReLU(0.5)], (-2.75, 6.5)),
        ([nn.Hardswish()], (-0.375, 6.5)),
        ([nn.Sigmoid()], (0.0040701, 0.9984988)),
    ],
    ids=str,
)
def test_behind_batch_norm_by_hand(middle: list[nn.Module], expected: tuple[float, float]) -> None:
    found = from_batch_norm(chain(*middle), EXAMPLE)
    linear = f"{3 + len(middle)}"
    assert found.inputs[linear] == pytest.approx(expected, abs=1e-3)
    assert found.missing == {"0": "an input of the model, whose range is not given (input_range)"}
    cuts = not middle or isinstance(middle[0], (nn.ReLU, nn.ReLU6))
    assert found.outputs == ({} if cuts else {"1": (-5.5, 6.5)}), "other activations read batch norm itself"


def test_outputs_that_others_read() -> None:
    """Behind ReLU a mean, or ReLU6 and one: a grid of the output needs no more than these let through."""
    for act, ends in ((nn.ReLU(inplace=True), (0.0, 6.5)), (nn.ReLU6(), (0.0, 6.0)), (nn.Hardtanh(), (-1.0, 1.0))):
        model = chain(act, nn.MaxPool2d(1), nn.AdaptiveAvgPool2d(4), nn.AvgPool2d(1))
        assert from_batch_norm(model, EXAMPLE).outputs == {"1": ends}
        low, measured = from_inputs(model, [torch.randn(4, 1, 4, 4)]).outputs["1"]
        assert ends[0] <= low <= 0 < measured <= ends[1]


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation inside, as timm has them."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__(2)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_norms_with_an_activation_inside() -> None:
    """Their output is that of the activation: only where this merely cuts off it can be rounded there."""
    for act, found in ((nn.ReLU(), {"1": (0.0, 6.5)}), (nn.SiLU(), {})):
        model = chain(nn.AvgPool2d(1))
        inside = NormAct(act).eval()
        inside.load_state_dict(model[1].state_dict())
        model[1] = inside
        assert from_batch_norm(model, EXAMPLE).outputs == found
        assert set(from_inputs(model, [torch.randn(4, 1, 4, 4)]).outputs) == set(found)


def test_settings() -> None:
    found = from_batch_norm(chain(), EXAMPLE, deviations=2, input_range=(-1.0, 3.0))
    assert found.inputs == {"0": (-1.0, 3.0), "3": (-2.0, 2.5)} and not found.missing
    assert "2 |gamma|" in found.definition


class Residual(nn.Module):
    """Two branches with batch norm are added, then read."""

    def __init__(self, joined: str = "add") -> None:
        super().__init__()
        self.joined = joined
        self.a, self.norm_a = nn.Conv2d(1, 2, 1), norm([3.0, 1.0], [0.0, 0.0])
        self.b, self.norm_b = nn.Conv2d(1, 2, 1), norm([4.0, 1.0], [1.0, 0.0])
        self.read = nn.Conv2d(4 if joined == "cat" else 2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.norm_a(self.a(x)), self.norm_b(self.b(x))
        return self.read(
            {"add": torch.add, "mul": torch.mul, "cat": lambda a, b: torch.cat([a, b], 1)}[self.joined](a, b)
        )


def test_sums_products_and_concatenations_by_hand() -> None:
    """3 and 4 deviate by 5 together: 1 -+ 30. The terms have ranges of their own."""
    found = from_batch_norm(Residual(), EXAMPLE)
    assert found.inputs["read"] == pytest.approx((-29, 31))
    assert found.outputs == {"norm_a": (-18.0, 18.0), "norm_b": (-23.0, 25.0)}
    assert from_batch_norm(Residual("cat"), EXAMPLE).inputs["read"] == (-23.0, 25.0)
    assert from_batch_norm(Residual("mul"), EXAMPLE).inputs["read"] == pytest.approx((-450, 450))
    measured = from_inputs(Residual(), [torch.randn(2, 1, 4, 4)])
    assert set(measured.outputs) == {"norm_a", "norm_b"} and set(measured.inputs) == {"a", "b", "read"}


def test_what_has_no_range_is_named() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    found = from_batch_norm(plain, EXAMPLE)
    assert not found.inputs
    assert found.missing["2"] == "the output of 0, which no batch norm follows"
    assert found.missing["4"] == "the output of 3, whose statistics look untrained (mean 0, variance 1)"
    plain[3] = nn.BatchNorm2d(2, track_running_stats=False)
    assert "keeps no running statistics" in from_batch_norm(plain, EXAMPLE).missing["4"]
    squared = chain(nn.Softmax(1))
    assert "_softmax" in from_batch_norm(squared, EXAMPLE).missing["4"]
    gates = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sigmoid(), nn.Conv2d(2, 2, 1))
    assert from_batch_norm(gates, EXAMPLE).inputs["2"] == (0.0, 1.0)


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(input=x) + self.used(input=2 * x)


def test_from_inputs_by_hand() -> None:
    """A layer that is called twice has one range, over both calls and both batches."""
    found = from_inputs(Sometimes(), [torch.tensor([[1.0, 3.0]]), torch.tensor([[-2.0, 0.0]])])
    assert found.inputs == {"used": (-4.0, 6.0)}
    assert found.missing == {"unused": "these inputs do not reach it as a call"}
    batch = torch.arange(201.0).reshape(1, 1, 1, 201)
    cut = from_inputs(nn.Sequential(nn.Conv2d(1, 1, 1)), [batch, batch / 2], percentile=99)
    assert cut.inputs["0"] == pytest.approx((1.0, 198.0))
    assert "percentiles 1 and 99 of 2 batches" in cut.definition


def test_nothing_else_is_touched() -> None:
    model = chain(nn.ReLU()).train()
    model[1].eval()
    before, modes = copy.deepcopy(model), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    from_inputs(model, [torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))])
    from_batch_norm(model, EXAMPLE)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    for name, tensor in tensors_of(before).items():
        assert same_bits(tensor, tensors_of(model)[name]), name
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    model[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="where: 4"):
        from_inputs(model, [torch.ones(1, 1, 4, 4)])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert modes == [m.training for m in model.modules()]


def test_ranges_hold_what_is_measured() -> None:
    """On activations that are as Gaussian as batch norm says, measured ranges lie within those from batch norm."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    )
    batches = [torch.randn(16, 1, 12, 12) for _ in range(4)]
    model.train()
    model[1].momentum = model[4].momentum = None
    for batch in batches:
        model(batch)
    ours, seen = from_batch_norm(model, batches[0][:1]), from_inputs(model, batches)
    for path, (low, high) in ours.inputs.items():
        assert low <= seen.inputs[path][0] and seen.inputs[path][1] <= high and high < 3 * seen.inputs[path][1]


def test_the_grid_by_hand() -> None:
    """-1 .. 2 in 2 bits: three steps of 1, 0 is the code 1. 0.5 is a tie and goes to the even code."""
    grid = Grid.of((-1.0, 2.0), 2)
    assert (grid.scale, grid.zero) == (1.0, 1)
    assert grid.rounded(torch.tensor([-9.0, -0.4, 0.5, 1.6, 9.0])).tolist() == [-1.0, 0.0, 0.0, 2.0, 2.0]
    assert Grid.of((1.0, 3.0), 2) == Grid(1.0, 0, 2), "0 belongs to every grid"
    assert Grid.of((-3.0, -1.0), 2) == Grid(1.0, 3, 2)
    assert Grid.of((0.0, 0.0), 8) == Grid(1.0, 0, 8)
    half = grid.rounded(torch.tensor([0.7], dtype=torch.float16))
    assert half.dtype == torch.float16 and half.tolist() == [1.0]


def test_the_table() -> None:
    table = Ranges({"a": (0.0, 2.0)}, {"b": "no batch norm", "c": "no call"}, {"n": (-1.0, 1.0)}, "by hand")
    assert Ranges.from_json(json.loads(json.dumps(table.to_json()))) == table
    filled = table.filled(Ranges({"a": (5.0, 6.0), "b": (1.0, 2.0)}, {}, {}, "inputs"))
    assert filled.inputs == {"a": (0.0, 2.0), "b": (1.0, 2.0)} and filled.missing == {"c": "no call"}
    assert table.given({"b": (0.0, 1.0)}).missing == {"c": "no call"}
    assert table.grid("b") is None and table.grid("a", 4) == Grid.of((0.0, 2.0), 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: from_inputs(chain(), []), InputError, "no batches"),
        (lambda: from_inputs(chain(), [EXAMPLE], percentile=50), InputError, r"not in \(50, 100\]"),
        (lambda: from_batch_norm(chain(), EXAMPLE, deviations=0), InputError, "not above 0"),
        (lambda: from_batch_norm(len, EXAMPLE), InputError, "not an nn.Module"),  # type: ignore[arg-type]
        (lambda: Ranges({"a": (0.0, float("nan"))}), NotFiniteError, "where: a"),
        (lambda: Ranges({"a": (2.0, 1.0)}), InputError, "the least is the larger"),
        (lambda: Ranges.from_json({"inputs": {"a": 3}}), FileDamagedError, "ranges from JSON"),
    ],
)
def test_refusals(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
