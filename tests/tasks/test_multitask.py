"""Losses and metrics of three heads on pictures of four pixels, worked out by hand."""

import math
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import niwaki
from niwaki.data import Samples, open_samples
from niwaki.distill import Logits, Weighted
from niwaki.errors import InputError, NotFiniteError, OutOfMemoryError, UnknownNameError
from niwaki.tasks import Boundary, Depth, Multitask, Normals, Segmentation
from niwaki.train import Recovery


def pixels(*values):
    """[1, 1, 2, 2] or, of vectors, [1, k, 2, 2] from one value for each of four pixels."""
    tensor = torch.tensor(values, dtype=torch.float32).view(4, -1)
    return tensor.T.reshape(1, -1, 2, 2)


LN2 = math.log(2)


def test_segmentation_by_hand():
    head = Segmentation(classes=3)
    output = pixels((LN2, 0, 0), (0, LN2, 0), (LN2, 0, 0), (0, 0, 9))  # guesses 0, 1, 0, 2
    target = torch.tensor([[[0, 0], [0, 255]]])
    # 2/4, 1/4 and 2/4 for class 0; the fourth has no class
    assert head.loss(output, target).item() == pytest.approx((-math.log(1 / 2) - math.log(1 / 4) - math.log(1 / 2)) / 3)
    # class 0: 2 of 3 pixels in its union; class 1: guessed once, never there; class 2 neither
    figures = head.figures(head.sums(output, target))
    assert (
        figures["miou"].value == pytest.approx(100 * (2 / 3 + 0) / 2) and "2 of 3 classes" in figures["miou"].definition
    )
    assert head.loss(output, torch.full((1, 2, 2), 255)).item() == 0.0
    assert math.isnan(head.figures(torch.zeros(9))["miou"].value)


def test_depth_by_hand():
    head = Depth()
    output, target = pixels(1.2, 3.0, 4.0, 5.0), pixels(1.0, 2.0, 4.0, 0.0)
    assert head.loss(output, target).item() == pytest.approx((0.2 + 1 + 0) / 3)
    figures = head.figures(head.sums(output, target[:, 0]))  # with or without an axis of channels
    assert figures["abs_rel"].value == pytest.approx((0.2 + 0.5 + 0) / 3)
    assert figures["delta1"].value == pytest.approx(100 * 2 / 3)
    assert head.figures(head.sums(-output, target))["delta1"].value == 0.0
    assert head.loss(output, torch.zeros(1, 2, 2)).item() == 0.0


def test_boundary_by_hand():
    head = Boundary(positive=3.0)
    output, target = pixels(0.0, LN2, -LN2, 5.0), torch.tensor([[[1, 1], [0, 255]]])
    # probabilities 1/2, 2/3 and 1/3 of the target 1, 1, 0; the first two count three times, the fourth not
    wanted = (3 * math.log(2) + 3 * math.log(3 / 2) + math.log(3 / 2)) / 7
    assert head.loss(output, target).item() == pytest.approx(wanted)
    assert head.loss(output[:, 0], target).item() == pytest.approx(wanted)
    # told: the second alone (0 is no); there: two
    assert head.figures(head.sums(output, target))["f1"].value == pytest.approx(100 * 2 * 1 / (1 + 2))
    assert math.isnan(head.figures(torch.zeros(4))["f1"].value) and head.higher
    assert head.loss(output, torch.full((1, 2, 2), 255)).item() == 0.0
    with pytest.raises(InputError, match="boundary of shape"):
        head.loss(output, target[:, :1])
    with pytest.raises(InputError, match="positive=0"):
        Boundary(positive=0.0)


def test_normals_by_hand():
    head = Normals()
    output = pixels((2, 0, 0), (0, 3, 0), (1, 1, 0), (0, 0, 1))
    target = pixels((1, 0, 0), (1, 0, 0), (1, 0, 0), (0, 0, 0))  # 0, 90 and 45 degrees; the fourth is unknown
    assert head.loss(output, target).item() == pytest.approx((0 + 1 + 1 - math.sqrt(0.5)) / 3)
    figures = head.figures(head.sums(output, target))
    assert figures["angle"].value == pytest.approx(45.0) and figures["within"].value == pytest.approx(100 / 3)
    assert head.loss(output, torch.zeros(1, 3, 2, 2)).item() == 0.0


HEADS = (Segmentation(classes=2, weight=2.0), Depth(weight=0.5))


class Told(nn.Module):
    """Puts out the same for every picture, in the way asked for; its numbers are parameters."""

    def __init__(self, how="dict"):
        super().__init__()
        self.segmentation = nn.Parameter(pixels((1, 0), (0, 1), (1, 0), (0, 1)))
        self.depth = nn.Parameter(pixels(1.0, 2.0, 3.0, 4.0))
        self.how = how

    def forward(self, x):
        found = {name: getattr(self, name).expand(len(x), -1, 2, 2) for name in ("segmentation", "depth")}
        ways = {
            "dict": lambda: found,
            "tuple": lambda: tuple(found.values()),
            "named": lambda: SimpleNamespace(**found),
            "fields": lambda: namedtuple("Out", ("depth", "segmentation"))(found["depth"], found["segmentation"]),
            "short": lambda: {"depth": found["depth"]},
        }
        return ways[self.how]()


def splits_of(count=4):
    arrays = {
        "x": np.zeros((count, 1, 2, 2), np.uint8),
        "segmentation": np.zeros((count, 2, 2), np.int64),
        "depth": np.full((count, 2, 2), 2.0, np.float32),
    }
    samples = Samples(arrays, torch.arange(count))
    return SimpleNamespace(train=samples, val=samples, test=samples)


TASK = Multitask(splits_of(), HEADS, batch=3)


@pytest.mark.parametrize("how", ["dict", "tuple", "named", "fields"])
def test_a_task_of_two_heads_by_hand(how):
    model = Told(how)
    batch = TASK.calibration(1, 0)[0]
    segmentation, depth = math.log(1 + math.exp(-1)) / 2 + math.log(1 + math.e) / 2, (1 + 0 + 1 + 2) / 4
    assert TASK.losses(model, batch)["depth"].item() == pytest.approx(depth)
    assert TASK.loss(model, batch).item() == pytest.approx(2 * segmentation + depth / 2)
    found = TASK.metrics(model)
    assert {name: measured.value for name, measured in found.items()} == pytest.approx(
        {
            "segmentation_miou": 100 * (1 / 2 + 0) / 2,
            "depth_abs_rel": (0.5 + 0 + 0.5 + 1) / 4,
            "depth_delta1": 25.0,
            "score": (25.0 + 25.0) / 2,
        }
    )
    assert list(found)[-1] == "score" and "4 of 4 pictures" in found["score"].definition
    assert TASK.evaluate(model, limit=1).value == pytest.approx(25.0)


def test_gain_over_a_reference_by_hand():
    task = Multitask(splits_of(), HEADS, reference={"segmentation": 50.0, "depth": 0.4})
    # 25 is half of 50 (-50 %); 0.5 is a quarter above 0.4, and lower is better (-25 %)
    found = task.evaluate(Told())
    assert found.name == "gain" and found.value == pytest.approx(-37.5)


def test_batches():
    assert TASK.steps == 1 and [len(x) for x, _ in TASK.train_batches(0)] == [3]
    assert TASK.example().shape == (1, 1, 2, 2) and TASK.inputs(TASK.calibration(1, 0)[0]).shape == (3, 1, 2, 2)


def test_refusals():
    nan = Told()
    nn.init.constant_(nan.depth, math.nan)
    unknown = splits_of()
    unknown.test.arrays["depth"][:] = 0
    for make, error, says in (
        (lambda: Multitask(splits_of(), ()), InputError, "at least one head"),
        (lambda: Multitask(splits_of(), (Depth(), Depth())), InputError, "a name of its own"),
        (lambda: Multitask(splits_of(), HEADS, batch=0), InputError, "batch of at least 1"),
        (lambda: Multitask(splits_of(0), HEADS), InputError, "empty training split"),
        (lambda: Multitask(splits_of(), HEADS, reference={"depth": 1.0}), InputError, "odd: segmentation"),
        (lambda: Multitask(splits_of(), (Depth(),), reference={"depth": 0.0}), InputError, "not above 0"),
        (lambda: Segmentation(classes=1), InputError, "two classes"),
        (lambda: Depth(weight=0.0), InputError, "weight above 0"),
        (lambda: TASK.evaluate(Told("short")), InputError, "a dict without segmentation"),
        (lambda: TASK.evaluate(Told(), split="odd"), UnknownNameError, "train, val, test"),
        (lambda: TASK.evaluate(Told(), limit=0), InputError, "limit above 0"),
        (lambda: TASK.calibration(0, 0), InputError, "at least 1"),
        (lambda: TASK.evaluate(nan), NotFiniteError, "NaN or infinite outputs"),
        (lambda: Multitask(unknown, HEADS).evaluate(Told()), NotFiniteError, "no pixel with a target"),
        (lambda: Multitask(splits_of(), (Normals(),)).evaluate(Told()), InputError, "outputs of several heads"),
        (lambda: HEADS[0].loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2)), InputError, "nothing is resized"),
        (lambda: HEADS[0].sums(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), 7)), InputError, "number them from 0"),
        (
            lambda: HEADS[1].loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2)),
            InputError,
            r"depth of shape \(1, 2, 2\)",
        ),
        (lambda: Normals().loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 2, 2)), InputError, "normals of shape"),
    ):
        with pytest.raises(error, match=says):
            make()

    class Full(Told):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryError, match="batch of 3"):
        TASK.evaluate(Full())


class Rooms(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU())
        self.segmentation, self.depth, self.normals = (nn.Conv2d(12, n, 1) for n in (2, 1, 3))

    def forward(self, x):
        x = self.body(x)
        return {"segmentation": self.segmentation(x), "depth": self.depth(x), "normals": self.normals(x)}


def test_three_heads_from_an_archive_are_trained_cut_and_taught(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, 3, 6, 6), dtype=np.uint8)
    red, green, blue = (x[:, i] / 255 for i in range(3))
    normals = np.stack([red - 0.5, green - 0.5, np.full_like(blue, 0.3)], 1).astype(np.float32)
    np.savez(
        tmp_path / "rooms.npz", x=x, segmentation=(red > green).astype(np.int64),
        depth=(1 + blue).astype(np.float32), normals=normals,
    )  # fmt: skip
    splits = open_samples(tmp_path / "rooms.npz", ("segmentation", "depth", "normals"))
    task = Multitask(splits, (Segmentation(2), Depth(), Normals()), batch=7)
    torch.manual_seed(0)
    model = Rooms()
    before = task.evaluate(model).value
    Recovery(epochs=15, lr=0.02, optimizer="adamw", weight_decay=0.0)(model, task)
    assert task.evaluate(model).value > before + 20
    outcome = niwaki.compress(
        model, task.example(), method=niwaki.methods.Taylor(), budget=niwaki.Budget(0.6), task=task,
        recovery=Recovery(epochs=3, lr=0.01, optimizer="adamw"),
        distill=(Weighted(Logits(2.0), taps=("segmentation",)),),
    )  # fmt: skip
    assert outcome.receipt.passed and list(outcome.after)[-1] == "score"
    assert outcome.stages[-1].measurements["score"].value > outcome.stages[0].measurements["score"].value
