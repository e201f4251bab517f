"""Positions of which any number will do, until they meet what is counted."""

import torch
from labelled import Net, coupled, cut_and_judge
from torch import Tensor, nn

import niwaki
from niwaki.graph.labels import LabelSpace

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def test_zeros_written_through_a_view_belong_to_what_was_written() -> None:
    """8 rows of zeros get 8 channels; laid together with 3 copies of each, they are still those of both layers."""

    def forward(net: Net, x: Tensor) -> Tensor:
        place = x.new_zeros(8, 3, 5)
        place[:, :2] = net.one(x).t().unsqueeze(1)
        other = net.two(x).t().unsqueeze(1).expand(8, 3, 5).reshape(24, 5)
        y = (place.view(24, 5) * other).view(8, 3, 5).sum(1)
        return net.out(y.t())

    net = Net(forward, one=nn.Linear(6, 8), two=nn.Linear(6, 8), out=nn.Linear(8, 3)).eval()
    assert coupled(niwaki.trace(net, X), "one.weight:0", "two.weight:0", "out.weight:1")
    assert cut_and_judge(net, X)[2].passed


def test_copies_that_nothing_uses_are_as_many_as_a_forward_makes() -> None:
    """A mask for every head, made by a module that never hears that two of them are gone."""

    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 4

        def forward(self, x: Tensor) -> Tensor:
            return (x.mean(-1) > 0)[None].repeat(self.heads, 1)

    def forward(net: Net, x: Tensor) -> Tensor:
        scores = net.score(x).view(5, 4, 2).transpose(0, 1)  # [heads, tokens, size]
        scores = scores.masked_fill(net.mask(x)[:, :, None], 0.0)
        y = net.out(scores.transpose(0, 1).flatten(1))
        net.mask(y)
        return y

    net = Net(forward, score=nn.Linear(6, 8), mask=Mask(), out=nn.Linear(8, 3)).eval()
    _, small, receipt = cut_and_judge(net, X)
    assert receipt.passed and receipt.door == "eager" and small.score.out_features == 4


def test_nothing_meets_nothing() -> None:
    """What is left over of channels that are all turned (partial rotary positions) is empty on both sides."""
    space = LabelSpace()
    free, counted = space.free(3), space.new(3)
    space.unite(free[:0], counted[:0])
    assert space.is_free(free) and not space.strict
    space.unite(free, counted)
    assert [(a.tolist(), b.tolist()) for a, b in space.strict] == [([0, 1, 2], [3, 4, 5])]
