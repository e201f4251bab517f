"""Scales of norms, by hand."""

import pytest
import torch
from torch import nn

import niwaki
from niwaki.scores import NormScale, Scores


def found(model: nn.Module, example: torch.Tensor, how: NormScale) -> Scores:
    graph = niwaki.trace(model, example)
    return niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)


class Residual(nn.Module):
    """Two norms scale the same three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(2, 3, 1), nn.Conv1d(2, 3, 1), nn.Conv1d(3, 1, 1)
        self.na, self.nb = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        with torch.no_grad():
            self.na.weight.copy_(torch.tensor([0.5, -2.0, 0.0]))
            self.nb.weight.copy_(torch.tensor([1.5, 1.0, -0.25]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.na(self.a(x)) + self.nb(self.b(x)))


@pytest.mark.parametrize(
    ("merge", "expected"),
    # |gamma| = (0.5, 2, 0) and (1.5, 1, 0.25)
    [
        ("mean", [1.0, 1.5, 0.125]),
        ("sum", [2.0, 3.0, 0.25]),
        ("max", [1.5, 2.0, 0.25]),
        ("joint", [2.5**0.5, 5**0.5, 0.25]),
    ],
)
def test_coupled_scales_by_hand(merge: str, expected: list[float]) -> None:
    (values,) = found(Residual().eval(), torch.zeros(1, 2, 4), NormScale(merge=merge)).values.values()
    assert values.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(4, 4), nn.InstanceNorm2d(4, affine=True)])
def test_any_norm_with_a_scale(norm: nn.Module) -> None:
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -3.0, 0.5, 0.0]))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 2, 1)).eval()
    (values,) = found(model, torch.zeros(1, 3, 4, 4), NormScale()).values.values()
    assert values.tolist() == [1.0, 3.0, 0.5, 0.0]


def test_groups_without_a_scale_are_missing_and_left_whole() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)
    ).eval()
    graph = niwaki.trace(model, torch.zeros(1, 3, 4, 4))
    scores = found(model, torch.zeros(1, 3, 4, 4), NormScale())
    assert (list(scores.values), scores.missing) == (["2"], ("0#2",))
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.8, of="units"))
    assert list(plan.kept) == ["2"] and len(plan.kept["2"]) == 4
    assert plan.decided_by["left_whole"]["0#2"] == "the score can't judge it"


def test_a_scale_that_is_not_a_number_is_refused() -> None:
    model = Residual().eval()
    with torch.no_grad():
        model.na.weight[1] = float("nan")
    with pytest.raises(niwaki.errors.NotFiniteError, match=r"na\.weight"):
        found(model, torch.zeros(1, 2, 4), NormScale())
