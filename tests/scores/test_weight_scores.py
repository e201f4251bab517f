"""Scores of single weights before training: by hand, and SynFlow's expectation by enumeration."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import niwaki
from niwaki.errors import InputError, NotFiniteError
from niwaki.graph.skeleton import copy_with, like
from niwaki.scores import SNIP, GraSP, RandomWeights, Seen, SynFlow, WeightScore, masks, shuffled, unit_scores
from niwaki.scores.synflow import flow
from niwaki.scores.weight_score import highest


def linear(*weights: list[list[float]]) -> nn.Sequential:
    net = nn.Sequential(*(nn.Linear(len(w[0]), len(w), bias=False) for w in weights))
    with torch.no_grad():
        for layer, w in zip(net, weights, strict=True):
            layer.weight.copy_(torch.tensor(w))  # type: ignore[operator, union-attr]
    return net


def twin(net: nn.Module) -> nn.Module:
    return copy_with(net, lambda tensor: like(tensor, tensor.detach().clone()))


def output(model: nn.Module, batch: Any) -> Tensor:
    out: Tensor = model(batch)
    return out.sum()


def square(model: nn.Module, batch: Any) -> Tensor:
    out: Tensor = model(batch)
    return out.square().sum() / 2


def value(tensor: Tensor) -> float:
    return float(tensor.detach())


@pytest.mark.parametrize(
    ("numbers", "count", "stay"),
    [
        ([3.0, 1.0, 2.0], 1, [0]),
        ([1.0, 2.0, 2.0, 2.0, 0.0], 2, [1, 2]),  # ties: the lower index
        ([2.0, 2.0, 3.0, 2.0], 3, [0, 1, 2]),
        ([-torch.inf, 1.0, -torch.inf], 2, [0, 1]),  # what is gone comes last
        ([5.0, 5.0], 2, [0, 1]),
    ],
)
def test_highest_by_hand(numbers: list[float], count: int, stay: list[int]) -> None:
    assert highest(torch.tensor(numbers), count).nonzero().flatten().tolist() == stay


def test_synflow_by_hand() -> None:
    """|W1| = (1 2; 3 4), |W2| = (5 6): R = 5 x 3 + 6 x 7 = 57, and every layer's scores add up to it."""
    net = linear([[1, -2], [3, 4]], [[5, -6]])
    found = SynFlow()(twin(net), ["0.weight", "1.weight"], Seen(torch.randn(1, 2)))
    assert found["0.weight"].tolist() == [[5, 10], [18, 24]]
    assert found["1.weight"].tolist() == [[15, 42]]
    assert value(flow(twin(net), torch.zeros(1, 2))) == 57


def test_snip_by_hand() -> None:
    """The loss is w x: its slope is x, over two batches (1, 2) + (3, -4)."""
    net = linear([[2, -5]])
    seen = Seen(None, [torch.tensor([[1.0, 2]]), torch.tensor([[3.0, -4]])], output)
    assert SNIP()(twin(net), ["0.weight"], seen)["0.weight"].tolist() == [[8, 10]]


def test_grasp_by_hand() -> None:
    """L = y^2 / 2 with y = w x = -3: g = y x, H = x x^T, H g = 5 y x; w (H g) = (-15, 60)."""
    net = linear([[1, -2]])
    seen = Seen(None, [torch.tensor([[1.0, 2]])], square)
    assert GraSP(temperature=1)(twin(net), ["0.weight"], seen)["0.weight"].tolist() == [[-15, 60]]
    cool = GraSP(temperature=2)(twin(net), ["0.weight"], seen)["0.weight"]
    assert cool.flatten().tolist() == pytest.approx([-15 / 16, 60 / 16])  # g and H by 1 / 4 each
    flat = GraSP()(twin(net), ["0.weight"], Seen(None, [torch.ones(1, 2)], output))
    assert flat["0.weight"].tolist() == [[0, 0]]  # a line has no curvature


def test_masks_by_hand() -> None:
    """Scores 5 10 18 24 | 15 42: half of six weights at once are 42, 24, 18."""
    net = linear([[1, -2], [3, 4]], [[5, -6]])
    before = [p.clone() for p in net.parameters()]
    names = ["0.weight", "1.weight"]
    kept = masks(net, names, 0.5, how=SynFlow(rounds=1), seen=Seen(torch.zeros(1, 2)))
    assert kept["0.weight"].tolist() == [[False, False], [True, True]]
    assert kept["1.weight"].tolist() == [[False, True]]
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    whole = masks(net, names, 1.0, how=SynFlow(rounds=3), seen=Seen(torch.zeros(1, 2)))
    assert all(bool(mask.all()) for mask in whole.values())


def test_rounds_do_not_leave_a_path_that_leads_nowhere() -> None:
    """Thirteen of 256 weights in four layers: scored once, the best of each layer need not meet."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    names = [f"{i}.weight" for i in range(4)]
    flows = {}
    for rounds in (1, 100):
        kept = masks(net, names, 0.05, how=SynFlow(rounds=rounds), seen=Seen(torch.zeros(1, 8)))
        assert sum(int(mask.sum()) for mask in kept.values()) == round(256 * 0.05)
        work = twin(net)
        with torch.no_grad():
            for name, mask in kept.items():
                work.get_parameter(name).mul_(mask)
        flows[rounds] = value(flow(work, torch.zeros(1, 8)))
    assert flows[100] > flows[1]
    assert flows[100] > 0


def test_what_is_gone_stays_gone() -> None:
    """Each round's mask lies in the one before: a smaller density with the same rounds keeps no weight anew."""

    class Falling(WeightScore):
        rounds = 3

        def __init__(self) -> None:
            self.alive: list[int] = []

        def __call__(self, model: nn.Module, names: Any, seen: Seen) -> dict[str, Tensor]:
            weight = model.get_parameter("0.weight")
            self.alive.append(int((weight != 0).sum()))
            return {"0.weight": torch.arange(1.0, 9).reshape(2, 4) * (-1) ** len(self.alive)}  # order turns each time

    how = Falling()
    kept = masks(linear([[1, 1, 1, 1], [1, 1, 1, 1]]), ["0.weight"], 1 / 8, how=how, seen=Seen(None))
    assert how.alive == [8, 4, 2]
    assert kept["0.weight"].flatten().nonzero().tolist() == [[2]]  # 1 2 3 4, then 3 4, then 3


def halves(size: int) -> np.ndarray:
    """Every mask of `size` numbers with exactly half of them; `[masks, size]`."""
    rows = []
    for picked in combinations(range(size), size // 2):
        row = np.zeros(size)
        row[list(picked)] = 1
        rows.append(row)
    return np.array(rows)


def test_the_expected_flow_by_enumeration() -> None:
    """3-4-2, all weights 1/2: 6 dense; 1.5 for masks of half of the weights or rows; 3 for a crop (1.5 / q)."""
    net = linear([[0.5] * 3] * 4, [[0.5] * 4] * 2)
    assert value(flow(twin(net), torch.zeros(1, 3))) == 6
    first = 0.5 * halves(12).reshape(-1, 4, 3).sum(2)  # what each middle unit gets, mask by mask
    second = 0.5 * halves(8).reshape(-1, 2, 4).sum(1)
    assert first.shape[0] * second.shape[0] == 924 * 70
    assert float((first @ second.T).mean()) == pytest.approx(1.5)
    rows = halves(4)
    whole_rows, whole_columns = 0.5 * 3 * rows, 0.5 * 2 * rows
    assert float((whole_rows @ whole_columns.T).mean()) == pytest.approx(1.5)
    assert float((whole_rows * whole_columns).sum(1).mean()) == pytest.approx(3.0)
    cropped = linear([[0.5] * 3] * 2, [[0.5] * 2] * 2)
    assert value(flow(cropped, torch.zeros(1, 3))) == 3
    with torch.no_grad():  # the enumeration is of what `flow` computes
        mask = halves(12)[100].reshape(4, 3), halves(8)[33].reshape(2, 4)
        for layer, part in zip(net, mask, strict=True):
            layer.weight.mul_(torch.tensor(part))  # type: ignore[operator, union-attr]
    assert value(flow(net, torch.zeros(1, 3))) == pytest.approx(float(first[100] @ second[33]))


def test_shuffled_masks_differ_and_their_counts_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = {"a": torch.rand(20, 30, generator=generator) < 0.3, "b": torch.rand(5, 4, 3, 3, generator=generator) < 0.7}
    one, two = shuffled(kept, seed=1), shuffled(kept, seed=2)
    for name, mask in kept.items():
        assert one[name].shape == mask.shape
        assert int(one[name].sum()) == int(two[name].sum()) == int(mask.sum())
        assert not torch.equal(one[name], mask) and not torch.equal(one[name], two[name])
        assert torch.equal(one[name], shuffled(kept, seed=1)[name])


def test_random_weights_keep_about_the_same_share_everywhere() -> None:
    net = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 30))
    how = RandomWeights(seed=3)
    kept = masks(net, ["0.weight", "1.weight"], 0.25, how=how, seen=Seen(None))
    assert all(abs(float(mask.float().mean()) - 0.25) < 0.03 for mask in kept.values())
    again = masks(net, ["0.weight", "1.weight"], 0.25, how=RandomWeights(seed=4), seen=Seen(None))
    assert not torch.equal(kept["0.weight"], again["0.weight"])


def test_scores_of_units_are_sums() -> None:
    """Middle units: 5 + 10 + 15 and 18 + 24 + 42."""
    net = linear([[1, -2], [3, 4]], [[5, -6]])
    graph = niwaki.trace(net, torch.zeros(1, 2))
    how = SynFlow(rounds=1)
    found = unit_scores(graph, how(twin(net), ["0.weight", "1.weight"], Seen(torch.zeros(1, 2))), how)
    assert [values.tolist() for values in found.values.values()] == [[30, 84]]
    assert niwaki.choose(graph, found, niwaki.Budget(keep=0.5, of="units")).kept == {"0": (1,)}


def test_refusals() -> None:
    net = linear([[1, 2]])
    with pytest.raises(InputError, match="give batches and a loss"):
        SNIP()(twin(net), ["0.weight"], Seen(None))
    with pytest.raises(InputError, match="whole numbers"):
        flow(nn.Embedding(4, 2), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(InputError, match="density"):
        masks(net, ["0.weight"], 0.0, how=SynFlow(), seen=Seen(torch.zeros(1, 2)))
    with pytest.raises(InputError, match="no such parameter"):
        masks(net, ["9.weight"], 0.5, how=SynFlow(), seen=Seen(torch.zeros(1, 2)))
    with pytest.raises(NotFiniteError):
        masks(linear([[1, float("nan")]]), ["0.weight"], 0.5, how=SynFlow(), seen=Seen(torch.zeros(1, 2)))
    for wrong in ({"rounds": 0}, {"rounds": 1.5}):
        for kind in (SynFlow, SNIP, GraSP):
            with pytest.raises(InputError, match="rounds"):
                kind(**wrong)  # type: ignore[arg-type]
