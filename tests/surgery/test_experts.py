"""Rows sorted by expert: one grouped product, whose kernels take no odd widths and nothing wider than float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import niwaki
from niwaki.graph.plans import plan_of

pytestmark = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")


class SortedExperts(nn.Module):
    """Two experts of 8 gated channels; rows sorted by the one they go to, and put back."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.router = nn.Linear(8, 2)
        self.up = nn.Parameter(torch.randn(2, 16, 8, generator=generator))
        self.down = nn.Parameter(torch.randn(2, 8, 8, generator=generator))

    def forward(self, x):
        expert, order = self.router(x).argmax(-1).sort()
        ends = F.one_hot(expert, 2).sum(0).cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x[order], self.up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(gate.sigmoid() * up, self.down.transpose(1, 2), offs=ends)
        return x + torch.zeros_like(x).index_add(0, order, y)


@pytest.fixture
def traced():
    torch.manual_seed(0)
    model = SortedExperts().eval()
    return model, niwaki.trace(model, torch.randn(6, 8))


def scored(model, graph):
    how = niwaki.scores.Random()
    return niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)


def test_widths_of_experts_are_free_and_experts_stay(traced):
    _, graph = traced
    assert not graph.unknown
    (group,) = [g for g in graph.groups if g.fixed is None]
    assert group.units == 8 and group.multiple == 4  # 4 floats are 16 bytes
    assert sorted((m.tensor, m.axis) for m in group.members) == [("down", 2), ("up", 1)]
    fixed = {(m.tensor, m.axis): g.fixed for g in graph.groups if g.fixed is not None for m in g.members}
    assert fixed["up", 0] == fixed["down", 0] == "experts chosen by data"
    assert graph.macs == 6 * (8 * 2 + 8 * 16 + 8 * 8)  # the router, then each row meets one expert


def test_what_is_chosen_is_a_width_that_the_kernel_takes_and_cut_is_mask(traced):
    model, graph = traced
    plan = niwaki.choose(graph, scored(model, graph), niwaki.Budget(keep=0.7, of="units"))
    assert plan.promised["units"] == 4
    small = niwaki.cut(model, plan)
    assert small.up.shape == (2, 8, 8) and small.down.shape == (2, 8, 4)
    receipt = niwaki.verify(model, small, plan, torch.randn(6, 8))
    assert receipt.exact and receipt.passed and receipt.scale > 0.1
    with torch.no_grad():  # in single precision the kernel itself
        assert small(torch.randn(6, 8)).shape == (6, 8)


def test_another_width_is_refused_with_the_kernels_reason(traced):
    model, graph = traced
    alive = torch.ones(graph.units.count, dtype=torch.bool).numpy()
    (group,) = [g for g in graph.groups if g.fixed is None]
    alive[group.ids[:3]] = False
    with pytest.raises(niwaki.errors.CannotCutError, match="multiple of 16 bytes"):
        niwaki.cut(model, plan_of(graph, alive))
