"""What heads put out, taught: distances and both families' heads by hand, and a training that hears its teacher."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import niwaki
from niwaki.boxes import Boxes
from niwaki.distill import BoxOutputs, Distilled, HeadOutputs, Logits, OutputTaught, SpatialAttention, Weighted
from niwaki.errors import InputError
from niwaki.models.darknet_detector import DarknetDetector
from niwaki.models.darknet_heads import YoloHead
from niwaki.models.ultralytics_detector import UltralyticsDetector
from niwaki.tasks import Detection

LN3 = math.log(3)
KL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
"""Of (1/2, 1/2) from (3/4, 1/4)."""


def told(scores, boxes) -> HeadOutputs:
    return HeadOutputs(torch.tensor(scores), torch.tensor(boxes))


def test_distances_by_hand():
    """Two pictures of one box in a head, one of a box in another; T = 2 halves the logits of 2 ln 3."""
    student = [told([[[0.0, 0.0]], [[0.0, 0.0]]], [[[0.0, 0.0, 1.0, 1.0]], [[0.0, 0.0, 1.0, 1.0]]])]
    teacher = [told([[[2 * LN3, 0.0]], [[0.0, 0.0]]], [[[0.0, 3.0, 1.0, 1.0]], [[1.0, 0.0, 1.0, 3.0]]])]
    how = BoxOutputs(temperature=2.0, classes=1.0, boxes=10.0)
    first, both = torch.tensor([[True], [False]]), torch.tensor([[True], [True]])
    assert how(student, teacher, [first])["class"].item() == pytest.approx(4 / 2 * KL)
    assert how(student, teacher, [first])["box"].item() == pytest.approx(10 * 9)
    assert how(student, teacher, [both])["box"].item() == pytest.approx(10 * (9 + 1 + 4))
    twice = how([*student, *student], [*teacher, *teacher], [first, first])
    assert twice["class"].item() == pytest.approx(4 * KL) and twice["box"].item() == pytest.approx(180)
    same = how(teacher, teacher, [both])
    assert same["class"].item() == pytest.approx(0, abs=1e-6) and same["box"].item() == 0
    assert set(BoxOutputs(boxes=0.0)(student, teacher, [both])) == {"class"}
    assert set(BoxOutputs(classes=0.0)(student, teacher, [both])) == {"box"}


def test_only_the_student_gets_gradients_and_those_are_the_published_ones():
    """Of logits T (p_S - p_T) / B, of boxes twice the difference where they learn a thing."""
    logits, boxes = torch.zeros(1, 1, 2, requires_grad=True), torch.zeros(1, 2, 4, requires_grad=True)
    target = torch.tensor([[[3 * LN3, 0.0]]], requires_grad=True)
    student = HeadOutputs(logits, boxes)
    teacher = HeadOutputs(target, torch.ones(1, 2, 4))
    parts = BoxOutputs(temperature=3.0, classes=1.0, boxes=1.0)([student], [teacher], [torch.tensor([[True, False]])])
    (parts["class"] + parts["box"]).backward()
    assert torch.allclose(logits.grad, torch.tensor([[[-0.75, 0.75]]])) and target.grad is None
    assert torch.equal(boxes.grad, torch.tensor([[[-2.0] * 4, [0.0] * 4]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"temperature": 0.0}, "temperature above 0"), ({"classes": -1.0}, "classes=-1.0"),
     ({"boxes": float("nan")}, "boxes=nan"), ({"classes": 0.0, "boxes": 0.0}, "give one above 0")],
)  # fmt: skip
def test_refusals(settings, message):
    with pytest.raises(InputError, match=message):
        BoxOutputs(**settings)


def things(*corners) -> Boxes:
    return Boxes(torch.tensor(corners, dtype=torch.float32).view(-1, 4), torch.zeros(len(corners), dtype=torch.int64))


def test_heads_of_darknet_by_hand():
    """Anchors of 2 and 4 pixels on cells of 4; a thing of 4 x 4 in the second cell of the first row."""
    detector = DarknetDetector((YoloHead(((2.0, 2.0), (4.0, 4.0), (8.0, 8.0)), (0, 1), 2),))
    x = torch.zeros(1, 14, 2, 2)
    x[0, 7 + 0, 0, 1], x[0, 7 + 2, 0, 1] = LN3, math.log(2)  # the larger box there: its centre at 3/4, twice as wide
    x[0, 7 + 4 : 14, 0, 1] = torch.tensor([1.0, 2.0, 3.0])
    (out,) = detector.head_outputs([x], (8, 8))
    assert out.scores.shape == (1, 8, 3) and out.boxes.shape == (1, 8, 4)
    assert out.scores[0, 5].tolist() == [1.0, 2.0, 3.0]  # box 1, row 0, column 1
    assert out.boxes[0, 5].tolist() == pytest.approx([0.75, 0.5, 2.0, 1.0])
    assert out.boxes[0, 0].tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5])
    (mine,) = detector.matched([x], [things((4, 0, 8, 4))], (8, 8))
    assert mine.tolist() == [[False] * 5 + [True] + [False] * 2]
    assert not detector.matched([x], [Boxes.none()], (8, 8))[0].any()


def test_heads_of_ultralytics_by_hand():
    """Three bins of distance on a grid of 2 x 2 cells of 4 pixels; classes get a logit of 0 for nothing."""
    distances, logits = torch.zeros(1, 12, 2, 2), torch.zeros(1, 2, 2, 2)
    distances[0, 0:3, 0, 1] = torch.tensor([0.0, LN3, 0.0])  # the left side: 1/5, 3/5, 1/5 of 0, 1, 2
    distances[0, 3:6, 0, 1] = torch.tensor([0.0, 0.0, LN3])  # the upper one
    logits[0, :, 0, 1] = torch.tensor([5.0, 6.0])
    detector = UltralyticsDetector(2)
    (out,) = detector.head_outputs([distances, logits], (8, 8))
    assert out.scores[0, 1].tolist() == [0.0, 5.0, 6.0] and out.scores.shape == (1, 4, 3)
    assert out.boxes[0, 1].tolist() == pytest.approx([1.0, 1.4, 1.0, 1.0])
    (bare,) = detector.head_outputs([torch.full((1, 4, 2, 2), 2.5), logits], (8, 8))  # one bin: the distance itself
    assert bare.boxes[0, 0].tolist() == [2.5] * 4
    # centres at 2 and 6; the second thing holds none, the third is beyond two cells from all of them
    (mine,) = detector.matched([distances, logits], [things((4, 0, 8, 4), (3, 3, 5, 5))], (8, 8))
    assert mine.tolist() == [[False, True, False, False]]
    assert not detector.matched([distances, logits], [things((-20, -20, 20, 20))], (8, 8))[0].any()
    (free,) = detector.matched([torch.zeros(1, 4, 2, 2), logits], [things((-20, -20, 20, 20))], (8, 8))
    assert free.all()


CFG = """[net]
width=32
height=32
[convolutional]
batch_normalize=1
filters=8
size=3
stride=4
pad=1
activation=leaky
[convolutional]
filters=14
size=1
activation=linear
[yolo]
mask=0,1
anchors=8,8, 16,16
classes=2
"""


class Pictures:
    """Four grey pictures, each with one thing."""

    def __len__(self):
        return 4

    def __getitem__(self, number):
        corners = torch.tensor([[4.0, 4.0, 20.0, 20.0]])
        return SimpleNamespace(width=32, height=32, boxes=Boxes(corners, torch.tensor([number % 2])),
                               ignored=torch.zeros(1, dtype=torch.bool), areas=torch.tensor([256.0]))  # fmt: skip

    def picture(self, number, height, width):
        return torch.full((3, height, width), 40 * number + 20, dtype=torch.uint8)


@pytest.fixture
def detection(tmp_path):
    pytest.importorskip("pycocotools")
    (tmp_path / "net.cfg").write_text(CFG)
    loaded = niwaki.models.load(f"darknet:{tmp_path / 'net.cfg'}")
    splits = SimpleNamespace(train=Pictures(), val=Pictures(), test=Pictures(), classes=("a", "b"))
    return loaded, Detection(splits, loaded.detector, size=32, batch=2, augment=None)


def test_a_student_is_pulled_to_its_teacher(detection):
    loaded, task = detection
    student = loaded.factory().train()
    taught = OutputTaught(task, loaded.model, BoxOutputs(classes=1.0, boxes=1.0), loaded.detector)
    batch = task.calibration(1, 0)[0]
    assert taught.parts(student, batch).keys() == {"task", "class outputs", "box outputs"}
    same = taught.parts(loaded.model.eval(), batch)
    assert same["class outputs"].item() == pytest.approx(0, abs=1e-4) and same["box outputs"].item() == 0
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05)
    before = taught.parts(student, batch)
    whole = torch.stack([part.reshape(()) for part in before.values()]).sum()
    assert taught.loss(student, batch).item() == pytest.approx(whole.item())
    frozen = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    alone, how = copy.deepcopy(student), niwaki.train.Recovery(epochs=6, lr=0.01, clip=10.0)
    how(alone, task)
    how(student, replace(taught, how=BoxOutputs(classes=10.0, boxes=10.0)))
    after, plain = taught.parts(student, batch), taught.parts(alone, batch)
    assert after["class outputs"] < 0.5 * plain["class outputs"] and after["box outputs"] < 0.5 * plain["box outputs"]
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in loaded.model.state_dict().items())


def test_maps_and_outputs_are_taught_together(detection):
    loaded, task = detection
    student = loaded.factory().train()
    taught = OutputTaught(task, loaded.model, BoxOutputs(), loaded.detector)
    both = Distilled(taught, loaded.model, (Weighted(SpatialAttention(), taps=("layers.0",)),))
    batch = task.calibration(1, 0)[0]
    parts = both.parts(student, batch)
    assert set(parts) == {"task", "spatial_attention"}
    student.eval()
    assert both.parts(student, batch)["task"].item() == pytest.approx(taught.loss(student, batch).item())


def test_outputs_of_detectors_are_no_scores(detection):
    loaded, task = detection
    with pytest.raises(InputError, match=r"maps of several numbers a box.*OutputTaught"):
        Distilled(task, loaded.model, (Weighted(Logits()),))
    with pytest.raises(InputError, match=r"detect with a NoneType; .*load\(...\).detector is None"):
        replace(task, detector=None)


def test_networks_of_other_families_have_no_such_heads():
    for detector in (DarknetDetector((YoloHead(((2.0, 2.0),), (0,), 2),)), UltralyticsDetector(2)):
        with pytest.raises(InputError, match="a Linear with"):
            detector.head_places(nn.Linear(2, 2))


def test_a_network_of_ultralytics_is_pulled_to_its_teacher(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.getbasetemp()))
    pytest.importorskip("cv2", reason="opencv is not installed")
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    loaded = niwaki.models.load("ultralytics:yolov8n.yaml?nc=2", shape=(3, 64, 64))
    splits = SimpleNamespace(train=Pictures(), val=Pictures(), test=Pictures(), classes=("a", "b"))
    task = Detection(splits, loaded.detector, size=64, batch=2, augment=None)
    taught = OutputTaught(task, loaded.model, BoxOutputs(classes=1.0, boxes=1.0), loaded.detector)
    batch = task.calibration(1, 0)[0]
    same = taught.parts(loaded.model, batch)
    assert same["class outputs"].item() == pytest.approx(0, abs=1e-4) and same["box outputs"].item() == 0
    student = loaded.factory()
    with torch.no_grad():
        student.model[-1].cv2[0][-1].bias[0] += 4.0
        student.model[-1].cv3[1][-1].bias += 8.0
    parts = taught.parts(student.train(), batch)
    assert parts["class outputs"] > 0 and parts["box outputs"] > 0
    parts["box outputs"].backward()
    assert isinstance(student.model[-1].cv2[0][-1].weight.grad, Tensor)
