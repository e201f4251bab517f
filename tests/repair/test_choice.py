"""Which channels go first: numbers by hand, and against trying every set."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import niwaki
from niwaki.errors import InputError
from niwaki.repair.choice import channel_scores, eliminated
from niwaki.repair.reconstruction import Work
from niwaki.repair.sites import structure_of


def error(gram: Tensor, reads: Tensor, kept: list[int]) -> float:
    """What the reader loses when the kept channels take over as well as they can."""
    rest = [j for j in range(len(gram)) if j not in kept]
    inner = gram[rest][:, rest]
    if kept:
        cross = gram[rest][:, kept]
        inner = inner - cross @ torch.linalg.solve(gram[kept][:, kept], cross.T)
    return float(((reads[:, rest] @ inner) * reads[:, rest]).sum())


def problem(seed: int, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, count + 2, generator=generator, dtype=torch.float64)
    return vectors @ vectors.T, torch.randn(3, count, generator=generator, dtype=torch.float64)


def test_by_hand() -> None:
    """Channels 0 and 1 at right angles, 2 their sum: the first to go does no harm, whatever reads it."""
    little = 1e-9
    gram = torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 2]], dtype=torch.float64) + little * torch.eye(3)
    harm = eliminated([(torch.arange(3), torch.linalg.inv(gram), torch.tensor([[1.0, 2, 4]]).double())], 3)
    first, second, third = np.argsort(harm)
    assert harm[first] < 1e-6
    # channel 0 goes first (its reader weighs it least): 2 takes over, 1 is read 2 - 1 times, 2 is read 4 + 1 times
    assert (first, second, third) == (0, 1, 2)
    # then 1 against 2: 1 - 1/2 of its square is left once 2 takes over, read once
    assert harm[second] == pytest.approx(0.5, abs=1e-6)
    # 2 stands for 5 + 1/2 of itself then, of square 2
    assert harm[third] == pytest.approx(0.5 + 2 * 5.5**2, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_harm_is_the_error_of_the_best_mixture(seed: int) -> None:
    gram, reads = problem(seed)
    harm = eliminated([(torch.arange(6), torch.linalg.inv(gram), reads)], 6)
    order = np.argsort(harm).tolist()
    for gone in range(1, 7):
        assert harm[order[gone - 1]] == pytest.approx(error(gram, reads, order[gone:]), rel=1e-9)
        # greedy: no other next step does less harm
        before = order[gone - 1 :]
        least = min(error(gram, reads, [k for k in before if k != j]) for j in before)
        assert error(gram, reads, order[gone:]) == pytest.approx(least, rel=1e-9)


def test_greedy_is_near_the_best_of_all_sets() -> None:
    better = []
    for seed in range(12):
        gram, reads = problem(seed)
        harm = eliminated([(torch.arange(6), torch.linalg.inv(gram), reads)], 6)
        best = min(error(gram, reads, list(kept)) for kept in itertools.combinations(range(6), 3))
        better.append(float(np.sort(harm)[2]) / best)
    assert min(better) >= 1 - 1e-9 and np.median(better) < 1.15


def test_two_readers_are_judged_together() -> None:
    gram, reads = problem(0)
    view = (torch.arange(6), torch.linalg.inv(gram))
    both = eliminated([(*view, reads[:1]), (*view, reads[1:])], 6)
    assert np.allclose(both, eliminated([(*view, reads)], 6))


class Net(nn.Module):
    """The last channel is twice the first, bias included."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.uniform_(0.5, 2)
            self.norm.bias.normal_()
            self.a.weight[4] = self.a.weight[0]
            self.a.bias[4] = self.a.bias[0]  # type: ignore[index]
            for own in (self.norm.running_mean, self.norm.running_var):
                own[4] = own[0]
            for own in (self.norm.weight, self.norm.bias):
                own[4] = 2 * own[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


@pytest.mark.parametrize("space", ["filter", "activation"])
@pytest.mark.parametrize("how", ["residual", "elimination"])
def test_a_copy_of_another_channel_goes_first(how: str, space: str) -> None:
    model = Net().eval()
    graph = niwaki.trace(model, torch.randn(1, 3, 8, 8))
    scores = channel_scores(graph, structure_of(graph).sites, Work(model), how, space=space)  # type: ignore[arg-type]
    (values,) = scores.values.values()
    assert int(values.argmin()) in (0, 4)


def test_folded_norms_and_unknown_names() -> None:
    model = Net().eval()
    graph = niwaki.trace(model, torch.randn(1, 3, 8, 8))
    (values,) = channel_scores(graph, structure_of(graph).sites, Work(model), "folded_norm").values.values()
    scale = model.norm.weight / (model.norm.running_var + 1e-5).sqrt()
    assert torch.allclose(values.float(), model.a.weight.flatten(1).norm(dim=1) * scale)
    (paths,) = channel_scores(graph, structure_of(graph).sites, Work(model), "path_norm").values.values()
    assert torch.allclose(paths, values * model.b.weight.detach().double().transpose(0, 1).flatten(1).norm(dim=1))
    with pytest.raises(InputError, match="known: folded_norm, path_norm, residual, elimination"):
        channel_scores(graph, structure_of(graph).sites, Work(model), "best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="known: filter, activation"):
        channel_scores(graph, structure_of(graph).sites, Work(model), "residual", space="weight")  # type: ignore[arg-type]
