"""Average precision by hand, and the task that asks a detector for it."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from niwaki.boxes import Boxes, Found
from niwaki.distill import Distilled, Features, Weighted
from niwaki.errors import InputError, MissingExtraError, NotFiniteError, OutOfMemoryError, UnknownNameError
from niwaki.tasks import Augmentation, Detection, Detector, Reading, augmentation
from niwaki.tasks.average_precision import average_precision
from niwaki.tasks.detection import in_order
from niwaki.train import Recovery

pytest.importorskip("pycocotools")


class One:
    """A picture of 200 x 200 with boxes."""

    def __init__(self, *corners, labels=None, ignored=(), areas=None):
        self.width = self.height = 200
        self.path = Path("one.jpg")
        boxes = torch.tensor(corners, dtype=torch.float32).view(-1, 4)
        self.boxes = Boxes(boxes, torch.tensor(labels or [0] * len(boxes), dtype=torch.int64))
        self.ignored = torch.tensor([n in ignored for n in range(len(boxes))], dtype=torch.bool)
        self.areas = self.boxes.areas if areas is None else torch.tensor(areas)


def seen(*boxes):
    """(score, corners) or (score, corners, label)."""
    corners = torch.tensor([one[1] for one in boxes], dtype=torch.float32).view(-1, 4)
    labels = torch.tensor([one[2] if len(one) > 2 else 0 for one in boxes], dtype=torch.int64)
    return Found(corners, labels, torch.tensor([one[0] for one in boxes], dtype=torch.float32))


A, B, C = (10, 10, 50, 50), (60, 60, 100, 100), (100, 0, 120, 20)


def test_average_precision_by_hand():
    truth = [One(A), One(B)]
    found = [seen((0.9, A), (0.8, C)), seen((0.7, B))]
    # right, wrong, right: precision 1 up to recall 1/2 (51 of 101 recalls), then 2/3
    figures = average_precision(truth, found, ["thing"])
    assert figures["AP50"].value == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert list(figures) == ["AP", "AP_medium", "AP50"]  # 1600 square pixels each: nothing small, nothing large
    assert figures["AP"].value == pytest.approx(figures["AP50"].value) and figures["AP"].spread is None
    assert figures["AP50"].spread > 0


def test_boxes_that_are_half_right_count_at_some_overlaps():
    # 40 x 30 of 40 x 40: IoU 0.75, right at 0.50, 0.55, ..., 0.75: 6 of 10
    figures = average_precision([One(A)], [seen((0.9, (10, 10, 50, 40)))], ["thing"])
    assert figures["AP50"].value == pytest.approx(1.0) and figures["AP"].value == pytest.approx(0.6)
    assert figures["AP50"].spread == 0.0  # of one picture


def test_sizes_are_those_of_objects_where_they_are_said():
    figures = average_precision([One(A, areas=[1000.0])], [seen((0.9, A))], ["thing"])
    assert "AP_small" in figures and "AP_medium" not in figures  # 1000 < 32 x 32


def test_ignored_objects_are_no_error_found_or_not():
    truth, wanted = [One(A, B, ignored=(1,))], average_precision([One(A)], [seen((0.9, A))], ["thing"])
    assert wanted["AP50"].value == pytest.approx(1.0)
    for found in (seen((0.9, A)), seen((0.95, B), (0.9, A))):
        assert average_precision(truth, [found], ["thing"])["AP50"].value == pytest.approx(wanted["AP50"].value)


def test_the_mean_is_over_classes_with_objects():
    truth = [One(A, B, labels=[0, 2])]
    figures = average_precision(truth, [seen((0.9, A, 0), (0.5, C, 1))], ["a", "b", "c"])
    assert figures["AP50"].value == pytest.approx((1 + 0) / 2)


def test_nothing_found_and_nothing_there():
    assert average_precision([One(A)], [seen()], ["thing"])["AP50"].value == 0.0
    with pytest.raises(InputError, match="no object"):
        average_precision([One(), One(A, ignored=(0,))], [seen(), seen()], ["thing"])


class Pictures:
    def __init__(self, *entries):
        self.entries = entries

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, number):
        return self.entries[number]

    def picture(self, number, height, width):
        return torch.full((3, height, width), 10 * number, dtype=torch.uint8)


PICTURES = Pictures(One(A), One(B, C), One(), One(A, B, ignored=(0,)), One(A))
SPLITS = SimpleNamespace(train=PICTURES, val=PICTURES, test=PICTURES, classes=("thing",))


class Told:
    """Finds what it was told of each picture, which it knows by its colour; sure by its network's parameter."""

    classes, fit = 1, "letterbox"

    def __init__(self, *of, error=None):
        self.of, self.error, self.batches, self.read = of, error, [], set()

    def losses(self, model, pictures, targets):
        if self.error:
            raise self.error
        count = sum(len(boxes) for boxes in targets)
        return {"box": model.weight.sum() * count, "class": pictures.mean() * model.weight.sum()}

    def found(self, model, pictures, *, confidence, overlap, most):
        assert not model.training
        self.batches.append(len(pictures))
        self.read.add((confidence, overlap, most))
        numbers = (pictures[:, 0, pictures.shape[2] // 2, 0] * 255 / 10).round().int().tolist()
        return [
            Found(one.corners, one.labels, model.weight.detach() * one.scores) for one in (self.of[n] for n in numbers)
        ]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight


HALF = [seen((0.9, (5, 5, 25, 25))), seen((0.9, (30, 30, 50, 50))), seen(), seen(), seen((0.9, (5, 5, 25, 25)))]


def test_precision_is_counted_in_pixels_of_the_pictures():
    model = Net().train()
    detector = Told(*HALF)
    assert isinstance(detector, Detector)
    task = Detection(SPLITS, detector, size=100, batch=2)
    found = task.metrics(model)
    # of A, B, C, B, A three found and nothing wrong: precision 1 up to recall 3/5, 61 of 101 recalls
    assert found["AP50"].value == pytest.approx(100 * 61 / 101) and list(found)[-1] == "AP50"
    assert found["AP50"].unit == "%" and found["AP50"].spread > 0
    assert "5 objects on 5 of 5 pictures of the test split, in a frame of 100 x 100" in found["AP50"].definition
    assert "resamplings" in found["AP50"].definition and "resamplings" not in found["AP"].definition
    assert detector.batches == [2, 2, 1] and model.training
    one = task.evaluate(model, split="val", limit=1)
    assert one.value == pytest.approx(100.0) and "1 of 5 pictures of the val split" in one.definition


def test_what_counts_reaches_the_detector():
    """YOLOv5's reading unless said, another one as it is; pictures of a report show what its users see."""
    for reading, told in (({}, (0.001, 0.6, 100)), ({"reading": Reading(0.2, 0.3, 7)}, (0.2, 0.3, 7))):
        detector = Told(*HALF)
        task = Detection(SPLITS, detector, size=100, **reading)
        said = task.evaluate(Net()).definition
        assert detector.read == {told}
        assert f"score {told[0]:g} or more, non-maximum suppression at {told[1]:g}, {told[2]} of a picture" in said
        detector.read.clear()
        assert len(task.shown({"now": Net()})) == 8 and detector.read == {(0.25, 0.45, 100)}


def test_batches_and_losses():
    task = Detection(SPLITS, Told(*HALF), size=(60, 100), batch=2, augment=None)
    assert task.steps == 2
    batches = list(task.train_batches(0))
    assert [tuple(pictures.shape) for pictures, _ in batches] == [(2, 3, 60, 100)] * 2
    again = list(task.train_batches(0))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
    (pictures, targets), model = task.calibration(9, 0)[0], Net()
    assert len(task.calibration(9, 0)) == 2 and task.inputs((pictures, targets)) is pictures
    assert task.example().shape == (1, 3, 60, 100) and float(task.example().amax()) <= 1
    parts = task.losses(model, (pictures, targets))
    assert set(parts) == {"box", "class"} and parts["box"].item() == sum(map(len, targets))
    loss = task.loss(model, (pictures, targets))
    assert loss.item() == pytest.approx(sum(part.item() for part in parts.values())) and loss.requires_grad
    for boxes, there in zip(targets, task.covered((pictures, targets), (6, 10)), strict=True):  # cells of 10 x 10
        cells = torch.zeros(6, 10, dtype=torch.bool)
        for left, top, right, bottom in boxes.corners.tolist():
            cells[int(top // 10) : math.ceil(bottom / 10), int(left // 10) : math.ceil(right / 10)] = True
        assert there.equal(cells) and (cells.any() or not len(boxes))
    everything = [label for _, boxes in batches for one in boxes for label in one.labels]
    assert len(everything) <= 5  # the ignored one is never learned


def test_changed_pictures_are_the_seeds_whatever_the_threads(monkeypatch):
    task = Detection(SPLITS, Told(*HALF), size=32, batch=2, augment=Augmentation())
    first = list(task.train_batches(7))
    monkeypatch.setattr("niwaki.tasks.detection.WORKERS", 1)
    for (a, boxes), (b, others) in zip(first, task.train_batches(7), strict=True):
        assert torch.equal(a, b) and all(torch.equal(x.corners, y.corners) for x, y in zip(boxes, others, strict=True))
    assert not torch.equal(first[0][0], next(iter(task.train_batches(8)))[0])


def test_the_last_epochs_of_a_training_have_no_mosaics(monkeypatch):
    """Of 5 epochs the last 2; not of 2, and not where they are never closed; a taught task closes them as well."""
    heard = []
    made = augmentation.mosaic
    monkeypatch.setattr(augmentation, "mosaic", lambda *given: heard.append(1) or made(*given))

    def epochs(count, **settings):
        change = Augmentation(**settings)
        task = Detection(SPLITS, Told(*HALF), size=32, batch=2, augment=change)
        taught = Distilled(task, nn.Sequential(Net()), (Weighted(Features(), taps=("0",)),))
        marks = []
        for one in (task, taught):
            for epoch in range(count):
                list(one.late(epoch, count).train_batches(0))
                marks.append(len(heard))
                heard.clear()
        assert marks[:count] == marks[count:]
        return marks[:count]

    assert epochs(5, close_mosaic=2) == [4, 4, 4, 0, 0]
    assert epochs(2, close_mosaic=2) == [4, 4] and epochs(2, close_mosaic=0) == [4, 4]
    assert epochs(11)[:2] == [4, 0]
    task = Detection(SPLITS, Told(*HALF), size=32, batch=2, augment=Augmentation(close_mosaic=2))
    Recovery(epochs=3)(Net(), task)
    assert len(heard) == 4  # the training asks: its first epoch alone has them
    with pytest.raises(InputError, match=r"close_mosaic=-1.*0 or more epochs"):
        Augmentation(close_mosaic=-1)


def test_what_is_made_ahead_comes_in_order_and_errors_come_through():
    made = []

    def make(item):
        made.append(item)
        if item == 5:
            raise ZeroDivisionError
        return item * item

    found = in_order(make, range(9), ahead=2)
    assert next(found) == 0 and max(made) <= 3
    assert [next(found) for _ in range(4)] == [1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_refusals():
    model = Net()
    nan = Net()
    nn.init.constant_(nan.weight, math.nan)
    empty = SimpleNamespace(train=Pictures(), val=PICTURES, test=Pictures(One()), classes=("thing",))
    two = SimpleNamespace(train=PICTURES, val=PICTURES, test=PICTURES, classes=("a", "b"))
    task = Detection(SPLITS, Told(*HALF), size=100)
    hungry = Detection(SPLITS, Told(error=torch.OutOfMemoryError("no")), size=8)
    for call, error, says in (
        (lambda: Detection(empty, Told()), InputError, "empty training split"),
        (lambda: Detection(two, Told()), InputError, "the network tells 1, the data have 2"),
        (lambda: Detection(SPLITS, Told(), batch=0), InputError, "batch of at least 1"),
        (lambda: Detection(SPLITS, Told(), size=0), InputError, "at least 1 pixel"),
        (lambda: Detection(SPLITS, Told(), fit="crop"), UnknownNameError, "letterbox, squash"),
        (lambda: Reading(confidence=2.0), InputError, "from 0 to 1"),
        (lambda: Reading(most=0), InputError, "at least 1 box"),
        (lambda: task.evaluate(model, split="held"), UnknownNameError, "train, val, test"),
        (lambda: task.evaluate(model, limit=0), InputError, "limit above 0"),
        (lambda: task.calibration(0, 0), InputError, "at least 1"),
        (lambda: task.evaluate(nan), NotFiniteError, "NaN"),
        (lambda: Detection(SPLITS, Told(*[seen()] * 5), size=8).evaluate(nan), NotFiniteError, "NaN"),
        (lambda: hungry.loss(model, hungry.calibration(1, 0)[0]), OutOfMemoryError, "smaller batch"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert says in str(caught.value)
    silent = Detection(SPLITS, Told(*[seen()] * 5), size=8)
    assert silent.evaluate(model).value == 0.0  # finds nothing, and that is all


def test_what_is_seen_is_drawn_small():
    import io

    from PIL import Image

    wide = Pictures(One((0, 0, 400, 200)), One())
    wide[0].width, wide[0].height = 800, 400
    splits = SimpleNamespace(train=PICTURES, val=PICTURES, test=wide, classes=("thing",))
    found = [seen((0.9, (0, 25, 50, 50)), (0.5, (50, 25, 100, 75))), seen()]
    shown = Detection(splits, Told(*found), size=100).shown({"before": Net(), "after": Net()})
    assert [one.words for one in shown[:3]] == [
        "1 object",
        "before: 2 found with a score of 0.25 or more",
        "after: 2 found with a score of 0.25 or more",
    ]
    assert len(shown) == 6 and shown[4].words.startswith("before: 0 found")
    picture = Image.open(io.BytesIO(shown[0].jpeg))
    assert picture.format == "JPEG" and picture.size == (400, 200) and len(shown[0].jpeg) < 20_000
    red, green, blue = picture.getpixel((199, 60))  # the right edge of the box, halved with the picture
    assert red > 150 and green < 90 and blue < 130
    assert max(picture.getpixel((230, 60))) < 60  # outside it is black
    assert len(Detection(splits, Told(*found), size=100).shown({}, limit=1)) == 1


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("pycocotools.coco", lambda: average_precision([One(A)], [seen((0.9, A))], ["thing"])),
        ("torchvision.transforms.v2", lambda: next(Detection(SPLITS, Told(), size=8, batch=2).train_batches(0))),
    ],
)
def test_what_is_not_installed_is_named(package, call, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"niwaki\[detection\]"):
        call()
