"""Two tasks on one network with one weight, worked out by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import niwaki
from niwaki.boxes import Boxes, Found
from niwaki.data import Samples
from niwaki.errors import InputError
from niwaki.methods import PAGCP
from niwaki.tasks import Augmentation, Custom, Detection, Joined, Multitask, Segmentation
from niwaki.tasks.task import Shown
from niwaki.train import Recovery


class Net(nn.Module):
    """Puts out 2 x and x - 2, and counts its calls."""

    def __init__(self, how="dict"):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0))
        self.calls, self.how = 0, how

    def forward(self, x):
        self.calls += 1
        found = {"line": self.a * x, "near": x - self.a}
        return {
            "dict": lambda: found, "tuple": lambda: tuple(found.values()), "named": lambda: SimpleNamespace(**found),
            "short": lambda: {"line": found["line"]},
        }[self.how]()  # fmt: skip


def column(*values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1)


def line(*batches, metric=4.0):
    return Custom(
        loss=lambda net, batch: (net(batch[0]) - batch[1]).square().mean(), metric=lambda net, given: metric,
        splits={"train": batches, "test": batches}, unit="%", nonnegative=True,
    )  # fmt: skip


def near(*batches, metric=3.0, nonnegative=True):
    def parts(net, batch):
        apart = net(batch[0]) - batch[1]
        return {"abs": apart.abs().mean(), "square": apart.square().mean()}

    splits = {"train": batches, "test": batches}
    return Custom(
        loss=parts, metric=lambda net, given: metric, splits=splits, unit="%", nonnegative=nonnegative, name="m"
    )  # fmt: skip


X = column(1, 3)
ONE, TWO = (X, column(1, 5)), (X, column(1, 1))
"""Outputs are 2, 6 and -1, 1: squares 1, 1 for the first task; distances 2, 0 for the second."""


@pytest.mark.parametrize("how", ["dict", "tuple", "named"])
def test_losses_by_hand(how):
    net, task = Net(how), Joined({"line": line(ONE), "near": near(TWO)}, weights={"near": 3.0})
    batch = next(task.train_batches(0))
    losses = {name: loss.item() for name, loss in task.losses(net, batch).items()}
    assert losses == {"line": 1.0, "near_abs": 1.0, "near_square": 2.0} and net.calls == 1
    loss = task.loss(net, batch)
    assert loss.item() == 1 + 3 * (1 + 2) and net.calls == 2
    loss.backward()
    # by a: the mean of 2 (a x - y) x, 1 * 1 and 1 * 3 doubled: 4; of |x - a - y| at -2 (and 0, none): 1 / 2; of its
    # square: -2 (x - a - y): 4 and 0, so 2
    assert net.a.grad.item() == pytest.approx(4 + 3 * (1 / 2 + 2))


def test_other_inputs_are_run_apart():
    net, task = Net(), Joined({"line": line(ONE), "near": near((column(5), column(1)))})
    batch = next(task.train_batches(0))
    # 5 - 2 - 1: distance 2
    assert {n: v.item() for n, v in task.losses(net, batch).items()} == {"line": 1.0, "near_abs": 2, "near_square": 4}
    assert net.calls == 2
    assert task.inputs(batch).flatten().tolist() == [1, 3, 5]
    shared = Joined({"line": line(ONE), "near": near((X.clone(), TWO[1]))})
    assert shared.inputs(next(shared.train_batches(0))).flatten().tolist() == [1, 3]
    unlike = Joined({"line": line(ONE), "near": near((torch.ones(2, 3), torch.ones(2, 3)))})
    with pytest.raises(InputError, match=r"found: \(2, 1\), \(2, 3\)"):
        unlike.inputs(next(unlike.train_batches(0)))
    assert task.example().tolist() == [[1.0]]


def test_metrics_by_hand():
    net, tasks = Net().train(), {"line": line(ONE), "near": near(TWO)}
    found = Joined(tasks).metrics(net)
    assert {name: one.value for name, one in found.items()} == {"line_metric": 4.0, "near_m": 3.0, "score": 3.5}
    assert all(name == one.name for name, one in found.items()) and found["score"].unit == "%" and net.training
    # 4 of 5 and 3 of 2: 20 % less and 50 % more
    compared = Joined(tasks, reference={"line": 5.0, "near": 2.0})
    assert list(compared.metrics(net)) == ["line_metric", "near_m", "gain"]
    assert compared.evaluate(net).value == pytest.approx((-20 + 50) / 2)


def test_a_shorter_task_begins_anew():
    def marked(*numbers):
        return [(column(number), column(number)) for number in numbers]

    task = Joined({"line": line(*marked(1, 2, 3, 4, 5)), "near": near(*marked(6, 7))})
    assert task.steps == 5 and len(list(task.train_batches(0))) == 5
    of = {name: [batch[name][0].item() for batch in task.train_batches(3)] for name in ("line", "near")}
    assert of["line"] == [batch[0].item() for batch in task.tasks["line"].train_batches(3)]
    assert of["near"][:2] == [batch[0].item() for batch in task.tasks["near"].train_batches(3)]
    assert sorted(of["near"][2:4]) == [6, 7] and of["near"][4] in (6, 7)
    assert of["near"] == [batch["near"][0].item() for batch in task.train_batches(3)]
    orders = {tuple(batch["near"][0].item() for batch in task.train_batches(seed))[2:4] for seed in range(8)}
    assert orders == {(6, 7), (7, 6)}
    assert len(task.calibration(4, 0)) == 4
    assert [batch["near"][0].item() for batch in task.calibration(4, 3)] == of["near"][:2] * 2


def test_what_tasks_have_of_their_own():
    class More:
        """A task with all that tasks may have."""

        steps, nonnegative, extra = 1, True, nn.Linear(1, 1)

        def late(self, epoch, epochs):
            return (epoch, epochs)

        def shown(self, models, limit=None):
            return [Shown(f"{name} {limit}", str(model(column(1))), b"") for name, model in models.items()]

    task = Joined({"line": line(ONE), "near": More()})
    assert list(task.extra.named_children()) == [("near", More.extra)] and Joined({"line": line(ONE)}).extra is None
    late = task.late(3, 9)
    assert late.tasks == {"line": task.tasks["line"], "near": (3, 9)}
    assert [one.row for one in task.shown({"whole": Net()}, limit=2)] == ["whole 2"]
    assert "-1." in task.shown({"whole": Net()})[0].words  # its own part of the output
    assert task.nonnegative and not Joined({"line": line(ONE), "near": near(TWO, nonnegative=False)}).nonnegative


def test_it_refuses():
    tasks = {"line": line(ONE), "near": near(TWO)}
    for settings, words in (
        ({"tasks": {}}, "none"),
        ({"tasks": tasks, "weights": {"far": 1.0}}, "weights; found: odd: far"),
        ({"tasks": tasks, "weights": {"near": 0.0}}, "a value not above 0"),
        ({"tasks": tasks, "reference": {"near": 1.0}}, "a reference; found: odd: line"),
        ({"tasks": tasks, "reference": {"near": 1.0, "line": -1.0}}, "a value not above 0"),
    ):
        with pytest.raises(InputError, match=words):
            Joined(**settings)
    task = Joined(tasks)
    with pytest.raises(InputError, match="a dict without near"):
        task.losses(Net("short"), next(task.train_batches(0)))


class Pictures:
    """Six pictures of 4 x 4 in six greys, a box on each."""

    def __len__(self):
        return 6

    def __getitem__(self, number):
        boxes = Boxes(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([0]))
        none = torch.zeros(1, dtype=torch.bool)
        return SimpleNamespace(width=4, height=4, path=Path("x"), boxes=boxes, ignored=none, areas=boxes.areas)

    def picture(self, number, height, width):
        return torch.full((3, height, width), 10 * number, dtype=torch.uint8)


class Told:
    classes, fit = 1, "squash"

    def losses(self, model, pictures, targets):
        (raw,) = model(pictures)
        return {"box": raw.abs().mean(), "class": raw.square().mean()}

    def found(self, model, pictures, **settings):
        return [Found(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)) for _ in pictures]


class Both(nn.Module):
    """Boxes (not read) and two classes of pixels from a trunk of eight channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.boxes, self.pixels = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.trunk(x)
        return {"detection": (self.boxes(x),), "segmentation": self.pixels(x)}


def detection_and_masks(augment=None):
    pictures = Pictures()
    arrays = {
        "x": np.stack([pictures.picture(number, 4, 4).numpy() for number in range(6)]),
        "segmentation": (np.arange(96).reshape(6, 4, 4) % 2).astype(np.uint8),
    }
    samples, splits = Samples(arrays, torch.arange(6)), SimpleNamespace(classes=("thing",))
    splits.train = splits.val = splits.test = pictures
    masks = Multitask(SimpleNamespace(train=samples, val=samples, test=samples), (Segmentation(2),), batch=2)
    return Joined(
        {"detection": Detection(splits, Told(), size=4, batch=2, augment=augment), "segmentation": masks},
    )


def test_boxes_and_masks_of_the_same_pictures_share_a_run():
    net, task = Both(), detection_and_masks()
    batches = [*task.train_batches(5), *task.calibration(2, 5)]
    assert len(batches) == 5
    for number, batch in enumerate(batches, start=1):
        assert list(task.losses(net, batch)) == ["detection_box", "detection_class", "segmentation"]
        assert net.calls == number and task.inputs(batch).shape == (2, 3, 4, 4)
    changed = detection_and_masks(Augmentation(mosaic=0.0, flip=0.0))
    task.losses(net, next(changed.train_batches(5)))
    assert net.calls == len(batches) + 2


def test_every_part_is_judged_and_the_network_trains_on():
    net, task = Both().eval(), detection_and_masks()
    outcome = niwaki.compress(
        net, task.example(), method=PAGCP(initial_rate=5.0, rounds=1, batches=2), budget=niwaki.Budget(0.7),
        task=task, recovery=Recovery(epochs=1, lr=0.01),
    )  # fmt: skip
    trial = outcome.details["search"]["rounds"][0]["steps"][0]["trials"][0]
    assert set(trial["losses"]) == {"detection_box", "detection_class", "segmentation"}
    assert outcome.plan.promised["macs"] <= 0.7 * outcome.plan.promised["macs_before"]
