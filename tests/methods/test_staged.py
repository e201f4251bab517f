"""The two methods of several trainings, on small networks: their stages, their refusals, and going on after a break."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import niwaki
from niwaki.distill import BoxOutputs, ChannelWise, Distilled, OutputTaught, SpatialAttention, Weighted
from niwaki.errors import BudgetError, InputError, UnknownNameError
from niwaki.methods import GroupChannelPruning, Job, YOLOv8CWD, staged
from niwaki.methods.staged import shares_of, warn_of_scales
from niwaki.methods.steps import Steps
from niwaki.models.darknet_cfg import parse
from niwaki.models.darknet_detector import DarknetDetector
from niwaki.models.darknet_heads import YoloHead
from niwaki.models.darknet_net import Yolo
from niwaki.pressure import LocalDecay, Pressure, Slimming
from niwaki.tasks import Classification
from niwaki.train import Recovery

EPOCHS = {"dense_epochs": 1, "sparse_epochs": 1, "tune_epochs": 1, "distil_epochs": 1}
ROWS = ["dense training", "sparse training", "cut", "folded constants", "batch-norm", "fine-tuning", "distillation"]
HALF = niwaki.Budget(keep=0.5, of="params")


class Net(nn.Module):
    """Strides 1, 2 and 4; the last two layers of stride 1 are added."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = self.block(1, 8), self.block(8, 8), self.block(8, 12, 2), self.block(12, 16, 2)
        self.head = nn.Linear(16, 10)

    @staticmethod
    def block(before, after, stride=1):
        return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x):
        x = self.a(x)
        return self.head(self.d(self.c(x + self.b(x))).mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def task():
    return Classification(niwaki.data.open("digits"), batch=32)


def made(method, task, **settings):
    settings = {"budget": HALF, "recovery": Recovery(epochs=1, limit=3), "limit": 40, **settings}
    return niwaki.compress(settings.pop("model", None) or net(), task.example(), method=method, task=task, **settings)


METHODS = [GroupChannelPruning(**EPOCHS), YOLOv8CWD(**EPOCHS, multiple=2)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_every_stage_is_a_row(method, task, tmp_path):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = made(method, task, model=model)
    assert [stage.stage for stage in found.stages] == ROWS and found.receipt.passed
    assert all("accuracy" in stage.measurements for stage in found.stages)
    assert found.before == found.stages[0].measurements
    assert found.after["params"].value == found.plan.promised["params"] <= 0.5 * found.before["params"].value
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(found.details["trainings"]) == {"dense", "sparse", "tune", "distil"}
    assert set(found.details["losses_at_first"]) > {"task"}
    found.save(tmp_path / "run")
    loaded = niwaki.load(tmp_path / "run", net)
    pictures = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded.eval()(pictures), found.model.eval()(pictures))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_stages_can_be_left_out(method, task):
    model = net()
    with torch.no_grad():
        model(torch.rand(4, 1, 8, 8))  # batch norms have counted: it passes for trained
    bare = replace(method, sparse_epochs=0, tune_epochs=0, distil_epochs=0, fold="none")
    found = made(bare, task, model=model, repair=False, recovery=None)
    assert [stage.stage for stage in found.stages] == ["cut"] and found.history is None
    tuned = replace(method, sparse_epochs=0, distil_epochs=0)
    rows = [stage.stage for stage in made(tuned, task, model=model).stages]
    assert rows == ["cut", "folded constants", "batch-norm", "fine-tuning"]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_settings_of_trainings_that_there_are_not_are_refused(method, task):
    bare = replace(method, sparse_epochs=0, tune_epochs=0, distil_epochs=0)
    model = net()
    with pytest.raises(InputError, match=r"found: every training has 0 epochs; do: .*tune_epochs"):
        made(replace(bare, dense_epochs=0), task, model=model)
    found = made(bare, task, model=model)  # it is not trained: the dense training has them
    assert list(found.details["trainings"]) == ["dense"]
    with torch.no_grad():
        model(torch.rand(4, 1, 8, 8))
    with pytest.raises(InputError, match=r"0 epochs, and no dense training: a.1 has seen 1 batches"):
        made(bare, task, model=model)
    with pytest.raises(InputError, match=r"distil_epochs=0.*no training that the dense network teaches in"):
        made(bare, task, distill=(Weighted(SpatialAttention(), taps=("c",)),))


def test_the_recovery_says_how_long_the_last_training_is(task):
    found = made(METHODS[1], task, recovery=Recovery(epochs=2, limit=2, lr=0.02))
    lengths = {stage: len(history["epochs"]) for stage, history in found.details["trainings"].items()}
    assert lengths == {"dense": 1, "sparse": 1, "tune": 1, "distil": 2}
    assert found.method["distil_epochs"] == 2  # what the report says is what was done
    assert {history["settings"]["lr"] for history in found.details["trainings"].values()} == {0.02}


@pytest.mark.parametrize("recovery", [None, Recovery(epochs=1, limit=2, decayed="all")])
def test_no_training_decays_norms(task, recovery, caplog):
    """The authors' optimiser decays weights of convolutions only: the same for every training, whoever sets it."""
    with caplog.at_level(logging.INFO):
        found = made(METHODS[0], task, recovery=recovery)
    settings = {stage: history["settings"]["decayed"] for stage, history in found.details["trainings"].items()}
    assert settings == dict.fromkeys(("dense", "sparse", "tune", "distil"), "weights")
    assert ("no weight decay on norms and biases" in caplog.text) == (recovery is not None)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_run_that_broke_in_every_training_goes_on_to_the_same_bits(method, task, tmp_path):
    """Three batches a training: it breaks in the dense one, then in the sparse one, in the tuning, in the teaching."""
    whole = made(method, task)

    def stop_at(count):
        heard = []

        def stop(done, of, words):
            heard.append(done)
            if len(heard) == count:
                raise Stopped

        return stop

    for count in (2, 5, 5, 5):  # a training that ended is not done again; one that broke begins at its checkpoint
        with pytest.raises(Stopped):
            made(method, task, partial=tmp_path / "run", steps=stop_at(count))
    found = made(method, task, partial=tmp_path / "run")
    assert found.plan.kept == whole.plan.kept
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, found.model.state_dict()[name]), name
    assert [s.stage for s in found.stages] == ROWS
    assert [s.measurements["accuracy"].value for s in found.stages] == [
        s.measurements["accuracy"].value for s in whole.stages
    ]


def test_what_the_teacher_says_counts(task):
    """With alpha 0 nothing is taught."""
    alone = made(replace(METHODS[1], alpha=0.0), task)
    assert alone.details["losses_at_first"] == {}
    taught = made(METHODS[1], task)
    assert any(not torch.equal(t, taught.model.state_dict()[n]) for n, t in alone.model.state_dict().items())


def test_places_and_weights_are_found_by_scale(task):
    graph = niwaki.trace(net(), torch.zeros(1, 1, 32, 32))
    group, framework = GroupChannelPruning(), YOLOv8CWD()
    assert group.places(graph) == (("b", "c"), ("d",), ())
    published = replace(group, resolution_free=False).losses(graph)
    assert published == (Weighted(SpatialAttention(), 1e6, ("b", "c")), Weighted(SpatialAttention(), 1e3, ("d",)))
    # a mean over (416 / stride)^2 positions is a sum times its inverse
    assert [(one.weight, one.taps) for one in group.losses(graph)] == [
        (pytest.approx(1e6 / 416**2), ("b",)), (pytest.approx(1e6 / 208**2), ("c",)),
        (pytest.approx(1e3 / 104**2), ("d",)),
    ]  # fmt: skip
    assert framework.losses(graph) == (Weighted(ChannelWise(4.0), 5 / 3, ("b", "c", "d")),)
    given = replace(group, pyramid_places=("c",), pyramid=2.0, resolution_free=False)
    assert given.losses(graph) == (Weighted(SpatialAttention(), 2.0, ("c",)),)
    with pytest.raises(UnknownNameError, match="module to tap 'neck'"):
        made(replace(METHODS[1], places=("neck",)), task)


def test_pressures_press_what_can_be_cut():
    graph = niwaki.trace(net(), torch.zeros(1, 1, 8, 8), protect=("a",))
    layers = niwaki.budgets.scaled_layers(graph, net())
    names = ("c.1.weight", "d.1.weight")  # b is added to what is protected
    assert GroupChannelPruning().pressure(graph, layers) == LocalDecay(sets=(names,))
    assert GroupChannelPruning(pressing="global").pressure(graph, layers) == LocalDecay(quantile=0.0, sets=(names,))
    assert GroupChannelPruning(pressing="constant").pressure(graph, layers) == Slimming(1e-3, scales=names)
    each = GroupChannelPruning(pressing="groups", groups=("c*", "d*")).pressure(graph, layers)
    assert each == LocalDecay(sets=(("c.1.weight",), ("d.1.weight",)))
    assert YOLOv8CWD(schedule="increasing").pressure(graph, layers) == Slimming(1e-4, "increasing", scales=names)


def test_one_share_of_every_layer(task):
    found = made(YOLOv8CWD(**EPOCHS, share=0.5, multiple=1), task, budget=niwaki.Budget(keep=1.0))
    assert {name: len(kept) for name, kept in found.plan.kept.items()} == {"a.0": 4, "c.0": 6, "d.0": 8}
    assert found.details["layers"] == [  # a and b are added: one decision
        {"layer": "a.1.weight", "channels": 8, "kept": 4},
        {"layer": "b.1.weight", "channels": 8, "kept": 4},
        {"layer": "c.1.weight", "channels": 12, "kept": 6},
        {"layer": "d.1.weight", "channels": 16, "kept": 8},
    ]
    with pytest.raises(BudgetError, match="the fractions as they are leave"):
        made(YOLOv8CWD(**EPOCHS, share=0.5, multiple=1), task, budget=niwaki.Budget(keep=0.1))


def test_fractions_as_they_are_and_scaled(task):
    """Groups by scale: strides 1 (16 scales), 2 (12) and 4 (16); coupled layers need both to let a channel go."""
    method = GroupChannelPruning(**EPOCHS, fractions=(0.0, 0.5, 0.25))
    found = made(replace(method, literal=True), task, budget=niwaki.Budget(keep=1.0))
    assert found.details["layer_groups"] == [
        {"group": "stride 1", "layers": 2, "channels": 16, "kept": 16},
        {"group": "stride 2", "layers": 1, "channels": 12, "kept": 6},
        {"group": "stride 4", "layers": 1, "channels": 16, "kept": 12},
    ]
    scaled = made(method, task, budget=niwaki.Budget(keep=0.6, of="params"))
    assert scaled.after["params"].value <= 0.6 * scaled.before["params"].value
    assert scaled.details["layer_groups"][0]["kept"] == 16
    mixed = made(GroupChannelPruning(**EPOCHS, groups=("a*", "[bcd]*")), task)
    assert mixed.details["mixed"] == {"a.0": ["[bcd]*", "a*"]}


def test_without_data_or_batch_norm_nothing_begins(task):
    for method in METHODS:
        with pytest.raises(
            InputError, match=r"without data; found: it trains before and after the cut; do: give a task"
        ):
            niwaki.compress(net(), task.example(), method=method, budget=HALF)
        bare = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        with pytest.raises(InputError, match=r"never there, or folded into the convolutions"):
            made(method, task, model=bare)
        with pytest.raises(BudgetError):
            made(method, task, budget=niwaki.Budget(keep=0.001))


class Views(Net):
    """A width is written out in the forward."""

    def forward(self, x):
        return self.head(self.d(self.c(self.a(x)).view(-1, 12, 4, 4)).mean((2, 3)))


def test_a_forward_that_needs_another_is_refused_before_it_trains(task):
    heard = []
    with pytest.raises(InputError, match="a rewritten graph only"):
        made(METHODS[1], task, model=Views(), steps=lambda *words: heard.append(words))
    assert heard == []


def test_warnings_of_scales(caplog):
    dense, sparse = net(), net()
    layers = niwaki.budgets.scaled_layers(niwaki.trace(dense, torch.zeros(1, 1, 8, 8)), dense)
    quiet = {"epochs": [{"loss": 1.0}]}
    rising = {"epochs": [{"loss": float(i)} for i in range(4)]}
    with caplog.at_level(logging.WARNING):
        warn_of_scales(dense, sparse, layers, quiet)
        assert "the pressure was weak" in caplog.text
        warn_of_scales(dense, sparse, layers, rising)
        assert "in a row under pressure: the pressure was weak, so try a lower learning rate" in caplog.text
        assert "tenth" not in caplog.text
        caplog.clear()
        sparse.a[1].weight.data[0] = 1e-4
        warn_of_scales(dense, sparse, layers, quiet)
        assert caplog.text == ""
        sparse.c[1].weight.data.fill_(1e-4)
        warn_of_scales(dense, sparse, layers, rising)
        assert "all scales of c.1.weight collapsed" in caplog.text
        assert "rose for 3 epochs in a row under pressure: try a tenth of the rate" in caplog.text


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (YOLOv8CWD, {"tune_epochs": -1}, "0 or more epochs"),
        (YOLOv8CWD, {"rate": 0.0}, "a rate above 0"),
        (YOLOv8CWD, {"schedule": "falling"}, "known: decreasing, increasing, constant"),
        (YOLOv8CWD, {"temperature": 0.0}, "temperature above 0"),
        (YOLOv8CWD, {"alpha": -1.0}, "alpha=-1.0"),
        (YOLOv8CWD, {"share": 1.5}, "what every layer keeps"),
        (YOLOv8CWD, {"multiple": 0}, "a whole number from 1"),
        (YOLOv8CWD, {"fold": "sum"}, "known: shift, mean, refit, none"),
        (GroupChannelPruning, {"quantile": 1.0}, "quantile=1.0"),
        (GroupChannelPruning, {"pressing": "soft"}, "known: local, groups, global, constant"),
        (GroupChannelPruning, {"meet": "vote"}, "known: majority, union, least, mean"),
        (GroupChannelPruning, {"fractions": (1.0,)}, "no share in"),
        (GroupChannelPruning, {"literal": True}, "no fractions"),
        (GroupChannelPruning, {"backbone": -1.0}, "backbone=-1.0"),
        (GroupChannelPruning, {"floor": 0.0}, "floor=0.0"),
        (GroupChannelPruning, {"least": 0}, "least=0"),
    ],
)
def test_settings_out_of_range(kind, settings, message):
    with pytest.raises(InputError, match=message):
        kind(**settings)


def test_without_a_teaching_no_places_are_asked_for(task):
    """No module of this network has positions to compare."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    with pytest.raises(InputError, match="places to distil at"):
        made(METHODS[1], task, model=model)
    alone = replace(METHODS[1], dense_epochs=0, sparse_epochs=0, distil_epochs=0)
    assert [stage.stage for stage in made(alone, task, model=model).stages][-1] == "fine-tuning"


def test_a_look_at_the_losses_leaves_the_network_as_it_is(task):
    teacher, student = net(), net().train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    taught = Distilled(task, teacher, (Weighted(SpatialAttention(), taps=("b",)),), None, student)
    job = Job(teacher, task.example(), (HALF,), task=task)
    assert list(shares_of(taught, student, job)) == ["task", "spatial_attention"] and student.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def planned(method, model, budget, *, task=None):
    """The plan of a network, judged by its scales of now."""
    graph = niwaki.trace(model, torch.zeros(1, 1, 8, 8))
    return method.choose(graph, model, task, Job(model, torch.zeros(1, 1, 8, 8), (budget,)))(graph, (budget,))


def choosing(method, model, budget, *, task=None):
    """How many of a network's layers a method keeps."""
    return {name: len(kept) for name, kept in planned(method, model, budget, task=task).kept.items()}


def test_scales_that_are_not_trained_yet_refuse_no_fractions(task, caplog):
    """Where all scales are 1 the whole of `b` goes before `a`: they are added, so a tie, and both stay whole (1662 of
    3498 parameters). Where both have the same scales half of them goes, and 962 parameters are left."""
    method = GroupChannelPruning(fractions=(0.5, 0.5, 0.5), literal=True)
    model, budget = net(), niwaki.Budget.at_most(1000, "params")
    choosing(method, model, budget)
    assert "by the scales of now the fractions miss the budget" in caplog.text
    with pytest.raises(BudgetError, match="leave 1662 of 3498"):
        choosing(method, model, budget, task=task)
    for layer in (model.a, model.b, model.c, model.d):
        layer[1].weight.data = torch.linspace(0.1, 1, layer[1].num_features)
    assert choosing(method, model, budget, task=task) == {"a.0": 4, "c.0": 6, "d.0": 8}
    with pytest.raises(BudgetError, match="the least that floors"):
        choosing(method, model, niwaki.Budget(keep=0.001))


def test_a_floor_of_one_is_all_channels():
    everything = niwaki.Budget(keep=1.0)
    for floor in (1, 1.0):
        assert choosing(GroupChannelPruning(fractions=(0.5,) * 3, literal=True, floor=floor), net(), everything) == {}
    quarter = GroupChannelPruning(fractions=(0.0, 0.9, 0.9), literal=True, floor=0.25, least=4)
    assert choosing(quarter, net(), everything) == {"c.0": 4, "d.0": 4}


@pytest.mark.parametrize("floor", [{"floor": 0.5}, {"least": 6}])
def test_a_floor_holds_where_fractions_are_scaled_to_a_budget(floor):
    """The budget is met by `c` alone, at 5 of its 12 channels; where 6 must stay, `d` gives the rest."""
    model, budget = net(), niwaki.Budget(keep=0.6, of="params")
    for layer in (model.a, model.b, model.c, model.d):
        layer[1].weight.data = torch.linspace(0.1, 1, layer[1].num_features)
    fractions = (0.1, 0.9, 0.1)
    assert choosing(GroupChannelPruning(fractions=fractions), model, budget) == {"c.0": 5}
    assert choosing(GroupChannelPruning(fractions=fractions, **floor), model, budget) == {"c.0": 6, "d.0": 14}


def test_the_share_is_what_stays():
    quarters = YOLOv8CWD(share=0.75, multiple=1)
    assert choosing(quarters, net(), niwaki.Budget(keep=1.0)) == {"a.0": 6, "c.0": 9, "d.0": 12}
    even = YOLOv8CWD(share=0.7, multiple=4)  # of 8, 12 and 16: 5.6, 8.4 and 11.2, rounded up to fours
    assert choosing(even, net(), niwaki.Budget(keep=1.0)) == {"d.0": 12}


def test_a_budget_too_is_met_in_multiples():
    """At most half of the units: 8, 12 and 16 channels stay as multiples of 8, or whole."""
    plan = planned(YOLOv8CWD(), net(), niwaki.Budget(keep=0.6, of="params"))
    assert plan.kept and all(len(kept) % 8 == 0 for kept in plan.kept.values())
    free = planned(YOLOv8CWD(multiple=1), net(), niwaki.Budget(keep=0.6, of="params"))
    assert any(len(kept) % 8 for kept in free.kept.values())


def test_coupled_layers_are_scored_by_the_mean_of_their_scales():
    """Of 0.6 and 0.6 the mean is above that of 0.8 and 0.1, the highest below."""
    model = net()
    model.a[1].weight.data = torch.tensor([0.9, 0.9, 0.6, 0.6, 0.8, 0.8, 0.1, 0.1])
    model.b[1].weight.data = torch.tensor([0.9, 0.9, 0.6, 0.6, 0.1, 0.1, 0.1, 0.1])
    plan = planned(YOLOv8CWD(share=0.5, multiple=1), model, niwaki.Budget(keep=1.0))
    assert plan.kept["a.0"] == (0, 1, 2, 3)


class Halves(nn.Module):
    """Two halves of one convolution, of which one goes on alone, as in C2f."""

    def __init__(self):
        super().__init__()
        self.entry, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.inner_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.norm(self.entry(x)).relu()
        one, two = x.chunk(2, 1)
        return self.head(torch.cat([one, two, self.inner_norm(self.inner(two)).relu()], 1).mean((2, 3)))


@pytest.mark.parametrize(
    ("method", "keeps"),
    [
        (YOLOv8CWD(multiple=1), [0.3 + 0.05 * step for step in range(12)]),
        (GroupChannelPruning(fractions=(0.5,), groups=("*",), literal=True), [1.0]),
    ],
)
def test_halves_keep_equally_many(method, keeps):
    model = Halves()
    model.norm.weight.data = torch.linspace(1, 0.1, 16)  # the first half is larger all over
    for keep in keeps:
        kept = choosing(method, model, niwaki.Budget(keep=keep, of="params"))
        assert kept["entry"] == kept["entry#2"] < 8


class Turned(Pressure):
    """Leaves the scales of `c` in the opposite order."""

    def memory(self, model):
        return {}

    def __call__(self, model, memory, at):
        model.c[1].weight.data.copy_(torch.linspace(1, 0.5, 12))
        model.c[1].weight.grad.zero_()


def test_the_dense_network_teaches_and_the_sparse_one_is_judged_and_cut(task, monkeypatch):
    heard = {}
    plain = Steps.cut

    def cut(steps, model, plan):
        heard["cut"] = model
        return plain(steps, model, plan)

    def shares(taught, small, job):
        heard["teacher"] = taught.teacher
        return {}

    monkeypatch.setattr(Steps, "cut", cut)
    monkeypatch.setattr(staged, "shares_of", shares)
    monkeypatch.setattr(YOLOv8CWD, "pressure", lambda method, graph, layers: Turned())
    model = net()
    model.c[1].weight.data = torch.linspace(0.5, 1, 12)
    with torch.no_grad():
        model(torch.rand(4, 1, 8, 8))  # it passes for trained, and teaches as it is
    method = YOLOv8CWD(**EPOCHS, share=0.5, multiple=1)
    found = made(method, task, model=model, budget=niwaki.Budget(keep=1.0))
    assert torch.equal(heard["teacher"].c[1].weight, torch.linspace(0.5, 1, 12))
    assert torch.allclose(heard["cut"].c[1].weight, torch.linspace(1, 0.5, 12))
    assert tuple(found.plan.kept["c.0"]) == tuple(range(6))


@pytest.mark.parametrize(("classes", "epochs", "said"), [(9, 1, True), (10, 1, False), (9, 0, False)])
def test_few_classes_may_need_no_pressure(classes, epochs, said, caplog):
    method = GroupChannelPruning(sparse_epochs=epochs)
    method.advise(SimpleNamespace(detector=SimpleNamespace(classes=classes)))
    assert ("fewer than 10 classes (here 9) may need no sparse training" in caplog.text) is said
    method.advise(SimpleNamespace())  # no detection
    assert len(caplog.records) == said


def test_outputs_are_taught_where_heads_are_known(task):
    method = replace(METHODS[0], outputs=0.5)
    heard = []
    with pytest.raises(InputError, match=r"outputs=0.5.*a Classification without heads.*or outputs=0.0"):
        made(method, task, steps=lambda *words: heard.append(words))
    assert heard == []
    heads = DarknetDetector((YoloHead(((2.0, 2.0),), (0,), 2),))
    model = nn.Sequential(Yolo(parse("[net]\n[yolo]\nanchors=2,2\nclasses=2\n", "net.cfg")[1]))
    taught = method.taught(SimpleNamespace(detector=heads), model)
    assert isinstance(taught, OutputTaught) and taught.how == BoxOutputs(3.0, 0.5, 0.5)
    plain = SimpleNamespace(detector=heads)
    assert METHODS[0].taught(plain, model) is plain


def test_maps_are_compared_where_things_lie_in_detections_only(task):
    method, heard = replace(METHODS[0], things=True), []
    with pytest.raises(InputError, match=r"things=True.*a Classification, whose batches do not say.*or things=False"):
        made(method, task, steps=lambda *words: heard.append(words))
    assert heard == []
    graph = niwaki.trace(net(), task.example())
    assert all(one.loss.things for one in method.losses(graph)) and len(method.losses(graph)) > 0
    assert not any(one.loss.things for one in METHODS[0].losses(graph))
    placed = SimpleNamespace(covered=lambda batch, cells: None)
    assert method.taught(placed, net()) is placed
