"""Random scores: the same for the same seed and group, independent of everything else."""

from typing import Any

import pytest
import torch
from torch import nn

import niwaki
from niwaki.scores import Random


def scores(model: nn.Module, how: Random) -> dict[str, torch.Tensor]:
    graph = niwaki.trace(model, torch.zeros(1, 4))
    return niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how).values


def net(last: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, last))


def test_the_seed_decides_and_weights_do_not() -> None:
    first, second, other = scores(net(), Random(seed=1)), scores(net(), Random(seed=1)), scores(net(), Random(seed=2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    model = net()
    before = torch.get_rng_state()
    scores(model, Random())
    assert torch.equal(torch.get_rng_state(), before)


def test_groups_differ_and_a_change_elsewhere_does_not_change_them() -> None:
    found = scores(net(), Random())
    a, b = found.values()
    assert not torch.equal(a[:200], b)
    assert torch.equal(scores(net(last=5), Random())[next(iter(found))], a)


def test_uniform_between_zero_and_one() -> None:
    """300 numbers: mean within 4 standard errors of a half, no two equal."""
    values = next(iter(scores(net(), Random()).values()))
    assert values.shape == (300,) and values.dtype == torch.float64
    assert float(values.min()) >= 0 and float(values.max()) < 1
    assert abs(float(values.mean()) - 0.5) < 4 * (1 / 12 / 300) ** 0.5
    assert values.unique().numel() == 300


def test_needs_nothing() -> None:
    assert Random().needs == frozenset() and Random().deterministic is False


def test_a_model_without_numbers_can_be_scored_at_random() -> None:
    """The meta device: the same numbers as on a real one, and a plan that cuts."""
    with torch.device("meta"):
        model = net()
    graph = niwaki.trace(model, torch.zeros(1, 4, device="meta"))
    found = niwaki.score(graph, niwaki.collect(model, graph, Random().needs), how=Random())
    assert all(torch.equal(numbers, scores(net(), Random())[name]) for name, numbers in found.values.items())
    small = niwaki.cut(model, niwaki.choose(graph, found, niwaki.Budget(keep=0.5)))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("how", [niwaki.scores.Magnitude(), niwaki.scores.NormScale(), niwaki.scores.Taylor()], ids=str)
def test_what_needs_numbers_says_that_there_are_none(how: Any) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    x = torch.zeros(2, 2, device="meta")
    graph = niwaki.trace(model, x)
    with pytest.raises(niwaki.errors.InputError, match=r"holds no numbers; where: 0\.weight; do: .*Random"):
        evidence = niwaki.collect(model, graph, how.needs, batches=[x], loss=lambda net, batch: net(batch).sum())
        niwaki.score(graph, evidence, how=how)


def test_weights_that_nobody_reads_are_not_looked_at() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    graph = niwaki.trace(model, torch.zeros(1, 4))
    evidence = niwaki.collect(model, graph, Random.needs)
    assert len(niwaki.score(graph, evidence, how=Random()).values) == 2
    with pytest.raises(niwaki.errors.NotFiniteError, match=r"where: 0\.weight"):
        niwaki.score(graph, evidence, how=niwaki.scores.Magnitude())
