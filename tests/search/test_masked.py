"""Losses by masking, with what comes before kept, against networks that are really cut."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.errors import CannotCutError, InputError
from niwaki.graph.plans import plan_of
from niwaki.search import Candidate, Greedy, Masked, Partial
from niwaki.search.prefix import Prefixes, memory_of

CLASSES = 5


class Block(nn.Module):
    """A residual block in the usual manner: in-place activations, a sum in place."""

    def __init__(self, wide):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)
        self.two, self.norm2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)

    def forward(self, x):
        out = functional.relu(self.norm1(self.one(x)), inplace=True)
        out = self.norm2(self.two(out))
        out += x
        return out.relu_()


class Net(nn.Module):
    """A stem, blocks, a depthwise layer, two branches that are joined, and two heads."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.blocks = nn.ModuleList([Block(12), Block(12)])
        self.depth, self.point = nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 10, 1)
        self.left, self.right = nn.Conv2d(10, 6, 1), nn.Conv2d(10, 8, 1)
        self.shared = nn.Conv2d(14, 16, 1)
        self.label, self.map = nn.Linear(16, CLASSES), nn.Conv2d(16, 1, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = functional.silu(self.first(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        x = functional.relu(self.point(self.depth(x)))
        x = torch.cat([self.left(x), self.right(x).relu()], 1)
        x = functional.relu(self.shared(x))
        return {"label": self.label(x.mean((2, 3))), "map": self.map(x)}


def made():
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


def losses(model, batch):
    found = model(batch[0])
    return {
        "label": functional.cross_entropy(found["label"], batch[1]),
        "map": (found["map"] - batch[0][:, :1, 1:-1, 1:-1]).abs().mean(),
    }


TASK = SimpleNamespace(losses=losses, inputs=lambda batch: batch[0])
BATCHES = [
    (torch.randn(n, 3, 9, 9, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 5) for n in (4, 4, 3)
]


def judge_of(net=None, task=TASK, batches=BATCHES, **settings):
    net = made() if net is None else net
    return Masked(net, niwaki.trace(net, batches[0][0][:1]), task, batches, **settings)


def totals(model, batches=BATCHES):
    found = {}
    with torch.no_grad():
        for batch in batches:
            for task, loss in losses(model, batch).items():
                found[task] = found.get(task, 0.0) + loss.item() * len(batch[0])
    return found


@pytest.mark.parametrize("memory", [1 << 30, 60000, 0])
def test_masked_losses_are_those_of_the_cut_network(memory):
    net = made()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    judge = judge_of(net, memory=memory)
    choices = judge.choices()
    assert judge(Candidate({})) == pytest.approx(totals(net))
    gone, skipped = {}, []
    for choice in choices:
        for count in (choice.size // 4, choice.size // 2):
            small = niwaki.cut(net, plan_of(judge.graph, judge.kept({**gone, choice.name: count}))).eval()
            assert judge(Candidate(gone, choice.name, count)) == pytest.approx(totals(small), rel=1e-5)
        start = judge._running.prefixes.start
        skipped.append(start[0])
        gone[choice.name] = choice.size // 4
    assert len(choices) == 7 and (max(skipped) > 0) is (memory > 0)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_comes_before_is_not_computed_again():
    judge = judge_of()
    judge(Candidate({}, "shared", 3))
    network = judge._running
    tape, start = next(iter(network.prefixes.tapes.values())), network.prefixes.start[0]
    names = [call.func.overloadpacket.__name__ for call in tape.calls]
    # what is made again is the layers from `shared` on: it, and of the two heads one is a convolution
    assert names[start:].count("convolution") == 2 and names[:start].count("convolution") == 9
    # of what came before, only what is read from there on is held
    held = network.prefixes.held[0][1]
    assert [tuple(tensor.shape) for tensor in held.values() if tensor.is_floating_point()] == [(4, 14, 7, 7)]


def test_the_python_of_the_forward_runs_every_time():
    judge = judge_of()
    judge(Candidate({}, "shared", 3))
    calls = judge._running.model.calls
    judge(Candidate({}, "shared", 4))
    assert judge._running.model.calls == calls + len(BATCHES)


def test_a_forward_that_goes_another_way_is_computed_whole():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
            self.turn = 0

        def forward(self, x):
            self.turn += 1
            x = self.one(x)
            x = x.relu() if self.turn % 2 else x.clamp(min=0)
            return self.three(self.two(x).relu())

    torch.manual_seed(0)
    net = Fickle().eval()
    batches = [(torch.randn(4, 3), torch.arange(4))]
    task = SimpleNamespace(
        losses=lambda model, b: {"loss": functional.cross_entropy(model(b[0]), b[1])}, inputs=lambda b: b[0]
    )
    judge = judge_of(net, task, batches)
    (name,) = [choice.name for choice in judge.choices() if choice.name == "two"]
    for count in (1, 2, 3):
        small = niwaki.cut(net, plan_of(judge.graph, judge.kept({name: count}))).eval()
        with torch.no_grad():
            cut = 4 * functional.cross_entropy(small(batches[0][0]), batches[0][1]).item()
        assert judge(Candidate({}, name, count))["loss"] == pytest.approx(cut, rel=1e-5)


class Adding(nn.Module):
    """Adds in place to what was made before the layers in between, which read a view of it."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.last = nn.Linear(6, CLASSES)
        self.register_buffer("seen", torch.zeros(6))
        self.sees = False

    def forward(self, x):
        if self.sees:
            self.seen.zero_().add_(x.mean())
        x = self.stem(x)
        x += self.two(self.one(x.view(-1, 2, 3).flatten(1)).relu())
        return self.last(x + self.seen)


def first_seen(way, x):
    """Something that depends on the values of the batch, before the network."""
    if way == "number":
        return x / float(x.abs().max())
    if way == "size":
        return x / (1 + x[x > 0].shape[0])
    return x / x.abs().max().tolist() if way == "list" else x


@pytest.mark.parametrize("way", ["plain", "number", "size", "list", "buffer"])
def test_what_is_held_is_what_would_be_computed(way):
    """Sums in place, views, numbers and sizes that depend on the batch's values, a buffer that each batch writes."""
    torch.manual_seed(0)
    net = Adding().eval()
    net.sees = way == "buffer"
    batches = [(torch.randn(4, 3) * (1 + 3 * n), torch.arange(4)) for n in range(3)]
    task = SimpleNamespace(
        losses=lambda model, b: {"loss": functional.cross_entropy(model(first_seen(way, b[0])), b[1])},
        inputs=lambda b: b[0],
    )
    judge = judge_of(net, task, batches)
    for count in (1, 2, 3, 4):
        small = niwaki.cut(net, plan_of(judge.graph, judge.kept({"one": count}))).eval()
        with torch.no_grad():
            cut = sum(4 * task.losses(small, batch)["loss"].item() for batch in batches)
        loss = judge(Candidate({}, "one", count))["loss"]
        if way == "list":  # no mode sees a list: no loss rather than a wrong one
            assert loss == pytest.approx(cut, rel=1e-5) or math.isnan(loss)
        else:
            assert loss == pytest.approx(cut, rel=1e-5)
    assert (judge._running.prefixes.start[0] > 0) is (way != "buffer")


class Aside(nn.Module):
    """Reads what it made by another name of its memory, which no mode sees being made: `data`, a new parameter."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.stem, self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        side = x.sigmoid()
        if self.way == "parameter":
            side = nn.Parameter(side, requires_grad=False)
            side.mul_(2)
        x = self.two(self.one(x).relu())
        return self.last(x + (side.data if self.way == "data" else side))


@pytest.mark.parametrize("way", ["data", "parameter"])
def test_what_is_read_by_another_name_is_held(way):
    torch.manual_seed(0)
    net, batches = Aside(way).eval(), [(torch.randn(4, 3) * (1 + n), torch.arange(4)) for n in range(2)]
    task = SimpleNamespace(
        losses=lambda model, b: {"loss": functional.cross_entropy(model(b[0]), b[1])}, inputs=lambda b: b[0]
    )
    judge = judge_of(net, task, batches)
    for count in (1, 2, 3, 4):
        small = niwaki.cut(net, plan_of(judge.graph, judge.kept({"one": count}))).eval()
        with torch.no_grad():
            cut = sum(4 * task.losses(small, batch)["loss"].item() for batch in batches)
        assert judge(Candidate({}, "one", count))["loss"] == pytest.approx(cut, rel=1e-5)
    assert judge._running.prefixes.start[0] > 0


def test_the_uncut_network_after_a_candidate():
    judge = judge_of()
    judge(Candidate({}, "shared", 8))
    assert judge(Candidate({})) == pytest.approx(totals(made()))
    small = niwaki.cut(made(), plan_of(judge.graph, judge.kept({"shared": 8}))).eval()
    assert judge(Candidate({}, "shared", 8)) == pytest.approx(totals(small), rel=1e-5)


def test_groups_that_are_not_exact_are_cut():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, CLASSES)).eval()
    batches = [(torch.randn(4, 3), torch.arange(4))]
    task = SimpleNamespace(
        losses=lambda model, b: {"loss": functional.cross_entropy(model(b[0]), b[1])}, inputs=lambda b: b[0]
    )
    judge = judge_of(net, task, batches)
    (choice,) = judge.choices()
    small = niwaki.cut(net, plan_of(judge.graph, judge.kept({choice.name: 3}))).eval()
    masked = niwaki.mask(net, plan_of(judge.graph, judge.kept({choice.name: 3}))).eval()
    with torch.no_grad():
        cut, zero = (4 * functional.cross_entropy(m(batches[0][0]), batches[0][1]).item() for m in (small, masked))
    assert judge(Candidate({}, choice.name, 3))["loss"] == pytest.approx(cut) != pytest.approx(zero)
    assert not judge_of(net, task, batches, exact_only=True).choices()


def test_coupled_filters_by_hand():
    class Coupled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = (nn.Linear(*shape, bias=False) for shape in ((2, 3), (3, 3), (3, 2)))
            self.a.weight.data = torch.tensor([[1.0, 1], [4, 0], [2, -2]])
            self.b.weight.data = torch.tensor([[0.0, 3, 3], [0, 0, 0], [3, 0, 0]])

        def forward(self, x):
            x = self.a(x)
            return self.last(x + self.b(x))

    net = Coupled()
    batches = [(torch.ones(2, 2), torch.zeros(2, dtype=torch.long))]
    judge = judge_of(net, TASK, batches)
    (choice,) = judge.choices()
    # row means 1, 2, 2 and 2, 0, 1: filter 1 first, of the other two the higher index, though a alone would drop 0
    order = judge.order(choice.name, np.ones(judge.graph.units.count, bool))
    ids = judge.graph.group(choice.name).ids.tolist()
    assert [ids.index(int(units[0])) for units in order] == [1, 2, 0]
    # root mean squares 1, 2.83, 2 and 2.45, 0, 1.73: sums 3.45, 2.83, 3.73
    by_squares = judge_of(net, TASK, batches, norm=2).order(choice.name, np.ones(judge.graph.units.count, bool))
    assert [ids.index(int(units[0])) for units in by_squares] == [1, 0, 2]


def test_the_largest_saving_comes_first():
    judge = judge_of()
    choices = judge.choices()
    assert [one.value for one in choices] == sorted((one.value for one in choices), reverse=True)
    every = np.ones(judge.graph.units.count, bool)
    before = judge.graph.cost(every)["macs"]
    for one in choices:
        after = judge.graph.cost(judge.kept({one.name: max(1, int(one.size * 0.3))}))["macs"]
        assert one.value == before - after


def test_what_is_cut_is_held_to_what_was_masked():
    """A loss that reads a weight's size says other things of masked and of cut networks."""
    task = SimpleNamespace(
        losses=lambda model, b: {"loss": losses(model, b)["label"] + model.shared.weight.shape[0]},
        inputs=lambda b: b[0],
    )
    judge = judge_of(task=task)
    judge(Candidate({}, "shared", 4))
    with pytest.raises(CannotCutError, match=r"masked and .* cut, on the same batch"):
        judge(Candidate({"shared": 4}, "point", 1))


@pytest.mark.parametrize("exact", [True, False])
def test_networks_that_are_cut_under_other_names(monkeypatch, exact):
    """Zeros stand for what is gone where they say the same, else the cut network is evaluated."""

    class Renamed(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, x):
            return self.inside(x)

    torch.manual_seed(0)
    between = nn.Identity() if exact else nn.LayerNorm(8)
    net = nn.Sequential(nn.Linear(3, 8), between, nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, CLASSES)).eval()
    batches = [(torch.randn(4, 3), torch.arange(4))]
    task = SimpleNamespace(
        losses=lambda model, b: {"loss": functional.cross_entropy(model(b[0]), b[1])}, inputs=lambda b: b[0]
    )
    judge = judge_of(net, task, batches)
    monkeypatch.setattr("niwaki.search.masked.cut", lambda model, plan: Renamed(niwaki.cut(model, plan)))
    for gone, name, count in (({}, "3", 2), ({}, "0", 3), ({"0": 3}, "3", 2), ({"0": 3, "3": 2}, None, 0)):
        candidate = Candidate(gone, name, count)
        small = niwaki.cut(net, plan_of(judge.graph, judge.kept(candidate.all))).eval()
        with torch.no_grad():
            cut = 4 * functional.cross_entropy(small(batches[0][0]), batches[0][1]).item()
        assert judge(candidate)["loss"] == pytest.approx(cut, rel=1e-5)


def test_no_batches():
    with pytest.raises(InputError, match="no batches"):
        Masked(made(), niwaki.trace(made(), BATCHES[0][0][:1]), TASK, [])


def test_a_candidate_refused_by_the_last_batch_is_known_by_its_first():
    judge = judge_of(nonnegative=True)
    whole = judge(Candidate({}, "shared", 1))
    full = judge(Candidate({}, "shared", 12))
    judge(Candidate({}, "shared", 1))
    first_two = totals(niwaki.cut(made(), plan_of(judge.graph, judge.kept({"shared": 12}))).eval(), BATCHES[:2])
    bound = {"label": (first_two["label"] + full["label"]) / 2}  # passed by the last batch alone
    assert judge.heavy == [0, 1, 2] and whole
    assert judge(Candidate({}, "shared", 12, bound)) == full
    assert judge(Candidate({"shared": 12})) == pytest.approx(full, rel=1e-5)


def test_memory_is_told_apart_by_what_holds_it():
    weight = torch.zeros(3, 3)
    assert memory_of(weight) == memory_of(weight.T) != memory_of(weight.clone())
    prefixes = Prefixes(lambda batch: {"loss": (batch @ weight).sum()}, [torch.ones(2, 3)], [weight], 1 << 20)
    prefixes.begin([weight])
    assert prefixes.start == {0: 0} and prefixes(0)["loss"].item() == 0


def test_a_refused_candidate_is_left_as_soon_as_it_is_too_much():
    """Batches that weigh most come first; a bound that holds is held to the end, with the totals of all."""
    judge = judge_of(nonnegative=True, batches=BATCHES[::-1])  # the last but one and the last have more samples
    judge(Candidate({}))
    assert judge.heavy == [1, 2, 0]
    full = judge(Candidate({}, "shared", 12))
    seen, heavy = judge.seen, judge.heavy[0]
    for task in full:
        # just below what it comes to: all are seen, and nothing is rounded otherwise
        assert judge(Candidate({}, "shared", 12, {task: full[task] * (1 - 1e-6)})) == full
        assert judge.seen == (seen := seen + 3)
        said = judge(Candidate({}, "shared", 12, {task: 1e-3}))
        assert isinstance(said, Partial) and judge.seen == (seen := seen + 1)
        small = niwaki.cut(made(), plan_of(judge.graph, judge.kept({"shared": 12}))).eval()
        assert dict(said) == pytest.approx(totals(small, [BATCHES[::-1][heavy]]), rel=1e-5)
    told = judge_of()(Candidate({}, "shared", 12, {"label": 1e-3}))
    assert told == pytest.approx(full) and not isinstance(told, Partial)


def test_a_loss_below_zero_where_none_was_to_be():
    def less(model, batch):
        found = losses(model, batch)
        return {**found, "map": found["map"] - (2 if len(batch[0]) == 3 else 0)}

    task = SimpleNamespace(losses=less, inputs=lambda batch: batch[0])
    with pytest.raises(InputError, match=r"loss of map.*-.* on a batch, below 0.*nonnegative"):
        judge_of(task=task, nonnegative=True)(Candidate({}))
    # without the promise nothing ends early: a sum above its bound may come down again
    judge = judge_of(task=task)
    whole = judge(Candidate({}, "shared", 4))
    assert judge(Candidate({}, "shared", 4, {"map": whole["map"] * (1 + 1e-6)})) == whole


with torch.no_grad():
    WHOLE = {len(batch[0]): made()(batch[0]) for batch in BATCHES}


def apart(model, batch):
    """How far from what the uncut network says, in its own spread, and a little."""
    whole, found = WHOLE[len(batch[0])], model(batch[0])
    return {name: 10 + ((found[name] - one) / one.std()).square().mean() for name, one in whole.items()}


class Searched:
    """What a search asks and is told, with the quick way and early refusals or without."""

    def __init__(self, **settings):
        task = SimpleNamespace(losses=apart, inputs=lambda batch: batch[0])
        self.judge, self.partial = judge_of(task=task, **settings), 0

    def __call__(self, candidate):
        found = self.judge(candidate)
        self.partial += isinstance(found, Partial)
        return found


@pytest.mark.parametrize("scan", ["grid", "bisect"])
@pytest.mark.parametrize("gate", ["all", "selected"])
def test_every_trick_leaves_decisions_as_they_are(scan, gate):
    found, asked = {}, {}
    for name, how in {
        "plain": {"quick": False, "memory": 0},
        "quick": {"memory": 0},
        "kept": {"quick": False},
        "early": {"quick": False, "memory": 0, "nonnegative": True},
        "all": {"nonnegative": True},
    }.items():
        judge = Searched(**how)
        found[name] = Greedy(scan=scan, gate=gate)(judge.judge.choices(), judge, [0.15] * 7)
        asked[name] = judge.partial
    plain = found["plain"]
    assert len(plain.gone) >= 5 and any(len(step.trials) > 2 for step in plain.steps)
    for other in found.values():
        assert other.gone == plain.gone
        for one, two in zip(other.steps, plain.steps, strict=True):
            assert (one.accepted, one.decides, len(one.trials)) == (two.accepted, two.decides, len(two.trials))
            assert one.after == pytest.approx(two.after, rel=1e-5)
            for this, that in zip(one.trials, two.trials, strict=True):
                assert not (this.partial and (this is one.taken or this is one.trials[0]))
                if this.partial:
                    assert all(this.losses[task] <= that.losses[task] * (1 + 1e-6) for task in this.losses)
                    assert one.allowance < this.rise <= that.rise * (1 + 1e-5)
                else:
                    assert (this.task, this.losses) == (that.task, pytest.approx(that.losses, rel=1e-5))
    assert not (asked["plain"] or asked["quick"] or asked["kept"])
    assert (asked["early"] == asked["all"]) and (asked["all"] > 0 or gate == "selected")


def test_losses_that_are_no_scalars():
    """Of a task of the user's own class, too: it is named."""
    for wrong in ({"label": 0.5}, torch.ones(4), [torch.ones(())]):
        task = SimpleNamespace(losses=lambda model, batch, wrong=wrong: wrong, inputs=lambda batch: batch[0])
        with pytest.raises(
            InputError, match=r"losses of a network on a batch.*where: SimpleNamespace.losses; do: return"
        ):
            judge_of(task=task)(Candidate({}))
