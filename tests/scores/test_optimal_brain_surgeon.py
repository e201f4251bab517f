"""Costs of units worked out by hand, and beside a plain elimination that takes every inverse anew."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import niwaki
from niwaki.evidence import Evidence, Need
from niwaki.scores import OptimalBrainSurgeon

PAIRS = torch.tensor([[1.0, 1.0], [-1.0, -1.0]] * 4 + [[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
"""Two inputs of variance 1, mean 0 and correlation 0.6."""
BARELY = OptimalBrainSurgeon(ridge=1e-10)


def net(*readers: tuple[float, float]) -> nn.Module:
    """Passes two inputs on to readers with an output each."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, len(readers))).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(torch.tensor(readers))
        model[1].bias.zero_()
    return model


def thrice(model: nn.Module, batch: Tensor) -> Tensor:
    """Of gradient 3 at every output of every sample, but for the mean over the samples."""
    return 3 * model(batch).sum(1).mean()


def scored(model: nn.Module, batches: list[Any], loss: Any = thrice, how: Any = BARELY) -> dict[str, Tensor]:
    graph = niwaki.trace(model, batches[0])
    evidence = niwaki.collect(model, graph, how.needs, batches=batches, loss=loss)
    return niwaki.score(graph, evidence, how=how).values


def test_two_correlated_inputs_by_hand() -> None:
    """y = x1 + 2 x2. C^-1 = [[1, -.6], [-.6, 1]] / .64, so that x1 alone costs 9/2 * 1^2 * .64 = 2.88 and x2 alone
    9/2 * 2^2 * .64 = 11.52. x1 goes first, x2 takes over .6 of it: 2.6, and then costs 9/2 * 2.6^2 * 1 = 30.42.
    """
    (found,) = scored(net((1.0, 2.0)), [PAIRS]).values()
    assert found.tolist() == pytest.approx([2.88, 30.42], rel=1e-8)


def test_what_goes_later_never_scores_lower() -> None:
    """y = x1 - .75 x2: x2 goes first at 9/2 * .5625 * .64 = 1.62; then x1, at 1 - .45 = .55, would cost 1.36125."""
    (found,) = scored(net((1.0, -0.75)), [PAIRS]).values()
    assert found.tolist() == pytest.approx([1.62, 1.62], rel=1e-8)
    assert found[0] > found[1]


def test_outputs_whose_gradients_agree_count_together() -> None:
    """Outputs x1 + x2 and x1 - x2 have gradient 3 both: G is 9 everywhere, and it is 2 x1 that counts.
    x2: nothing. Then x1, with .6 of it in the first output and -.6 in the second: 9/2 * (1.6 + .4)^2 = 18.
    """
    (found,) = scored(net((1.0, 1.0), (1.0, -1.0)), [PAIRS]).values()
    assert found.tolist() == pytest.approx([18.0, 0.0], abs=1e-7)


def test_a_ridge_by_hand() -> None:
    """With a ridge of 1 C is [[2, .6], [.6, 2]], and the block of C^-1 2 / 3.64: x1 costs 9/2 * 3.64 / 2 = 8.19; x2
    then has weight 2 + .3 and costs 9/2 * 2.3^2 * 2 = 47.61.
    """
    (found,) = scored(net((1.0, 2.0)), [PAIRS], how=OptimalBrainSurgeon(ridge=1.0)).values()
    assert found.tolist() == pytest.approx([8.19, 47.61], rel=1e-8)


def test_means_do_not_count_and_batches_are_averaged() -> None:
    """A constant beside the weights takes up the mean; twice the same batch tells what one does."""
    (found,) = scored(net((1.0, 2.0)), [PAIRS + 5, PAIRS + 5]).values()
    assert found.tolist() == pytest.approx([2.88, 30.42], rel=1e-7)


class Two(nn.Module):
    """One stream that a linear layer and a convolution read, the second past a bend."""

    def __init__(self) -> None:
        super().__init__()
        self.made = nn.Conv2d(3, 6, 3)
        self.wide, self.flat = nn.Conv2d(6, 4, 3, padding=1, stride=2), nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.made(x).relu()
        return torch.cat([self.wide(x).tanh().flatten(1), self.flat(x.flatten(1))], 1)


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 0.3).pow(2).sum(1).mean()


def plain(model: Two, evidence: Evidence, ridge: float) -> list[float]:
    """Every cost from an inverse of its own, all weights refitted to the first ones: a unit after the other."""
    parts = []
    for name, per in (("wide", 9), ("flat", 16)):
        held = evidence.curvature[f"{name}.weight"]
        c = held.inputs + ridge * held.inputs.diagonal().mean() * torch.eye(len(held.inputs), dtype=torch.float64)
        parts.append((getattr(model, name).weight.detach().flatten(1), c, held.outputs, per))

    def rise(gone: list[int]) -> float:
        total = 0.0
        for weight, c, outputs, per in parts:
            stay = torch.tensor([i for i in range(len(c)) if i // per not in gone], dtype=torch.long)
            new = torch.zeros_like(weight)
            new[:, stay] = torch.linalg.solve(c[stay][:, stay], (weight @ c[:, stay]).T).T
            total += float(torch.trace((weight - new) @ c @ (weight - new).T @ outputs)) / 2
        return total

    gone: list[int] = []
    scores, level = [0.0] * 6, 0.0
    while len(gone) < 6:
        added = {unit: rise([*gone, unit]) - rise(gone) for unit in range(6) if unit not in gone}
        unit = min(added, key=added.__getitem__)
        scores[unit] = level = max(level, added[unit])
        gone.append(unit)
    return scores


def test_beside_a_plain_elimination() -> None:
    """Several readers, kernels, strides, padding and a unit with many inputs: the same as without any update."""
    torch.manual_seed(2)
    model = Two().double()
    batches = [torch.randn(32, 3, 6, 6, dtype=torch.float64) for _ in range(8)]
    how, graph = OptimalBrainSurgeon(), niwaki.trace(model, batches[0])
    evidence = niwaki.collect(model, graph, how.needs, batches=batches, loss=square)
    (found,) = niwaki.score(graph, evidence, how=how).values.values()
    assert found.tolist() == pytest.approx(plain(model, evidence, how.ridge), rel=1e-6)


def test_curvature_beside_a_plain_sum() -> None:
    """Of a convolution: covariance of unfolded inputs, and gradients summed over positions, mean over samples."""
    torch.manual_seed(3)
    model, batch = Two().double(), torch.randn(7, 3, 6, 6, dtype=torch.float64)
    graph = niwaki.trace(model, batch)
    held = niwaki.collect(model, graph, BARELY.needs, batches=[batch], loss=square).curvature["wide.weight"]
    x = model.made(batch).relu().detach()
    rows = nn.functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)  # [positions, 6 * 9]
    assert torch.allclose(held.inputs, torch.cov(rows.T, correction=0))
    y = model.wide(x).detach().requires_grad_()
    (y.tanh().flatten(1) - 0.3).pow(2).sum().backward()  # of each sample alone
    each = y.grad.movedim(1, -1).flatten(0, 2)
    assert torch.allclose(held.outputs, each.T @ each / 7)


def test_rounds_take_several_at_once() -> None:
    """In one round all units are judged by what each costs alone, dearer ones later."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = torch.randn(40, 5, dtype=torch.float64)
    (found,) = scored(model, [batch], how=OptimalBrainSurgeon(ridge=0.1, rounds=1)).values()
    held = torch.cov(model[:2](batch).detach().T, correction=0)
    inverse = torch.linalg.inv(held + 0.1 * held.diagonal().mean() * torch.eye(6))
    wanted = 9 * model[2].weight.detach().sum(0) ** 2 / inverse.diagonal() / 2
    assert torch.allclose(found, wanted)
    (apart,) = scored(model, [batch], how=OptimalBrainSurgeon(ridge=0.1, rounds=6)).values()
    assert not torch.allclose(apart, wanted) and apart.argmin() == wanted.argmin()


@pytest.mark.parametrize(
    "reader",
    [nn.Conv2d(4, 4, 1, groups=2), nn.ConvTranspose2d(4, 4, 1)],
    ids=["grouped", "transposed"],
)
def test_what_other_layers_read_is_left_whole(reader: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), reader, nn.Conv2d(4, 3, 1), nn.Conv2d(3, 2, 1))
    example = torch.randn(2, 2, 3, 3)
    graph = niwaki.trace(model, example)
    evidence = niwaki.collect(model, graph, BARELY.needs, batches=[example], loss=square)
    scores = niwaki.score(graph, evidence, how=BARELY)
    assert scores.missing == ("0#2",) and set(scores.values) == {"1", "2"}


def test_a_depthwise_filter_on_the_way_is_none_of_its_business() -> None:
    """Units go through it; the layer behind it reads them."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 1))
    found = scored(model, [torch.randn(2, 2, 5, 5)], loss=square, how=OptimalBrainSurgeon())
    assert list(found) == ["0#2"] and bool((found["0#2"] > 0).all())


class Named(nn.Module):
    """Calls its reader by the name of its argument, on single samples."""

    def __init__(self) -> None:
        super().__init__()
        self.passed, self.read = net((1.0, 2.0)).children()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.read(input=self.passed(one)) for one in x])


def test_many_calls_by_name() -> None:
    """As many calls as samples, each with one row: the same sums."""
    (found,) = scored(Named(), [PAIRS]).values()
    assert found.tolist() == pytest.approx([2.88, 30.42], rel=1e-8)


def test_drawn_positions_are_of_the_seed_and_nothing_is_left_behind() -> None:
    torch.manual_seed(5)
    model, batch = Two().train(), torch.randn(1200, 3, 6, 6)  # 1200 * 4 positions
    graph = niwaki.trace(model, batch)

    def held(seed: int) -> Tensor:
        how = OptimalBrainSurgeon()
        return (
            niwaki.collect(model, graph, how.needs, batches=[batch], loss=square, seed=seed)
            .curvature["wide.weight"]
            .inputs
        )

    one, other = held(0), held(1)
    torch.manual_seed(6)
    assert torch.equal(one, held(0)) and not torch.equal(one, other)
    assert model.training and not model.wide._forward_hooks and model.wide.weight.grad is None


def test_refusals() -> None:
    for settings in ({"ridge": 0.0}, {"ridge": float("inf")}, {"ridge": float("nan")}, {"rounds": 0}, {"rounds": 1.5}):
        with pytest.raises(niwaki.errors.InputError, match=next(iter(settings))):
            OptimalBrainSurgeon(**settings)
    model = net((1.0, 2.0))
    graph = niwaki.trace(model, PAIRS)
    with pytest.raises(niwaki.errors.InputError, match="no batches or no loss"):
        niwaki.collect(model, graph, BARELY.needs)
    gradients = niwaki.collect(model, graph, frozenset({Need.GRADIENT}), batches=[PAIRS], loss=thrice)
    with pytest.raises(niwaki.errors.InputError, match="the evidence has no curvature"):
        niwaki.score(graph, gradients, how=BARELY)
    with torch.no_grad():
        model[0].weight.mul_(1e200)
    with pytest.raises(niwaki.errors.NotFiniteError, match=r"curvature as evidence; .*an input.*1\.weight"):
        niwaki.collect(model, graph, BARELY.needs, batches=[PAIRS], loss=thrice)
