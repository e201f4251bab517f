"""Layers refitted to what they put out: by hand, by a solver, and what can't be refitted."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import niwaki
from niwaki.errors import InputError, NotFiniteError
from niwaki.evidence.patches import patches
from niwaki.graph.plans import plan_of
from niwaki.repair import FoldedConstants, LeastSquares
from repair.test_constants import keeping


def refitted(model: nn.Module, kept: dict[str, list[int]], x: Tensor, **settings: Any) -> tuple[Any, tuple[str, ...]]:
    plan = keeping(model, x, kept)
    small = niwaki.cut(model, plan)
    return small, LeastSquares(**settings)(model, small, plan, batches=[x])


def echo() -> tuple[nn.Sequential, Tensor]:
    """Three hidden units h of two inputs: h1 = x1, h2 = x2, h3 = 2 x1 + 1; out = 3 h1 + 5 h2 + 7 h3."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
        model[1].weight.copy_(torch.tensor([[3.0, 5.0, 7.0]]))
        model[1].bias.fill_(0.5)
    return model, torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


def test_by_hand() -> None:
    """h3 is told by h1 whole: 3 + 7 * 2 = 17, constant 7 * 1; h2 has nothing of it."""
    model, x = echo()
    small, skipped = refitted(model, {"0": [0, 1]}, x, ridge=1e-9)
    assert skipped == ()
    assert small[1].weight.tolist()[0] == pytest.approx([17.0, 5.0], abs=1e-5)
    assert small[1].bias.item() == pytest.approx(7.5, abs=1e-5)
    assert torch.allclose(small(x), model(x), atol=1e-5)


def test_the_ridge_by_hand() -> None:
    """Variances are 1, the covariance of h1 and h3 is 2: with a ridge of 1, P = 2 / (1 + 1) = 1, and 3 + 7 = 10."""
    model, x = echo()
    small, _ = refitted(model, {"0": [0, 1]}, x, ridge=1.0)
    assert small[1].weight.tolist()[0] == pytest.approx([10.0, 5.0], abs=1e-5)


def test_of_a_units_copies_the_first_takes_it_over() -> None:
    """h1 twice, its copy unread, h3 gone: 17 for the first one."""
    model, x = echo()
    graph = niwaki.trace(model, x)
    times = np.ones(graph.units.count, np.int64)
    times[next(g for g in graph.groups if g.fixed is None).ids] = [2, 1, 0]
    plan = plan_of(graph, times)
    wide = niwaki.cut(model, plan)
    LeastSquares(ridge=1e-9)(model, wide, plan, batches=[x])
    assert wide[1].weight.tolist()[0] == pytest.approx([17.0, 0.0, 5.0], abs=1e-5)
    assert torch.allclose(wide(x), model(x), atol=1e-5)


def test_a_large_ridge_leaves_the_constants() -> None:
    model, x = echo()
    plan = keeping(model, x, {"0": [0, 1]})
    one, other = niwaki.cut(model, plan), niwaki.cut(model, plan)
    LeastSquares(ridge=1e12)(model, one, plan, batches=[x])
    FoldedConstants("mean")(model, other, plan, batches=[x])
    assert torch.allclose(one[1].weight, other[1].weight, atol=1e-6)
    assert torch.allclose(one[1].bias, other[1].bias, atol=1e-6)


def test_a_layer_too_large_takes_the_constants() -> None:
    model, x = echo()
    small, skipped = refitted(model, {"0": [0, 1]}, x, largest=2)
    assert skipped == ()
    assert small[1].weight.tolist() == [[3.0, 5.0]]
    assert small[1].bias.item() == pytest.approx(0.5 + 7 * 1)


class Net(nn.Module):
    """Two convolutions and norms; the second one strided, dilated and padded."""

    def __init__(self, mode: str = "zeros") -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 5, (3, 2), stride=2, dilation=(1, 2), padding=(2, 1), padding_mode=mode, bias=False)
        self.nb, self.head = nn.BatchNorm2d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.nb(self.b(F.relu(self.na(self.a(x)))))
        return self.head(hidden.mean((2, 3)))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_convolution_against_a_solver(mode: str) -> None:
    """All places of all pictures, solved by torch: weights in `b`, the constant in the running mean of its norm."""
    torch.manual_seed(0)
    model = Net(mode).eval()
    x, kept = torch.randn(8, 3, 9, 9), [0, 2, 5]
    small, skipped = refitted(model, {"a": kept}, x, ridge=1e-9, samples=10**6)
    assert skipped == ()
    with torch.no_grad():
        hidden = F.relu(model.na(model.a(x)))
        padded = F.pad(hidden, (1, 1, 2, 2), mode="constant" if mode == "zeros" else mode)
        rows = F.unfold(padded, (3, 2), dilation=(1, 2), stride=2).transpose(1, 2).flatten(0, 1).double()
        told = rows @ model.b.weight.flatten(1).double().T
        some = rows.unflatten(1, (6, 6))[:, kept].flatten(1)
        known = torch.cat([some, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        solved = torch.linalg.lstsq(known, told).solution.T
    assert torch.allclose(small.b.weight.flatten(1).double(), solved[:, :-1], atol=1e-4)
    shift = (small.nb.running_mean - model.nb.running_mean).double()
    assert torch.allclose(-shift, solved[:, -1], atol=1e-4)


def test_it_is_nearer_than_constants_on_unseen_pictures() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    plan = keeping(model, torch.zeros(1, 3, 9, 9), {"a": [0, 2, 4, 5]})
    apart = []
    for how in (FoldedConstants("mean"), LeastSquares()):
        small = niwaki.cut(model, plan)
        assert niwaki.repair(small, [torch.randn(64, 3, 9, 9)], how=how, model=model, plan=plan) == ()
        x = torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            apart.append(float((small(x) - model(x)).square().mean()))
    assert apart[1] < 0.9 * apart[0]


def test_patches_of_one_and_three_dimensions() -> None:
    """Rows times the flattened weight are what the layer puts out, position by position."""
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    for layer, x in (
        (nn.Conv1d(2, 3, 3, stride=2, padding=1, bias=False), torch.randn(2, 2, 9)),
        (nn.Conv3d(2, 3, (1, 5, 3), padding="same", dilation=(1, 1, 2), bias=False), torch.randn(2, 2, 4, 5, 6)),
        (nn.Linear(4, 3, bias=False), torch.randn(2, 5, 4)),
    ):
        rows = patches(layer, x, 10**6, draws)
        out = layer(x)
        flat = out.flatten(0, -2) if isinstance(layer, nn.Linear) else out.movedim(1, -1).flatten(0, -2)
        assert torch.allclose(rows @ layer.weight.flatten(1).T, flat, atol=1e-5)
        assert len(patches(layer, x, 4, draws)) == 4


def test_drawn_positions_are_of_the_seed() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(8, 3, 9, 9)
    one, same, other = (refitted(model, {"a": [0, 2, 5]}, x, samples=40, seed=s)[0].b.weight for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_grouped_readers_are_returned() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    x = torch.randn(2, 3, 4, 4)
    plan = keeping(model, x, {"0": [0, 1, 4, 5]})
    small = niwaki.cut(model, plan)
    before = small[1].weight.clone()
    assert LeastSquares()(model, small, plan, batches=[x]) == ("1",)
    assert torch.equal(small[1].weight, before)


def test_bad_settings_and_inputs() -> None:
    for settings, words in (
        ({"ridge": 0.0}, "not above 0"),
        ({"samples": 0}, "fewer than 1"),
        ({"largest": 0}, "fewer"),
    ):
        with pytest.raises(InputError, match=words):
            LeastSquares(**settings)  # type: ignore[arg-type]
    model, x = echo()
    plan = keeping(model, x, {"0": [0, 1]})
    small = niwaki.cut(model, plan)
    with pytest.raises(InputError, match="refit layers; found: no batches"):
        LeastSquares()(model, small, plan, batches=[])
    with pytest.raises(NotFiniteError, match=r"NaN or infinite.*1.*look for it"):
        LeastSquares()(model, small, plan, batches=[x / 0])
    with pytest.raises(InputError, match=r"refit layers; found: no plan.*how=LeastSquares\(\)"):
        niwaki.repair(small, [x], how=LeastSquares(), model=model, plan=None)
