"""Convolutions with norms folded in and channels last, in a forward that is seen call by call."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.graph.plans import plan_of
from niwaki.search import Candidate, Masked
from niwaki.search.prefix import Prefixes
from niwaki.search.quick import CONVOLUTION, Quick

X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
PLAIN = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def test_a_norm_in_a_convolution_by_hand():
    weight, bias = torch.full((1, 1, 1, 1), 2.0), torch.tensor([1.0])
    scale, shift, mean, variance = (torch.tensor([value]) for value in (3.0, 5.0, 4.0, 3.0))
    x = torch.tensor([[[[7.0]]]])
    quick = Quick.of(CONVOLUTION, (x, weight, bias, *PLAIN), lambda tensor: True)
    quick.follow(2, (x, scale, shift, mean, variance, False, 0.1, 1.0), lambda tensor: True)
    # (2 x + 1 - 4) / sqrt(3 + 1) * 3 + 5 = 3 x + 0.5
    assert quick.after == 2 and [t.item() for t in quick._weights(True)] == [3.0, 0.5]
    args = (x, weight, bias, *PLAIN)
    assert quick(args, folded=True).item() == 21.5 and quick(args, folded=False).item() == 15.0
    scale.mul_(2)  # in place, as candidates' zeros are: 6 x - 4
    assert quick(args, folded=True).item() == 38.0
    shift.fill_(0.0)
    assert quick(args, folded=True).item() == 33.0


@pytest.mark.parametrize(
    "change",
    [
        {"func": torch.ops.aten.relu.default},
        {"transposed": True},
        {"weight": torch.ones(1, 1, 1, 1, dtype=torch.float16)},
        {"before": lambda tensor: False},
    ],
)
def test_what_stays_as_it_is(change):
    func, weight = change.get("func", CONVOLUTION), change.get("weight", torch.ones(1, 1, 1, 1))
    args = (X[:, :1].to(weight.dtype), weight, None, *PLAIN[:3], change.get("transposed", False), *PLAIN[4:])
    assert Quick.of(func, args, change.get("before", lambda tensor: True)) is None
    with torch.inference_mode():
        frozen = torch.ones(1, 1, 1, 1)  # without versions: nothing says when it changes
    assert Quick.of(CONVOLUTION, (X[:, :1], frozen, None, *PLAIN), lambda tensor: True) is None


class Net(nn.Module):
    """Norms behind convolutions: one that can be folded, one whose convolution is read twice, one in training mode."""

    def __init__(self, way="plain"):
        super().__init__()
        self.way = way
        self.one, self.norm1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.two, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False)
        self.three, self.norm3 = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)
        self.last = nn.Linear(5, 3)
        for norm in (self.norm1, self.norm2, self.norm3):
            norm.running_mean.normal_(generator=torch.Generator().manual_seed(2))
            norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(3))

    def forward(self, x):
        x = self.norm1(self.one(x)).relu_()
        raw = self.two(x)
        x = self.norm2(raw).relu() + raw
        x = self.three(x)
        if self.way == "batch":  # its statistics are the batch's
            x = functional.batch_norm(x, None, None, self.norm3.weight, self.norm3.bias, training=True)
        else:
            x = self.norm3(x)
        x = x.relu()
        if self.way == "view":
            x = x.view(x.shape[0], 5, -1).mean(2) if x.is_contiguous() else x.view(x.shape[0], -1)
        else:
            x = x.mean((2, 3))
        if self.way == "asks":
            x = x * (1 + self.one(X).is_contiguous())
        return self.last(x)


def judge_of(net, **settings):
    batches = [(X, torch.tensor([0, 1, 2])), (X[:2] * 2, torch.tensor([2, 1]))]
    task = SimpleNamespace(
        losses=lambda model, b: {"loss": functional.cross_entropy(model(b[0]), b[1])}, inputs=lambda b: b[0]
    )
    return Masked(net, niwaki.trace(net, X[:1]), task, batches, **settings)


@pytest.mark.parametrize(
    ("way", "norms", "stays"),
    [("plain", 2, True), ("batch", 1, True), ("view", 0, False), ("asks", 0, False)],
)
@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_losses_are_those_of_the_cut_network(way, norms, stays, memory):
    torch.manual_seed(0)
    net = Net(way).eval()
    judge = judge_of(net, memory=memory)
    for name in ("one#2", "three"):
        for count in (1, 2, 3):
            small = niwaki.cut(net, plan_of(judge.graph, judge.kept({name: count}))).eval()
            with torch.no_grad():
                cut = sum(len(y) * functional.cross_entropy(small(x), y).item() for x, y in judge.batches)
            assert judge(Candidate({}, name, count))["loss"] == pytest.approx(cut, rel=1e-5)
    tape = judge._running.prefixes.tape(0)
    assert judge.quick is stays and len(tape.norms) == norms and len(tape.quick) == (3 if stays else 0)
    assert judge_of(net, quick=False).quick is False


def test_numbers_that_are_not_the_same_end_it(monkeypatch):
    plain = Quick.__call__
    monkeypatch.setattr(Quick, "__call__", lambda self, args, *, folded: plain(self, args, folded=folded) * 1.01)
    torch.manual_seed(0)
    net = Net().eval()
    judge = judge_of(net)
    small = niwaki.cut(net, plan_of(judge.graph, judge.kept({"one#2": 3}))).eval()
    with torch.no_grad():
        cut = sum(len(y) * functional.cross_entropy(small(x), y).item() for x, y in judge.batches)
    assert judge(Candidate({}, "one#2", 3))["loss"] == pytest.approx(cut, rel=1e-6)
    assert judge.quick is False and not judge._running.prefixes.tape(0).quick


@pytest.mark.parametrize("way", ["another call", "another tensor"])
def test_a_forward_that_goes_another_way_between_a_convolution_and_its_norm(way):
    torch.manual_seed(0)
    net, turns = Net().eval(), []
    other = torch.randn(3, 6, 8, 8)

    def loss(x):
        turns.append(None)
        raw = net.one(x)
        if len(turns) > 3:  # not what was written down
            raw = raw + 1 if way == "another call" else other
        return {"loss": net.norm1(raw).mean()}

    with torch.no_grad():
        prefixes = Prefixes(loss, [X], list(net.parameters()), 1 << 20)
        assert prefixes.proved() and prefixes.tape(0).norms
        told = prefixes(0)["loss"]
        read = net.one(X) + 1 if way == "another call" else other
        assert told.item() == pytest.approx(net.norm1(read).mean().item(), rel=1e-6)
        assert prefixes.tape(0) is None
