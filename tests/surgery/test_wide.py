"""The judge counts in float64, whatever a forward asks for."""

import torch
from torch import nn

import niwaki
from niwaki.surgery.wide import Wide


class Narrow(nn.Module):
    """Casts, constants and functions that fall back to single precision."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 40), nn.Linear(40, 6)

    def forward(self, x):
        y = self.first(x).float() / torch.sqrt(torch.tensor(3.0, dtype=torch.float32))
        y = y.softmax(0, dtype=torch.float32) + torch.full((), 0.1)
        return self.second(y.to(x.dtype))


def test_casts_and_constants_are_wide_inside_and_as_ever_outside():
    x = torch.randn(3, dtype=torch.float64)
    with Wide():
        assert x.float().dtype == x.half().dtype == torch.zeros(2).dtype == torch.float64
        assert x.softmax(0, dtype=torch.float32).dtype == torch.float64
        third = x / torch.sqrt(torch.tensor(3.0, dtype=torch.float32))
        assert x.long().dtype == torch.int64 and x.view(torch.int64).dtype == torch.int64
    assert torch.equal(third, x / 3.0**0.5)
    assert x.float().dtype == torch.zeros(2).dtype == torch.float32


def test_a_forward_in_single_precision_is_judged_in_double():
    torch.manual_seed(0)
    model, x = Narrow().eval(), torch.randn(4, 6)
    graph = niwaki.trace(model, x)
    how = niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="units"))
    receipt = niwaki.verify(model, niwaki.cut(model, plan), plan, x)
    assert receipt.difference < 1e-13 * receipt.scale
