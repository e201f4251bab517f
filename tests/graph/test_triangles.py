"""Triangles of matrices: rows and columns are counted against each other."""

from typing import Any

import pytest
import torch
from labelled import Net, Seen, cut_and_judge, group_of
from torch import Tensor, nn

import niwaki


def test_a_triangular_weight_loses_rows_and_columns_alike() -> None:
    """4 -> 6 -> (triangle) 6 -> 3: what the triangle reads is what it puts out, for each zero is at its place."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.last(net.first(x) @ net.mix.tril(-1).mT)

    net = Net(forward, first=nn.Linear(4, 6), mix=nn.Parameter(torch.randn(6, 6)), last=nn.Linear(6, 3))
    group = group_of(niwaki.trace(net, torch.randn(2, 4)), "first.weight", 0)
    assert {(m.tensor, m.axis) for m in group.members} == {
        ("first.weight", 0), ("first.bias", 0), ("mix", 0), ("mix", 1), ("last.weight", 1),
    }  # fmt: skip
    plan, small, receipt = cut_and_judge(net, torch.randn(2, 4), keep=0.5)
    keep = list(plan.kept[group.name])
    assert len(keep) == 3 and receipt.exact and receipt.passed
    assert torch.equal(small.mix, net.mix[keep][:, keep])


@pytest.mark.parametrize("operator", [torch.tril, torch.triu, Tensor.tril_, Tensor.triu_])
@pytest.mark.parametrize(("shape", "axis"), [((2, 4, 4), 1), ((2, 4, 4), 2), ((2, 3, 4), 2), ((2, 4, 4), 0)])
def test_what_is_counted_against_nothing_stays(operator: Any, shape: tuple[int, ...], axis: int) -> None:
    """Labels of rows meet columns that have none, and the other way round; labels before both pass."""
    seen = Seen(operator, shape, [axis])
    assert not seen.recorder.unknown
    assert [labels.tolist() for labels, _ in seen.space.fixed] == ([] if axis == 0 else [list(range(4))])
    assert [labels.shape for labels in seen.fields()] == [tuple(n if a == axis else 1 for a, n in enumerate(shape))]


def test_a_triangle_that_is_not_square_is_fixed() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.last(net.first(x) @ net.mix.triu().mT)

    net = Net(forward, first=nn.Linear(4, 6), mix=nn.Parameter(torch.randn(5, 6)), last=nn.Linear(5, 3))
    graph = niwaki.trace(net, torch.randn(2, 4))
    for tensor, axis in ("first.weight", 0), ("last.weight", 1):
        assert group_of(graph, tensor, axis).fixed == "meets a triangle that counts its positions"


@pytest.mark.parametrize("place", ["of its own", "in place"])
def test_a_triangle_of_ones_is_counted(place: str) -> None:
    """Sums of six learned tokens up to each, then of all: not exact, since the sums of removed ones are gone too."""

    def forward(net: Any, x: Tensor) -> Tensor:
        ones = torch.ones(net.tokens.shape[0], net.tokens.shape[0], device=x.device)
        ones = ones.tril() if place == "of its own" else ones.tril_()
        return x + (ones @ net.tokens).sum(0)

    net = Net(forward, tokens=nn.Parameter(torch.randn(6, 4)))
    graph = niwaki.trace(net, torch.randn(2, 4))
    group = group_of(graph, "tokens", 0)
    assert group.fixed is None and not group.exact and group.inexact == "sum is taken across it"
