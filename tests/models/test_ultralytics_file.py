"""Files of ultralytics are read without running them; the package itself is not needed for that."""

import os
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from niwaki.errors import FileDamagedError, InputError
from niwaki.models.ultralytics_file import read_pickled, refuse_unsafe

YAML = {"nc": 2, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]]}


@pytest.fixture
def package(monkeypatch):
    """A package of that name whose class is pickled as the real one's."""
    tasks = types.ModuleType("ultralytics.nn.tasks")

    class DetectionModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
            self.register_buffer("passing", torch.ones(1), persistent=False)
            self.yaml, self.names = dict(YAML), {0: "cat", 1: "dog"}
            self.args = {"imgsz": 64, "box": 7.5, "data": Path("/somewhere")}

    DetectionModel.__module__, DetectionModel.__qualname__ = "ultralytics.nn.tasks", "DetectionModel"
    tasks.DetectionModel = DetectionModel
    for name in ("ultralytics", "ultralytics.nn"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "ultralytics.nn.tasks", tasks)
    return DetectionModel


class Bomb:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_structure_names_and_tensors_are_read(package, tmp_path):
    model = package().half()
    torch.save({"ema": None, "model": model, "date": "today", "train_args": {"lr0": 0.01}}, tmp_path / "a.pt")
    sys.modules.pop("ultralytics.nn.tasks")  # nothing of it is imported to read
    found = read_pickled(tmp_path / "a.pt")
    assert found.yaml == YAML and found.names == {0: "cat", 1: "dog"}
    assert found.settings == {"imgsz": 64, "box": 7.5}
    assert found.state.keys() == model.state_dict().keys()
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in found.state.items())


def test_the_averaged_network_comes_first(package, tmp_path):
    model, average = package(), package()
    torch.save({"ema": average, "model": model}, tmp_path / "a.pt")
    found = read_pickled(tmp_path / "a.pt")
    assert found.state["model.0.weight"].equal(average.model[0].weight)


def test_a_pickle_with_a_command_in_it_is_refused_and_not_run(package, tmp_path):
    marker = tmp_path / "was_run"
    model = package()
    model.yaml["extra"] = Bomb(os.system, f"touch {marker}")
    torch.save({"model": model}, tmp_path / "a.pt")
    with pytest.raises(FileDamagedError, match=r"names (posix|nt)\.system.*nothing of it was run") as caught:
        read_pickled(tmp_path / "a.pt")
    assert not marker.exists() and caught.value.exit_code == 2
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert marker.exists(), "opened the usual way it is run"


def test_functions_of_the_package_are_not_run_either(package, tmp_path, monkeypatch):
    marker = tmp_path / "was_run"
    inner = types.ModuleType("ultralytics.evil")
    inner.run = lambda: marker.write_text("")
    inner.run.__module__, inner.run.__qualname__ = "ultralytics.evil", "run"
    monkeypatch.setitem(sys.modules, "ultralytics.evil", inner)
    torch.save({"model": Bomb(inner.run)}, tmp_path / "a.pt")
    with pytest.raises(FileDamagedError, match="no network of ultralytics inside"):
        read_pickled(tmp_path / "a.pt")
    model = package()
    model.yaml["extra"] = Bomb(inner.run)
    torch.save({"model": model}, tmp_path / "b.pt")
    with pytest.raises(FileDamagedError, match="a structure that holds a run"):
        read_pickled(tmp_path / "b.pt")
    assert not marker.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert marker.exists()


def test_damaged_files(package, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": package()}, path)
    whole = path.read_bytes()
    with pytest.raises(InputError, match="no such file"):
        read_pickled(tmp_path / "b.pt")
    for content in (whole[: len(whole) // 2], b"", b"not a zip file", whole[:200] + b"\0" * 400 + whole[600:]):
        path.write_bytes(content)
        with pytest.raises(FileDamagedError) as caught:
            read_pickled(path)
        assert str(path) in str(caught.value) and caught.value.do


def test_every_cut_pickle_is_told(package, tmp_path):
    torch.save({"model": package()}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        entries = {name: whole.read(name) for name in whole.namelist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    for share in (0.1, 0.5, 0.9, 0.99):
        with zipfile.ZipFile(tmp_path / "cut.pt", "w") as cut:
            for name, content in entries.items():
                cut.writestr(name, content[: int(share * len(content))] if name == pickled else content)
        with pytest.raises(FileDamagedError):
            read_pickled(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    "content, found",
    [
        ({"weight": torch.zeros(1)}, r"inside \(weight\)"),
        ([1, 2], r"inside \(list\)"),
        ({"model": {"a": torch.zeros(1)}}, r"inside \(model\)"),
    ],
)
def test_other_checkpoints_hold_no_network(tmp_path, content, found):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FileDamagedError, match=found):
        read_pickled(tmp_path / "a.pt")


def test_odd_networks(package, tmp_path):
    for spoil, found in (
        (lambda model: model._modules.update(odd=3), "odd is no module"),
        (lambda model: model._parameters.update(odd="x"), "odd is no tensor"),
        (lambda model: model.__dict__.pop("yaml"), "no network"),
        (lambda model: model._modules.update(odd=model), "is no module"),  # for ever
    ):
        model = package()
        spoil(model)
        torch.save({"model": model}, tmp_path / "a.pt")
        with pytest.raises(FileDamagedError, match=found):
            read_pickled(tmp_path / "a.pt")


class Tasks:
    """What the package's builder finds names in."""

    Conv, Detect = nn.Conv2d, nn.Linear

    @staticmethod
    def torch_safe_load(weight: str) -> None:
        """A function that the builder would call, were it named as a layer."""


@pytest.mark.parametrize(
    "change, found",
    [
        ({"activation": "__import__('os').system('touch x')"}, "would be evaluated"),
        ({"activation": "nn.SiLU(__import__('os').system('touch x'))"}, "would be evaluated"),
        ({"activation": 3}, "would be evaluated"),
        ({"head": [[-1, 1, "torch_safe_load", ["a.pt"]]]}, "a layer 'torch_safe_load', which is none"),
        ({"head": [[-1, 1, "nn.init.zeros_", []]]}, "which is none"),
        ({"head": [[-1, 1, "TorchVision", [8, "resnet18"]]]}, "a layer 'TorchVision'"),
        ({"head": [[-1, 1, "Missing", []]]}, "a layer 'Missing'"),
        ({"head": ["Detect"]}, "which is none"),
        ({"head": []}, "a structure without head"),
        ({"backbone": None}, "a structure without backbone"),
    ],
)
def test_structures_that_would_run_something_are_refused(change, found):
    with pytest.raises(FileDamagedError, match=found):
        refuse_unsafe({**YAML, **change}, Tasks, Path("a.pt"))


@pytest.mark.parametrize("words", ["nn.SiLU()", "torch.nn.LeakyReLU(0.1, inplace=True)"])
def test_plain_structures_pass(words):
    refuse_unsafe({**YAML, "activation": words}, Tasks, Path("a.pt"))
    rows = [*YAML["backbone"], [-1, 1, "nn.Upsample", [None, 2, "nearest"]]]
    refuse_unsafe({**YAML, "backbone": rows}, Tasks, Path("a.pt"))
