"""Detectors of ultralytics: their own loss and decoding, files, cuts, and the way back. Skipped without the package."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import niwaki
from niwaki.boxes import Boxes
from niwaki.errors import FileDamagedError, InputError
from niwaki.models.ultralytics import alone
from niwaki.models.ultralytics_detector import UltralyticsDetector
from niwaki.models.ultralytics_yolo import as_yolo

SMALL = (3, 64, 64)
STEPS = 150


@pytest.fixture
def ultralytics(tmp_path_factory, monkeypatch):
    """The package, which keeps its settings away from the home folder."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_AUTOINSTALL", "false")
    pytest.importorskip("cv2", reason="opencv is not installed")
    with alone():
        return pytest.importorskip("ultralytics", reason="ultralytics is not installed")


@pytest.fixture
def half(ultralytics):
    """A network of 3 classes before and after half of its channels went."""
    loaded = niwaki.models.load("ultralytics:yolov8n.yaml?nc=3", shape=SMALL)
    outcome = niwaki.compress(
        loaded.model,
        loaded.example,
        method=niwaki.methods.Random(rule="uniform"),
        budget=niwaki.Budget(keep=0.5, of="units"),
        protect=loaded.protect,
    )
    return loaded, outcome.model


def pictures_and_things() -> tuple[Tensor, list[Boxes]]:
    """Bright squares of three colours on dark ground."""
    pictures = torch.rand(4, *SMALL, generator=torch.Generator().manual_seed(0)) * 0.2
    things = []
    for i, (left, top, side, label) in enumerate([(8, 8, 24, 0), (30, 20, 24, 1), (16, 32, 28, 2)]):
        pictures[i, label, top : top + side, left : left + side] = 0.9
        corners = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
        things.append(Boxes(corners, torch.tensor([label])))
    return pictures, [*things, Boxes.none()]


@pytest.mark.parametrize("name", ["yolov8n", "yolov5n", "yolo11n", "yolov10n", "yolo12n", "yolo26n"])
def test_losses_and_boxes_of_every_family_before_and_after_a_cut(ultralytics, name):
    loaded = niwaki.models.load(f"ultralytics:{name}.yaml?nc=3", shape=SMALL)
    small = niwaki.compress(
        loaded.model,
        loaded.example,
        method=niwaki.methods.Random(rule="uniform"),
        budget=niwaki.Budget(keep=0.5, of="units"),
        protect=loaded.protect,
    ).model
    detector = loaded.detector
    assert isinstance(detector, UltralyticsDetector) and detector.classes == 3
    pictures, things = pictures_and_things()
    for model in (loaded.model, small):
        for training in (True, False):
            model.train(training)
            parts = detector.losses(model, pictures, things)
            assert parts.keys() == {"box", "class", "l1" if name == "yolo26n" else "dfl"}
            sum(parts.values()).backward()
            assert all(math.isfinite(part.item()) for part in parts.values())
        assert all(p.grad is not None for n, p in model.named_parameters() if "dfl" not in n)
        assert model.model[-1].export
        empty = detector.losses(model, pictures, [Boxes.none()] * 4)
        assert empty["box"].item() == 0 and empty["class"].item() > 0
        found = detector.found(model, pictures, confidence=0.0, overlap=1.0, most=7)
        assert [len(one) for one in found] == [7] * 4 and not model.training


def test_losses_are_those_of_the_package(ultralytics):
    loaded = niwaki.models.load("ultralytics:yolov8n.yaml?nc=3", shape=SMALL)
    pictures, things = pictures_and_things()
    batch = {  # as the package's own loader gives it: three squares, by hand
        "img": pictures,
        "batch_idx": torch.tensor([0.0, 1.0, 2.0]),
        "cls": torch.tensor([[0.0], [1.0], [2.0]]),
        "bboxes": torch.tensor([[20, 20, 24, 24], [42, 32, 24, 24], [30, 46, 28, 28]]) / 64,
    }
    model = loaded.model.train()
    weighted, _ = model.loss(batch)
    parts = loaded.detector.losses(model, pictures, things)
    assert torch.allclose(torch.stack(list(parts.values())), weighted / 4, rtol=1e-4)


@pytest.mark.parametrize("name", ["yolov8n", "yolov10n", "yolo26n"])
def test_boxes_are_those_of_the_package(ultralytics, name):
    from ultralytics.utils.nms import non_max_suppression

    loaded = niwaki.models.load(f"ultralytics:{name}.yaml?nc=3", shape=SMALL)
    for branch in loaded.model.model[-1].cv3:
        nn.init.normal_(branch[-1].weight)  # no two boxes are equally sure
    pictures, _ = pictures_and_things()
    found = loaded.detector.found(loaded.model, pictures, confidence=0.001, overlap=0.5, most=20)
    decoded = loaded.model(pictures).detach()
    theirs = non_max_suppression(
        decoded, conf_thres=0.001, iou_thres=0.5, multi_label=True, max_det=20, max_time_img=9, nc=3
    )
    for one, other in zip(found, theirs, strict=True):
        assert len(one) > 5
        assert torch.allclose(one.scores, other[:, 4]) and one.labels.equal(other[:, 5].long())
        assert torch.allclose(one.corners, other[:, :4].clamp(0, 64), atol=1e-4)


def test_bins_of_distance_stay_with_protect_and_are_missed_without(ultralytics):
    loaded = niwaki.models.load("ultralytics:yolov8n.yaml?nc=3", shape=SMALL)
    assert loaded.protect == tuple(f"model.22.cv2.{i}.2" for i in range(3))
    assert all(name.why.startswith("protected by ultralytics: bins of distance") for name in loaded.protect)
    bare = niwaki.compress(
        loaded.model,
        loaded.example,
        method=niwaki.methods.Random(rule="uniform"),
        budget=niwaki.Budget(keep=0.5, of="units"),
    ).model
    pictures, things = pictures_and_things()
    with pytest.raises(InputError, match=r"bins of distance.*protect=loaded\.protect"):
        loaded.detector.losses(bare, pictures, things)


def test_networks_that_were_rewritten_train_too(ultralytics):
    """A ranking over all layers leaves halves of different widths, which only the second door of `cut` can make."""
    loaded = niwaki.models.load("ultralytics:yolov8n.yaml?nc=3", shape=SMALL)
    for module in loaded.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 1.0)
    small = niwaki.compress(
        loaded.model,
        loaded.example,
        method=niwaki.methods.NormScale(rule="global_rank"),
        budget=niwaki.Budget(keep=0.4, of="params"),
        protect=loaded.protect,
    ).model
    assert type(small) is not type(loaded.model)
    pictures, things = pictures_and_things()
    with pytest.raises(InputError, match=r"model\.train\(\) first"):
        loaded.detector.losses(small, pictures, things)
    parts = loaded.detector.losses(small.train(), pictures, things)
    assert parts.keys() == {"box", "class", "dfl"} and all(part > 0 for part in parts.values())
    sum(parts.values()).backward()
    assert all(p.grad is not None for n, p in small.named_parameters() if "dfl" not in n)
    found = loaded.detector.found(small, pictures, confidence=0.0, overlap=1.0, most=7)
    assert [len(one) for one in found] == [7] * 4 and small.training
    # the pattern gives the loss of the network that it was made of
    whole = loaded.model.train()
    expected = loaded.detector.losses(whole, pictures, things)
    rewritten = nn.Module()
    rewritten.model = whole.model
    rewritten.forward = whole.forward
    again = loaded.detector.losses(rewritten, pictures, things)
    assert again.keys() == expected.keys() and all(torch.allclose(again[k], expected[k], rtol=1e-3) for k in again)


@pytest.mark.parametrize(
    "classes, head, params, gmacs",
    [
        (10, "box", 6_734_182, 10.43),
        (10, "none", 6_478_822, 9.89),
        (10, "all", 7_982_374, 13.43),
        (80, "box", 6_754_552, 10.49),
    ],
)
def test_yolov8m_halved_everywhere_is_the_published_size(ultralytics, classes, head, params, gmacs):
    """25.86 M parameters become 6.4 to 7.0 M (published: 6.85 M); 10 or 13 M would mean that coupled channels stay.

    By which branches of the head stay as they are: the box's (as in the yaml's rule for half widths), none, all.
    """
    loaded = niwaki.models.load(f"ultralytics:yolov8m.yaml?nc={classes}", shape=(3, 640, 640))
    model = loaded.model
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert whole == {80: 25_902_640, 10: 25_862_110}[classes]
    hidden = {"none": (), "box": ("model.22.cv2.*",), "all": ("model.22.cv2.*", "model.22.cv3.*")}[head]
    graph = niwaki.trace(model, loaded.example, protect=(*loaded.protect, *hidden))
    assert graph.macs == {80: 39_468_364_800, 10: 39_355_468_800}[classes] and not graph.unknown
    fixed = {group.name for group in graph.groups if group.fixed and not group.name.startswith("model.22.")}
    assert fixed == {"model.0.conv"}, "only the picture's channels stay in backbone and neck"
    scores = niwaki.score(graph, niwaki.collect(model, graph, frozenset()), how=niwaki.scores.Random())
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="units"), how=niwaki.budgets.Uniform())
    assert plan.promised["params"] == params
    assert plan.promised["macs"] / 1e9 == pytest.approx(gmacs, abs=0.006)
    if head != "box":
        return
    assert 6.4e6 < params < 7.0e6
    small = niwaki.cut(model, plan)
    assert type(small) is type(model) and sum(parameter.numel() for parameter in small.parameters()) == params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(torch.zeros(1, 3, 320, 320))  # a quarter of the places
    assert counter.get_total_flops() == 2 * plan.promised["macs"] // 4
    for block in small.model:
        if type(block).__name__ == "C2f":
            assert block.cv1.conv.out_channels == 2 * block.c
            assert all(inner.cv2.conv.out_channels == block.c for inner in block.m)


def test_what_does_not_fit_is_refused(ultralytics):
    loaded = niwaki.models.load("ultralytics:yolov8n.yaml?nc=3", shape=SMALL)
    pictures, things = pictures_and_things()
    with pytest.raises(InputError, match="a Linear, which has no loss of the package"):
        loaded.detector.losses(nn.Linear(1, 1), pictures, things)
    with pytest.raises(InputError, match="a head of 3 classes, where 80"):
        UltralyticsDetector(80).losses(loaded.model, pictures, things)
    with pytest.raises(InputError, match=r"labels \[3\]"):
        loaded.detector.losses(loaded.model, pictures[:1], [Boxes(torch.zeros(1, 4), torch.tensor([3]))])
    with pytest.raises(InputError, match="4 targets for 1"):
        loaded.detector.losses(loaded.model, pictures[:1], things)
    for name in ("yolov8n-seg", "yolov8n-cls"):
        assert niwaki.models.load(f"ultralytics:{name}.yaml", shape=SMALL).detector is None


def test_networks_inside_wrappers_and_settings_as_the_package_stores_them(ultralytics):
    loaded = niwaki.models.load("ultralytics:yolov8n.yaml?nc=3", shape=SMALL)
    pictures, things = pictures_and_things()
    expected = {k: v.item() for k, v in loaded.detector.losses(loaded.model, pictures, things).items()}
    wrapped = nn.Module()
    wrapped.module = loaded.model
    wrapped.forward = loaded.model.forward
    for args, factor in ((None, 1), ({"box": 15.0, "task": "detect"}, 2)):
        loaded.model.args = args
        found = {k: v.item() for k, v in loaded.detector.losses(wrapped, pictures, things).items()}
        assert found == pytest.approx({**expected, "box": factor * expected["box"]}, rel=1e-5)
        assert vars(loaded.model)["args"] == args


def test_a_file_of_the_package_is_the_same_network(ultralytics, tmp_path):
    with alone():
        yolo = ultralytics.YOLO("yolov8n.yaml")
    yolo.model.names = {i: f"thing {i}" for i in range(80)}
    for parameter in yolo.model.parameters():
        parameter.data = parameter.data.half().float()  # as files hold them
    yolo.model.args["imgsz"], yolo.model.args["box"] = 96, 5.0
    yolo.save(tmp_path / "best.pt")
    loaded = niwaki.models.load(f"ultralytics:{tmp_path / 'best.pt'}")
    assert loaded.example.shape == (1, 3, 96, 96) and loaded.weights == "stored with the model" and not loaded.assumed
    assert loaded.model.names[3] == "thing 3" and loaded.model.args.box == 5.0
    pictures, _ = pictures_and_things()
    theirs = yolo.model.eval()(pictures)[0]
    assert torch.allclose(loaded.model(pictures), theirs, atol=1e-3)
    again = loaded.factory()
    assert not again(pictures).equal(loaded.model(pictures)) and again.names[3] == "thing 3"
    filled = niwaki.models.load("ultralytics:yolov8n.yaml", checkpoint=str(tmp_path / "best.pt"), shape=SMALL).model
    assert filled(pictures).equal(loaded.model(pictures))
    with pytest.raises(InputError, match=r"of another shape.*widths that are not those of its structure"):
        niwaki.models.load(f"ultralytics:{tmp_path / 'best.pt'}?ch=1")
    three = niwaki.models.load(f"ultralytics:{tmp_path / 'best.pt'}?nc=3")  # its names are those of 80
    assert three.drawn and three.weights == "stored with the model" and three.model.names[0] == "0"
    yolo.model.fuse(verbose=False)
    yolo.save(tmp_path / "fused.pt")
    with pytest.raises(InputError, match="save it before the package fuses it"):
        niwaki.models.load(f"ultralytics:{tmp_path / 'fused.pt'}")


def test_a_hostile_structure_is_refused(ultralytics, tmp_path):
    marker = tmp_path / "was_run"
    with alone():
        yolo = ultralytics.YOLO("yolov8n.yaml")
    yolo.model.yaml["activation"] = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    yolo.save(tmp_path / "a.pt")
    with pytest.raises(FileDamagedError, match="would be evaluated"):
        niwaki.models.load(f"ultralytics:{tmp_path / 'a.pt'}")
    yolo.model.yaml.pop("activation")
    yolo.model.yaml["backbone"][0][3] = ["what"]
    yolo.save(tmp_path / "b.pt")
    with pytest.raises(FileDamagedError, match="a structure that cannot be built"):
        niwaki.models.load(f"ultralytics:{tmp_path / 'b.pt'}")
    assert not marker.exists()


def learn(model: nn.Module, detector: UltralyticsDetector, pictures: Tensor, things: list[Boxes]) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # the package's 0.03 is for more steps than these
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=4e-3)
    rate = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        optimiser.zero_grad()
        sum(detector.losses(model, pictures, things).values()).backward()
        optimiser.step()
        rate.step()
    model.eval()


def dataset(folder: Path) -> Path:
    """Four pictures as the package's users keep them."""
    from PIL import Image

    pictures, things = pictures_and_things()
    for kind in ("images", "labels"):
        (folder / kind / "val").mkdir(parents=True)
    for i, (picture, boxes) in enumerate(zip(pictures, things, strict=True)):
        Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(folder / "images" / "val" / f"{i}.png")
        rows = []
        for (left, top, right, bottom), label in zip(boxes.corners.tolist(), boxes.labels.tolist(), strict=True):
            centre = ((left + right) / 128, (top + bottom) / 128, (right - left) / 64, (bottom - top) / 64)
            rows.append(" ".join(map(str, (label, *centre))))
        (folder / "labels" / "val" / f"{i}.txt").write_text("\n".join(rows))
    file = folder / "data.yaml"
    file.write_text(f"path: {folder}\ntrain: images/val\nval: images/val\nnames: [red, green, blue]\n")
    return file


@pytest.mark.filterwarnings("ignore")
def test_a_cut_network_learns_and_is_used_in_the_package(half, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the package's `val` imports it")
    monkeypatch.chdir(tmp_path)
    loaded, small = half
    shapes = {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
    pictures, things = pictures_and_things()
    learn(small, loaded.detector, pictures, things)
    for one, boxes in zip(
        loaded.detector.found(small, pictures, confidence=0.3, overlap=0.5, most=3), things, strict=True
    ):
        assert one.labels.tolist() == boxes.labels.tolist()
        assert (one.corners - boxes.corners).abs().max() < 4 if len(boxes) else True
    yolo = as_yolo(small)
    quiet = {"imgsz": 64, "verbose": False, "plots": False, "project": str(tmp_path), "workers": 0}
    with alone():
        told = yolo.val(data=str(dataset(tmp_path / "data")), **quiet)
        assert told.box.map50 > 0.5
        (seen,) = yolo.predict((pictures[0].permute(1, 2, 0).flip(2) * 255).byte().numpy(), imgsz=64, verbose=False)
        assert seen.boxes.cls[0] == 0
        assert (seen.boxes.xyxy[0] - things[0].corners[0]).abs().max() < 4
        exported = Path(yolo.export(format="torchscript", imgsz=64))
        assert exported.exists()
        yolo.save(tmp_path / "small.pt")
        again = type(yolo)(tmp_path / "small.pt")
    assert {name: tuple(tensor.shape) for name, tensor in again.model.state_dict().items()} == shapes
    assert small.model[-1].export and {n: tuple(t.shape) for n, t in small.state_dict().items()} == shapes
    script = torch.jit.load(str(exported))
    assert torch.allclose(script(pictures[:1]), small(pictures[:1]), atol=1e-3)
    with pytest.raises(InputError, match="a Linear"):
        as_yolo(nn.Linear(1, 1))
    with pytest.raises(InputError, match="widths that are not those of its structure"):
        niwaki.models.load(f"ultralytics:{tmp_path / 'small.pt'}")
