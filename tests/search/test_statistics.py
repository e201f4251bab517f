"""Losses by the statistics of each batch, against those of networks that are really cut."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.errors import InputError
from niwaki.graph.plans import plan_of
from niwaki.search import Candidate, Masked
from niwaki.surgery import surgery_of
from search.test_masked import CLASSES, judge_of, made, totals


def test_statistics_that_there_are_not():
    with pytest.raises(InputError, match=r"statistics='Batch'.*running, batch"):
        judge_of(statistics="Batch")
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)).eval()
    one = [(torch.randn(1, 3), torch.arange(1))]
    task = SimpleNamespace(
        losses=lambda model, b: {"loss": functional.cross_entropy(model(b[0]), b[1])}, inputs=lambda b: b[0]
    )
    with pytest.raises(InputError, match=r"more than 1 value per channel.*batch 0; do: give larger batches"):
        judge_of(net, task, one, statistics="batch")(Candidate({}))
    judge_of(net, task, one)(Candidate({}))


def test_statistics_of_the_batch_by_hand():
    """Both channels are x: of mean 1 and variance 1 in the batch, of mean 0 and variance 1 as they ran up. With 3 added
    to the variance they come out as -1/2, 1/2 and as 0, 1."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2, eps=3), nn.Linear(2, 1, bias=False)).eval()
    for parameter in (net[0].weight, net[2].weight):
        nn.init.ones_(parameter)
    task = SimpleNamespace(losses=lambda model, b: {"square": model(b[0]).square().mean()}, inputs=lambda b: b[0])
    batches = [(torch.tensor([[0.0], [2.0]]),)]
    for statistics, whole, cut in (("running", 0 + 4, 0 + 1), ("batch", 1 + 1, 0.25 + 0.25)):
        judge = judge_of(net, task, batches, statistics=statistics)
        assert judge(Candidate({})) == {"square": whole}
        assert judge(Candidate({}, "0", 1)) == {"square": cut} == judge(Candidate({"0": 1}))
    assert net[1].running_mean.tolist() == [0, 0] and net[1].running_var.tolist() == [1, 1]
    assert net[1].track_running_stats and not net[1].training and not net[1].num_batches_tracked


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_statistics_of_the_batch_are_those_of_the_cut_network(memory):
    judge = judge_of(statistics="batch", memory=memory)
    gone, skipped = {}, []
    for choice in judge.choices():
        count = choice.size // 3
        small = niwaki.cut(made(), plan_of(judge.graph, judge.kept({**gone, choice.name: count})))
        for module in small.modules():
            module.training = isinstance(module, nn.BatchNorm2d)
        assert judge(Candidate(gone, choice.name, count)) == pytest.approx(totals(small), rel=1e-5)
        skipped.append(judge._running.prefixes.start[0])
        gone[choice.name] = count
    assert (max(skipped) > 0) is (memory > 0)  # and nothing that a norm writes keeps a prefix from being held


class Written(nn.Module):
    """A width that stands in the forward: only the exported graph can be cut."""

    def __init__(self, drop=0.0):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.two(self.drop(self.norm(self.one(x)).view(-1, 8).relu()))


def test_dropout_in_an_exported_graph_is_named_at_the_start():
    """All of an exported graph is in training mode where its batch norms are: its dropout draws, too."""
    batches = [(torch.randn(4, 3), torch.arange(4))]
    task = SimpleNamespace(
        losses=lambda model, b: {"loss": functional.cross_entropy(model(b[0]), b[1])}, inputs=lambda b: b[0]
    )

    def asked(drop, statistics):
        net = Written(drop).eval()
        return Masked(net, niwaki.trace(net, batches[0][0]), task, batches, statistics=statistics)(Candidate({}))

    with pytest.raises(InputError, match=r"statistics of batches.*training mode.*dropout.*statistics='running'"):
        asked(0.5, "batch")
    assert asked(0.5, "running")["loss"] > 0 and asked(0.0, "batch")["loss"] > 0
    eager = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
    judge = judge_of(eager, task, batches, statistics="batch")  # there norms alone are in training mode
    assert judge(Candidate({"0": 2})) == judge(Candidate({"0": 2}))


def test_statistics_of_the_batch_in_an_exported_graph():
    batches = [(torch.randn(4, 3), torch.arange(4))]
    task = SimpleNamespace(
        losses=lambda model, b: {"loss": functional.cross_entropy(model(b[0]), b[1])}, inputs=lambda b: b[0]
    )
    net = Written().eval()
    judge = Masked(net, niwaki.trace(net, batches[0][0]), task, batches, statistics="batch")
    (choice,) = judge.choices()
    small = niwaki.cut(net, plan_of(judge.graph, judge.kept({choice.name: 3})))
    assert surgery_of(small).door == "exported"
    with torch.no_grad():
        running, batch = (task.losses(small.train(mode), batches[0])["loss"].item() for mode in (False, True))
    for candidate in (Candidate({}, choice.name, 3), Candidate({choice.name: 3}), Candidate({choice.name: 3})):
        assert judge(candidate)["loss"] == pytest.approx(4 * batch, rel=1e-5) != pytest.approx(4 * running, rel=1e-3)
    of_one = judge_of(net, task, batches, statistics="batch")  # of one row batch norm has no statistics
    with pytest.raises(InputError, match=r"statistics of batches.*not be exported in training mode.*'running'"):
        of_one(Candidate({choice.name: 3}))
