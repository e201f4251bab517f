"""What only runs in training mode shares widths with the rest, also where that forward reads numbers."""

import importlib

import pytest
import torch
from labelled import coupled, cut_and_judge
from torch import Tensor, nn

import niwaki

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class MaskedWhileTraining(nn.Module):
    """A vector that stands in for masked tokens, and a layer that a coin leaves out: both in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.more, self.down = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.stand_in = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.training:
            y[torch.arange(5, device=x.device).expand(2, 5) % 2 == 0] = self.stand_in
        if not self.training or torch.rand([]) > -1.0 + 0.0 * y.sum():
            y = y + self.more(y)
        return self.down(y)


def test_a_parameter_that_trains_only_is_cut_with_the_width_it_is_written_into() -> None:
    net = MaskedWhileTraining().eval()
    graph = niwaki.trace(net, X)
    assert graph.device == "meta"
    assert coupled(graph, "up.weight:0", "stand_in:0", "down.weight:1")
    _, small, receipt = cut_and_judge(net, X)
    assert receipt.passed and small.stand_in.shape == (4,)
    small.train()
    small(X).sum().backward()
    assert small.stand_in.grad is not None


class NeverTrains(MaskedWhileTraining):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            raise RuntimeError("no training")
        return y


def test_what_was_seen_in_part_is_held() -> None:
    net = NeverTrains().eval()
    (group,) = [g for g in niwaki.trace(net, X).groups for m in g.members if m.tensor == "stand_in"]
    assert group.fixed == "the forward in training mode fails"


def test_a_number_that_nothing_uses_is_no_reason_to_look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a parameter of one element nothing can be cut: scales of losses, say."""
    module = importlib.import_module("niwaki.graph.trace")
    monkeypatch.setattr(module, "second_look", lambda *_, **__: pytest.fail("looked again"))
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.register_parameter("scale", nn.Parameter(torch.zeros(())))
    model.register_parameter("shift", nn.Parameter(torch.zeros(1)))
    assert niwaki.trace(model, torch.zeros(1, 3)).units.count
    model.register_parameter("unused", nn.Parameter(torch.zeros(2)))
    with pytest.raises(pytest.fail.Exception, match="looked again"):
        niwaki.trace(model, torch.zeros(1, 3))
