"""Networks of ultralytics."""

import os
import sys

import pytest
import torch

import niwaki.models
from niwaki.errors import FileDamagedError, InputError, MissingExtraError, UnknownNameError
from niwaki.models.ultralytics import alone
from niwaki.units import tensors_in


@pytest.fixture
def ultralytics(tmp_path_factory, monkeypatch):
    """The package, which keeps its settings away from the home folder."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.getbasetemp()))
    pytest.importorskip("cv2", reason="opencv is not installed")
    with alone():
        return pytest.importorskip("ultralytics", reason="ultralytics is not installed")


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolov8n", "yolo11n-seg.yaml", "yolov8n-cls.yaml", "rtdetr-l.yaml"])
def test_networks_with_their_usual_input(ultralytics, name):
    loaded = niwaki.models.load(f"ultralytics:{name}")
    size = 224 if "cls" in name else 320
    assert loaded.example.shape == (1, 3, size, size) and not loaded.model.training
    assert loaded.normalisation == ((0.0,) * 3, (1.0,) * 3)
    with torch.no_grad():
        assert loaded.model(loaded.example) is not None


@pytest.mark.parametrize("name", ["yolov8n.yaml?nc=3", "yolo11n-seg.yaml"])
def test_outlines_have_no_parameters_and_the_same_graph(ultralytics, name):
    """The package runs a network as it builds it; afterwards nothing of it lies in memory but buffers."""
    source = f"ultralytics:{name}"
    outline = niwaki.models.outline(source, shape=(3, 64, 64))
    loaded = niwaki.models.load(source, shape=(3, 64, 64))
    assert all(p.is_meta for p in outline.model.parameters()) and all(p.is_meta for p in outline.factory().parameters())
    assert not any(b.is_meta for b in outline.model.buffers())
    shapes = [{n: (tuple(p.shape), p.requires_grad) for n, p in o.model.named_parameters()} for o in (outline, loaded)]
    assert shapes[0] == shapes[1]
    graph, whole = niwaki.trace(outline.model, outline.example), niwaki.trace(loaded.model, loaded.example)
    assert (graph.params, graph.macs) == (whole.params, whole.macs)
    assert [(g.name, len(g.ids)) for g in graph.groups] == [(g.name, len(g.ids)) for g in whole.groups]


def test_sizes_differ_and_arguments_reach_the_builder(ultralytics):
    small, large = (niwaki.models.load(f"ultralytics:yolo11{size}.yaml?nc=3").model for size in "ns")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in large.parameters())
    assert small.model[-1].nc == 3
    grey = niwaki.models.load("ultralytics:yolov8n.yaml?ch=1", shape=(1, 64, 96))
    assert grey.example.shape == (1, 1, 64, 96) and grey.model(grey.example).shape[1] == 84


@pytest.mark.parametrize("name", ["yolo99n.yaml", "yolov8q", "yolov8nn", "../yolov8n.yaml", "folder/yolov8n.yaml"])
def test_unknown_names_list_the_nearest(ultralytics, name):
    with pytest.raises(UnknownNameError, match="nearest"):
        niwaki.models.load(f"ultralytics:{name}")


@pytest.mark.parametrize(
    "name, found",
    [("yolov8n.onnx", "kind .onnx"), ("yolov8n.pt", "no such file"), ("yolov8n-world.yaml", "reads texts")],
)
def test_what_is_no_structure_is_refused(ultralytics, name, found):
    with pytest.raises(InputError, match=found):
        niwaki.models.load(f"ultralytics:{name}")


def test_checkpoints_as_the_package_saves_them_and_plain_ones(ultralytics, tmp_path):
    model = niwaki.models.load("ultralytics:yolov8n-cls.yaml").model
    torch.save({"model": model}, tmp_path / "best.pt")  # as the package saves
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    for name in ("best.pt", "plain.pt"):
        again = niwaki.models.load("ultralytics:yolov8n-cls.yaml", seed=1, checkpoint=str(tmp_path / name)).model
        assert all(a.equal(b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "best.pt").read_bytes()[:-5000])
    with pytest.raises(FileDamagedError):
        niwaki.models.load("ultralytics:yolov8n-cls.yaml", checkpoint=str(tmp_path / "cut.pt"))


def test_weights_for_other_classes_bring_all_but_the_heads(ultralytics, tmp_path, caplog):
    """Of 80 classes the branch that tells them apart is 80 channels wide, of 3 it is 64: all of it is drawn anew, and
    nothing else."""
    trained = niwaki.models.load("ultralytics:yolov8n.yaml", shape=(3, 64, 64)).model
    torch.save({"model": trained}, tmp_path / "best.pt")
    torch.save(trained.state_dict(), tmp_path / "plain.pt")
    untrained = niwaki.models.load("ultralytics:yolov8n.yaml?nc=3", seed=7, shape=(3, 64, 64)).model.state_dict()
    asked = [("ultralytics:yolov8n.yaml?nc=3", str(tmp_path / name)) for name in ("best.pt", "plain.pt")]
    for source, checkpoint in (*asked, (f"ultralytics:{tmp_path / 'best.pt'}?nc=3", None)):
        caplog.clear()
        loaded = niwaki.models.load(source, checkpoint=checkpoint, seed=7, shape=(3, 64, 64))
        own, before = loaded.model.state_dict(), trained.state_dict()
        assert loaded.detector is not None and loaded.detector.classes == 3 and loaded.weights != "random"
        assert {name.rpartition(".")[0] for name in loaded.drawn if name.endswith("conv.weight")} == {
            f"model.22.cv3.{scale}.{layer}.conv" for scale in range(3) for layer in range(2)
        }
        assert all(name.startswith("model.22.cv3.") for name in loaded.drawn)
        for name, tensor in own.items():
            assert tensor.equal(untrained[name] if name in loaded.drawn else before[name]), name
        said = [record.getMessage() for record in caplog.records]
        assert not any("nc=1" in words for words in said)  # of networks that are only compared with
        (told,) = [words for words in said if "drawn anew" in words]
        assert "nc=3" in told and "model.22.cv3.0.0.conv.weight" in told and f"({len(loaded.drawn)} in all)" in told


def test_weights_of_other_networks_stay_refused(ultralytics, tmp_path):
    trained = niwaki.models.load("ultralytics:yolov8n.yaml?nc=20", shape=(3, 64, 64)).model
    torch.save({"model": trained}, tmp_path / "best.pt")
    with pytest.raises(InputError, match=r"another number of classes: write \?nc=N after the model's name"):
        niwaki.models.load("ultralytics:yolov8n.yaml", checkpoint=str(tmp_path / "best.pt"))
    for name in ("yolov8s.yaml?nc=3", "yolov8n-seg.yaml?nc=3", "yolo11n.yaml?nc=3"):
        with pytest.raises(InputError, match=r"do: give the yaml of these weights, .*ultralytics:FILE\.pt"):
            niwaki.models.load(f"ultralytics:{name}", checkpoint=str(tmp_path / "best.pt"))


@pytest.mark.parametrize("name", ["yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-obb", "yolov8n-cls"])
def test_networks_of_every_task_are_halved(ultralytics, name):
    loaded = niwaki.models.load(f"ultralytics:{name}.yaml", shape=(3, 64, 64))
    half = niwaki.Budget(keep=0.5, of="units")
    outcome = niwaki.compress(
        loaded.model,
        loaded.example,
        method=niwaki.methods.Random(rule="uniform"),
        budget=half,
        protect=loaded.protect,
    )
    assert type(outcome.model) is type(loaded.model) and outcome.receipt.passed
    after, before = (tensors_in(model(loaded.example)) for model in (outcome.model, loaded.model))
    assert [one.shape for one in after] == [one.shape for one in before]
    assert outcome.plan.promised["params"] < 0.45 * outcome.plan.promised["params_before"]


def test_without_the_package_its_name_and_licence_are_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(MissingExtraError, match=r"pip install ultralytics .*AGPL"):
        niwaki.models.load("ultralytics:yolov8n.yaml")


def test_nothing_is_fetched_or_printed_while_it_is_imported(monkeypatch, capsys):
    monkeypatch.setenv("YOLO_OFFLINE", "maybe")
    monkeypatch.delenv("YOLO_AUTOINSTALL", raising=False)
    with alone():
        assert os.environ["YOLO_OFFLINE"] == "true" and os.environ["YOLO_AUTOINSTALL"] == "false"
        print("made a settings file")
    assert os.environ["YOLO_OFFLINE"] == "maybe" and "YOLO_AUTOINSTALL" not in os.environ
    assert capsys.readouterr() == ("", "made a settings file\n")
