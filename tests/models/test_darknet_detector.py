"""Detectors of darknet: assignment, losses and boxes worked out by hand, and a network that learns."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import niwaki
from niwaki.boxes import Boxes
from niwaki.errors import InputError
from niwaki.models.darknet_cfg import parse
from niwaki.models.darknet_detector import DarknetDetector
from niwaki.models.darknet_heads import YoloHead
from niwaki.models.darknet_net import Darknet, decode, heads_of

LN2 = math.log(2)
ANCHORS = ((2.0, 2.0), (4.0, 4.0), (8.0, 8.0))
HEAD = YoloHead(ANCHORS, (0, 1), 2)  # of boxes 2 and 4 pixels wide; those of 8 are another head's
PICTURE = torch.zeros(1, 3, 8, 8)  # a grid of 2 x 2 cells


class Maps(nn.Module):
    """A network that has made up its mind."""

    def __init__(self, *maps: Tensor) -> None:
        super().__init__()
        self.maps = nn.ParameterList(maps)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.maps)


def zeros(pictures: int = 1) -> Maps:
    """Every box lies in the middle of its cell, as large as its anchor, and is there by half."""
    return Maps(torch.zeros(pictures, HEAD.width, 2, 2))


def boxes(*items: tuple[float, float, float, float, int]) -> Boxes:
    """Centre, width, height and label of each."""
    corners = [[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h, _ in items]
    return Boxes(torch.tensor(corners).view(-1, 4), torch.tensor([item[4] for item in items], dtype=torch.int64))


def losses(*targets: Boxes, head: YoloHead = HEAD, model: nn.Module | None = None) -> dict[str, float]:
    pictures = PICTURE.expand(len(targets), -1, -1, -1)
    found = DarknetDetector((head,)).losses(model or zeros(len(targets)), pictures, targets)
    return {name: value.item() for name, value in found.items()}


def with_(**settings) -> YoloHead:
    return YoloHead(ANCHORS, (0, 1), 2, **settings)


def near(**values: float) -> object:
    return pytest.approx({"box": 0.0, **values}, abs=1e-5)


def test_a_thing_that_is_met_exactly():
    # 8 boxes at one half each are ln 2; so are the two classes of the one that learns
    assert losses(boxes((2, 2, 4, 4, 1))) == near(objectness=8 * LN2, **{"class": 2 * LN2})


def test_boxes_that_overlap_enough_are_not_told_to_be_background():
    # the box of 2 in the same cell overlaps the thing of 4 by 4 / 16
    assert losses(boxes((2, 2, 4, 4, 1)), head=with_(ignore_thresh=0.2))["objectness"] == pytest.approx(7 * LN2)
    assert losses(boxes((2, 2, 4, 4, 1)), head=with_(ignore_thresh=0.3))["objectness"] == pytest.approx(8 * LN2)


def test_other_anchors_learn_where_their_shape_overlaps_enough():
    found = losses(boxes((2, 2, 4, 4, 1)), head=with_(iou_thresh=0.2))
    assert found == near(box=0.07 * 0.75, objectness=8 * LN2, **{"class": 4 * LN2})
    assert losses(boxes((2, 2, 4, 4, 1)), head=with_(iou_thresh=0.3))["box"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "thing, overlap, more",
    [
        # inside 3 * 4, together 20; the centres are 1 apart, the corners of both sqrt(25 + 16)
        ((3, 2, 4, 4, 0), 0.6, 1 / 41),
        # inside 16, together 24; one centre; a shape of 3 : 2 where it is 1 : 1
        ((2, 2, 6, 4, 0), 2 / 3, None),
    ],
)
def test_complete_overlap(thing, overlap, more):
    if more is None:
        shape = 4 / math.pi**2 * (math.atan(1.5) - math.atan(1)) ** 2
        more = shape**2 / (1 - overlap + shape)
    assert losses(boxes(thing))["box"] == pytest.approx(0.07 * (1 - overlap + more), abs=1e-6)
    less = losses(boxes(thing), head=with_(iou_loss="diou", iou_normalizer=1.0))["box"]
    assert less == pytest.approx(1 - overlap + (more if thing[0] == 3 else 0), abs=1e-5)


def test_things_of_other_heads_are_background_here():
    assert losses(boxes((4, 4, 8, 8, 0))) == near(objectness=8 * LN2, **{"class": 0.0})


def test_two_things_in_one_box():
    # the second is the one of the first case above: half of its box loss; both classes are right now
    model = zeros()
    model.maps[0].data[0, 12:14] = math.log(3)  # of the box of 4: each class by three quarters
    found = losses(boxes((2, 2, 4, 4, 0), (3, 2, 4, 4, 1)), model=model)
    assert found["box"] == pytest.approx(0.07 * (0.4 + 1 / 41) / 2, abs=1e-6)
    assert found["objectness"] == pytest.approx(8 * LN2)
    assert found["class"] == pytest.approx(-2 * math.log(0.75))


def test_classes_are_smoothed():
    model = zeros()
    model.maps[0].data[0, 12:14] = math.log(3)
    smooth = losses(boxes((2, 2, 4, 4, 0)), model=model, head=with_(label_smooth_eps=0.1))["class"]
    one = -0.95 * math.log(0.75) - 0.05 * math.log(0.25)
    other = -0.05 * math.log(0.75) - 0.95 * math.log(0.25)
    assert smooth == pytest.approx(one + other)


def test_losses_are_means_over_pictures_and_weighted():
    both = losses(boxes((3, 2, 4, 4, 1)), Boxes.none())
    assert both == near(box=0.07 * (0.4 + 1 / 41) / 2, objectness=8 * LN2, **{"class": LN2})
    heavy = with_(iou_normalizer=1.0, obj_normalizer=0.5, cls_normalizer=2.0)
    found = losses(boxes((3, 2, 4, 4, 1)), head=heavy)
    assert found == near(box=0.4 + 1 / 41, objectness=4 * LN2, **{"class": 4 * LN2})


def test_a_thing_belongs_to_the_cell_of_its_centre():
    model = zeros()
    model.maps[0].data[0, 7 + 4, 1, 0] = math.log(3)  # objectness of the box of 4 below on the left
    for thing, hit in (((2, 6, 4, 4, 0), True), ((6, 2, 4, 4, 0), False), ((-1, 9, 4, 4, 0), True)):
        rest = 7 * LN2 - math.log(0.75 if hit else 0.25)
        assert losses(boxes(thing), model=model)["objectness"] == pytest.approx(rest), thing


def test_pictures_without_things_and_things_without_area():
    empty = boxes((2, 2, 0, 4, 0))
    assert losses(Boxes.none()) == losses(empty) == near(objectness=8 * LN2, **{"class": 0.0})
    model = zeros()
    sum(DarknetDetector((HEAD,)).losses(model, PICTURE, [Boxes.none()]).values()).backward()
    gradient = model.maps[0].grad[0]
    assert gradient[[4, 11]].eq(0.5).all() and gradient.abs().sum() == 4  # background is all there is to learn


def test_pictures_that_are_no_squares():
    head = YoloHead(((4.0, 2.0),), (0,), 1)
    model = Maps(torch.zeros(1, 6, 1, 2))
    target = boxes((6, 1, 4, 2, 0))  # on 2 rows and 8 columns: the second cell
    found = DarknetDetector((head,)).losses(model, torch.zeros(1, 3, 2, 8), [target])
    assert found["box"].item() == pytest.approx(0, abs=1e-6)


def test_boxes_are_found_class_by_class():
    model = Maps(torch.full((2, HEAD.width, 2, 2), -20.0))
    maps = model.maps[0].data
    maps[:, [0, 1, 2, 3, 7, 8, 9, 10]] = 0.0
    maps[0, 4, 0, 0] = maps[0, 11, 0, 0] = 20.0  # boxes of 2 and of 4 in the first cell are there: they overlap by 1/4
    maps[0, 5, 0, 0], maps[0, 12, 0, 0] = math.log(3), math.log(9)  # of class 0 by 0.75 and 0.9
    maps[0, 6, 0, 0] = 0.0  # the small one is of class 1, too
    detector = DarknetDetector((HEAD,))
    first, none = detector.found(model, PICTURE.expand(2, -1, -1, -1), confidence=0.1, overlap=0.5, most=10)
    assert first.labels.tolist() == [0, 0, 1] and len(none) == 0
    assert first.scores.tolist() == pytest.approx([0.9, 0.75, 0.5])
    assert first.corners.tolist() == [[0, 0, 4, 4], [1, 1, 3, 3], [1, 1, 3, 3]]
    apart = detector.found(model, PICTURE.expand(2, -1, -1, -1), confidence=0.6, overlap=0.2, most=10)[0]
    assert apart.scores.tolist() == pytest.approx([0.9])
    assert len(detector.found(model, PICTURE.expand(2, -1, -1, -1), confidence=0.1, overlap=0.5, most=2)[0]) == 2


def test_what_is_found_is_what_decode_gives():
    text = (
        "[net]\nwidth=8\nheight=8\nchannels=14\n[dropout]\n"
        "[yolo]\nmask=0,1\nanchors=2,2,4,4,8,8\nclasses=2\nscale_x_y=1.1\n"
    )
    network = Darknet(parse(text, "test.cfg")).eval()
    x = torch.randn(1, 14, 2, 2, generator=torch.Generator().manual_seed(0))
    (found,) = DarknetDetector(heads_of(network.sections)).found(
        Maps(x), torch.zeros(1, 3, 8, 8), confidence=0.0, overlap=1.0, most=100
    )
    rows = decode(network, network(x))[0]
    scores, order = (rows[:, 5:] * rows[:, 4:5]).flatten().sort(descending=True)
    assert found.scores.tolist() == pytest.approx(scores.tolist())
    assert found.labels.tolist() == (order % 2).tolist()
    centres = (found.corners[:, :2] + found.corners[:, 2:]) / 2
    inside = found.corners.gt(0).all(1) & found.corners.lt(8).all(1)
    assert inside.any() and torch.allclose(centres[inside] / 8, rows[order // 2][inside, :2], atol=1e-6)


@pytest.mark.parametrize(
    "settings, found", [({"new_coords": True}, "new_coords=1"), ({"iou_loss": "wiou"}, "iou_loss=wiou")]
)
def test_heads_that_cannot_be_trained_are_only_read(settings, found):
    detector = DarknetDetector((with_(**settings, where="x.cfg:7"),))
    with pytest.raises(InputError, match=found) as caught:
        detector.losses(zeros(), PICTURE, [Boxes.none()])
    assert "x.cfg:7" in str(caught.value)
    assert len(detector.found(zeros(), PICTURE, confidence=0.5, overlap=0.5, most=3)) == 1


def test_what_does_not_fit_is_refused():
    detector = DarknetDetector((HEAD,))
    for labels in (2, -1):
        with pytest.raises(InputError, match=rf"labels \[{labels}\], where the network tells 2"):
            detector.losses(zeros(), PICTURE, [boxes((2, 2, 4, 4, labels))])
    with pytest.raises(InputError, match="1 targets for 2"):
        detector.losses(zeros(2), PICTURE.expand(2, -1, -1, -1), [Boxes.none()])
    for model in (Maps(torch.zeros(1, 21, 2, 2)), Maps(torch.zeros(1, 14, 2, 2), torch.zeros(1, 14, 1, 1))):
        with pytest.raises(InputError, match=r"where the cfg says \[14\]"):
            detector.found(model, PICTURE, confidence=0.5, overlap=0.5, most=3)


def test_settings_come_from_the_cfg(tmp_path: Path):
    head = (
        "[convolutional]\nfilters=14\nsize=1\nactivation=linear\n[yolo]\nmask=1,2\nanchors=2,2, 4,4, 8,8\nclasses=2\n"
    )
    more = "iou_loss=giou\niou_normalizer=.1\nobj_normalizer=2\ncls_normalizer=3\nignore_thresh=.7\niou_thresh=.2\n"
    (tmp_path / "a.cfg").write_text(
        f"[net]\nwidth=8\nheight=8\nchannels=3\n{head}[route]\nlayers=0\n{head}{more}label_smooth_eps=.1\n"
    )
    detector = niwaki.models.load(f"darknet:{tmp_path / 'a.cfg'}").detector
    assert isinstance(detector, DarknetDetector) and detector.classes == 2
    plain, told = detector.heads
    assert plain == YoloHead(ANCHORS, (1, 2), 2, where=plain.where)
    assert told == YoloHead(ANCHORS, (1, 2), 2, told.where, 1.0, False, "giou", 0.1, 2.0, 3.0, 0.7, 0.2, 0.1)
    (tmp_path / "b.cfg").write_text("[net]\nwidth=8\nheight=8\n[avgpool]\n")
    assert niwaki.models.load(f"darknet:{tmp_path / 'b.cfg'}").detector is None
    (tmp_path / "c.cfg").write_text((tmp_path / "a.cfg").read_text().replace("anchors=2,2", "anchors=two,2", 1))
    with pytest.raises(InputError, match="anchors=two"):
        niwaki.models.load(f"darknet:{tmp_path / 'c.cfg'}")


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the shared data folder is not here")
@pytest.mark.parametrize("name, published", [("yolo-fastest-1.1", 35.6), ("yolo-fastest-1.1-xl", 43.2)])
def test_trained_detectors_find_what_their_publisher_found(name, published, tmp_path):
    """AP50 on 128 pictures of COCO's validation part, squashed to 320."""
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    for folder, place in (("images", "images"), ("labels", "boxes/labels")):
        (tmp_path / folder).symlink_to(SHARED / "coco256" / place)
    weights = SHARED / "weights" / "coco-yolo-fastest-darknet"
    names = (weights / "coco.names").read_text().split("\n")
    text = (
        f"path: {tmp_path}\ntrain: images/train2017\nval: images/val2017\nnames: {[name for name in names if name]}\n"
    )
    (tmp_path / "data.yaml").write_text(text)
    splits = niwaki.data.open_boxes(f"yolo:{tmp_path / 'data.yaml'}")
    assert len(splits.test) == 128
    loaded = niwaki.models.load(f"darknet:{weights / name}.cfg", checkpoint=str(weights / f"{name}.weights"))
    task = niwaki.tasks.Detection(splits, loaded.detector, size=320, fit="squash", augment=None)
    assert task.evaluate(loaded.model, split="test").value == pytest.approx(published, abs=1.0)


LEARNER = """[net]
width=32
height=32
channels=3
[convolutional]
batch_normalize=1
filters=16
size=3
stride=2
pad=1
activation=leaky
[convolutional]
batch_normalize=1
filters=24
size=3
stride=2
pad=1
activation=mish
[convolutional]
batch_normalize=1
filters=32
size=3
stride=2
pad=1
activation=leaky
[convolutional]
filters=14
size=1
activation=linear
[yolo]
mask=0,1
anchors=8,8, 16,8
classes=2
ignore_thresh=.7
scale_x_y=1.1
iou_loss=ciou
"""


def learn(model: nn.Module, detector: DarknetDetector, pictures: Tensor, targets: list[Boxes], steps: int) -> float:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    loss = math.inf
    for _ in range(steps):
        total = sum(detector.losses(model, pictures, targets).values())
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        loss = total.item()
    model.eval()
    return loss


def test_networks_learn_and_so_do_cut_ones(tmp_path: Path):
    (tmp_path / "a.cfg").write_text(LEARNER)
    loaded = niwaki.models.load(f"darknet:{tmp_path / 'a.cfg'}")
    things = [boxes((9, 10, 8, 8, 0)), boxes((20, 22, 16, 8, 1), (7, 6, 8, 8, 0)), Boxes.none()]
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.2
    for picture, target in zip(pictures, things, strict=True):
        for (left, top, right, bottom), label in zip(
            target.corners.int().tolist(), target.labels.tolist(), strict=True
        ):
            picture[label, top:bottom, left:right] = 0.9
    model = loaded.model
    start = sum(loaded.detector.losses(model, pictures, things).values()).item()
    assert learn(model, loaded.detector, pictures, things, 150) < 0.05 * start
    small = niwaki.compress(
        model,
        loaded.example,
        method=niwaki.methods.Random(rule="uniform"),
        budget=niwaki.Budget(keep=0.5, of="units"),
    ).model
    learn(small, loaded.detector, pictures, things, 150)
    for network in (model, small):
        found = loaded.detector.found(network, pictures, confidence=0.4, overlap=0.5, most=10)
        assert [sorted(one.labels.tolist()) for one in found] == [[0], [0, 1], []]
        for one, target in zip(found, things, strict=True):
            here, there = one.corners[one.labels.argsort()], target.corners[target.labels.argsort()]
            assert (here - there).abs().amax() < 2.0 if len(there) else True


def test_settings_that_are_not_used_are_named_once(tmp_path, caplog):
    """Those that change how a network computes or learns; not batches, rates and changed pictures, nor neutral ones."""
    head = (
        "[yolo]\nmask=0\nanchors=4,4\nclasses=1\nmax_delta=5\ntruth_thresh=1\njitter=.3\nnum=1\nobjectness_smooth=0\n"
    )
    last = "[convolutional]\nfilters=6\nsize=1\nactivation=linear\nburnin_update=2\n"
    file = tmp_path / "net.cfg"
    file.write_text(f"[net]\nwidth=32\nheight=32\nbatch=8\nmosaic=1\nlettr_box=1\n{last}{head}{last}{head}")
    assert niwaki.models.load(f"darknet:{file}").detector.fit == "squash"
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}: read and not used: [net] lettr_box=1 (line 1), [convolutional] burnin_update=2 (lines 7, 21), "
        "[yolo] max_delta=5 (lines 12, 26); clip gradients as a whole instead (clip=10)"
    ]
    caplog.clear()
    file.write_text(f"[net]\nletter_box=1\n{last}{head}".replace("burnin_update=2\n", "").replace("max_delta=5\n", ""))
    assert niwaki.models.load(f"darknet:{file}").detector.fit == "letterbox" and not caplog.records


@pytest.mark.parametrize("kind", ["convolutional", "maxpool"])
def test_strides_of_one_axis_are_refused(kind):
    section = parse(f"[net]\n[{kind}]\nstride=2\nstride_y=1\nsize=2\n", "net.cfg")
    with pytest.raises(InputError, match=r"stride_y=1, stride=2; where: net.cfg:2"):
        Darknet(section)
