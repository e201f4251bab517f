"""Halves that a forward asks for by `chunk` keep equally many, each by its own ranking."""

import pytest
import torch
from torch import nn

import niwaki
from niwaki.budgets import GlobalRank, GroupThreshold, Uniform, at_pace, choose, groups_given, scaled_layers
from niwaki.errors import UnknownNameError


class C2f(nn.Module):
    """A block of YOLOv8: one convolution split in halves; blocks run on the second, each adding to it."""

    def __init__(self, blocks=2):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.inner = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(blocks))
        self.two = nn.Conv2d(8 + 4 * blocks, 2, 1)

    def forward(self, x):
        parts = list(self.norm(self.one(x)).relu().chunk(2, 1))
        for block in self.inner:
            parts.append(parts[-1] + block(parts[-1]).relu())
        return self.two(torch.cat(parts, 1))


EXAMPLE = torch.zeros(1, 3, 4, 4)


def scored(values):
    net = C2f().eval()
    net.norm.weight.data = torch.tensor(values)
    graph = niwaki.trace(net, EXAMPLE)
    return net, graph, niwaki.score(graph, niwaki.collect(net, graph, frozenset()), how=niwaki.scores.NormScale())


@pytest.mark.parametrize("how", [Uniform(), GlobalRank(normalise="none")], ids=str)
def test_each_half_is_ranked_by_itself(how):
    """Scales 0.9 .. 0.6 and 0.1 .. 0.4, half of them: 0 and 1 stay of the first half, 6 and 7 of the second."""
    net, graph, scores = scored([0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4])
    plan = choose(graph, scores, niwaki.Budget(keep=4, of="units"), how=how, splits="even")
    keep = {cut["tensor"]: cut["keep"] for cut in plan.cuts if cut["axis"] == 0}
    assert keep["norm.weight"] == keep["one.weight"] == [0, 1, 6, 7]
    assert keep["inner.0.weight"] == [2, 3]  # coupled with the second half
    small = niwaki.cut(net, plan)
    receipt = niwaki.verify(net, small, plan, EXAMPLE)
    assert receipt.passed and receipt.door == "eager" and plan.decided_by["splits"] == "even"


def test_free_halves_are_ranked_together_and_need_another_forward():
    net, graph, scores = scored([0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4])
    plan = choose(graph, scores, niwaki.Budget(keep=5, of="units"), how=GlobalRank(normalise="none"))
    keep = {cut["tensor"]: cut["keep"] for cut in plan.cuts if cut["axis"] == 0}
    assert keep["norm.weight"] == [0, 1, 2, 3, 7] and "splits" not in plan.decided_by
    receipt = niwaki.verify(net, niwaki.cut(net, plan), plan, EXAMPLE)
    assert receipt.passed and receipt.door == "exported"


def test_half_of_every_layer_rounded_up():
    """At pace 1 - q every layer keeps ceil(q C): of halves of 4, 3 of 4 at 0.6; multiples of 2 make it 4."""
    _, graph, scores = scored([0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4])
    everything = niwaki.Budget(keep=1.0)
    plan = at_pace(graph, scores, (everything,), how=Uniform(), pace=1 - 0.6, splits="even")
    assert {cut["tensor"]: cut["keep"] for cut in plan.cuts}["norm.weight"] == [0, 1, 2, 5, 6, 7]
    wide = at_pace(graph, scores, (niwaki.Budget(keep=1.0, multiple=4),), how=Uniform(), pace=0.4, splits="even")
    assert wide.cuts == ()


def test_a_half_that_stays_whole_keeps_the_other():
    net = C2f(0).eval()
    net.two = nn.Conv2d(8, 2, 1)

    class Shown(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            a, b = self.net.norm(self.net.one(x)).chunk(2, 1)
            return self.net.two(torch.cat([a, b], 1)), b  # b is put out

    model = Shown().eval()
    graph = niwaki.trace(model, EXAMPLE)
    scores = niwaki.score(graph, niwaki.collect(model, graph, frozenset()), how=niwaki.scores.NormScale())
    plan = at_pace(graph, scores, (niwaki.Budget(keep=1.0),), how=Uniform(), pace=0.5, splits="even")
    assert plan.cuts == () and "another part of its split stays whole" in plan.decided_by["left_whole"].values()


def test_an_unknown_choice():
    _, graph, scores = scored([1.0] * 8)
    with pytest.raises(UnknownNameError, match="free, even"):
        choose(graph, scores, niwaki.Budget(keep=0.5), splits="odd")


@pytest.mark.parametrize(("share", "mean", "last"), [(0.5, [0, 1, 6, 7], range(8)), (0.75, [0, 7], [0, 1, 6, 7])])
def test_thresholds_as_they_are_take_what_both_halves_would_lose(share, mean, last):
    """Scales 0.9 .. 0.6 and 0.1 .. 0.4 in one group: half of all are the second half, of which no pair is; of six the
    second half and two of the first.
    """
    net, graph, _ = scored([0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4])
    layers = scaled_layers(graph, net)
    paces = GroupThreshold((share,))(graph, layers, groups_given(["*"], layers))
    for bundle, kept in (("mean", mean), ("max", last)):
        plan = at_pace(graph, paces, (niwaki.Budget(keep=1.0),), splits="even", bundle=bundle)
        keep = {cut["tensor"]: cut["keep"] for cut in plan.cuts if cut["axis"] == 0}
        assert keep.get("norm.weight", list(range(8))) == list(kept)


def test_the_method_takes_fractions_of_a_split_so():
    net, graph, _ = scored([0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4])
    method = niwaki.methods.GroupChannelPruning(groups=("*",), fractions=(0.75,), literal=True)
    job = niwaki.methods.Job(net, EXAMPLE, (niwaki.Budget(keep=1.0),))
    plan = method.choose(graph, net, None, job)(graph, job.budget)
    assert {cut["tensor"]: cut["keep"] for cut in plan.cuts}["norm.weight"] == [0, 1, 6, 7]
