"""What the papers say of YOLOv4 and YOLOv8m in numbers, found in the networks themselves."""

import copy
import importlib.util
import re
from pathlib import Path

import pytest
from torch import nn

import niwaki
from niwaki.budgets import groups_by_scale, scaled_layers
from niwaki.methods import GroupChannelPruning, Job, YOLOv8CWD

CFGS = Path(__file__).parents[2] / "benchmarks" / "darknet_cfgs.py"
IGNORED = (107, 117, 127)
"""Layers before an upsampling or a pyramid pooling, which the authors' code leaves whole."""


def number(name):
    found = re.search(r"layers\.(\d+)\.", name)
    assert found
    return int(found[1])


def test_yolov4_has_the_published_channels_groups_and_places(tmp_path):
    spec = importlib.util.spec_from_file_location("darknet_cfgs", CFGS)
    assert spec is not None and spec.loader is not None
    darknet_cfgs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(darknet_cfgs)
    file = tmp_path / "yolov4.cfg"
    file.write_text(darknet_cfgs.yolov4(416, classes=20))
    loaded = niwaki.models.load(f"darknet:{file}")
    graph = niwaki.trace(loaded.model, loaded.example)
    layers = scaled_layers(graph, loaded.model)
    assert (graph.params, graph.macs) == (64_040_001, 29_834_335_232)  # 59.67 GFLOPs
    own = [layer for layer in layers if number(layer.name) not in IGNORED]
    assert (len(layers), len(own), sum(layer.units.size for layer in own)) == (107, 104, 32_256)
    ends = (56, 86, 117, 137, 162)
    channels = [
        sum(layer.units.size for layer in own if start <= number(layer.name) < end)
        for start, end in zip((0, *ends), ends, strict=False)
    ]
    assert channels == [4608, 5376, 11_264, 3072, 7936]
    ours = [[number(name) for name in group.scales] for group in groups_by_scale(graph, layers)]
    theirs = {number(layer.name): sum(end <= number(layer.name) for end in ends) for layer in layers}
    assert sum(theirs[n] != at for at, group in enumerate(ours) for n in group) == 3  # 55, 117 and 137, at the borders
    paths = [tuple(int(path.rpartition(".")[2]) for path in part) for part in GroupChannelPruning().places(graph)]
    assert paths == [(10, 23, 54, 85), (117, 159), (127, 137, 148)]


def test_yolov8m_halved_has_the_size_of_every_layer_halved():
    pytest.importorskip("ultralytics")
    loaded = niwaki.models.load("ultralytics:yolov8m.yaml?nc=10")
    graph = niwaki.trace(loaded.model, loaded.example, protect=loaded.protect)
    assert round(graph.params / 1e6, 3) == 25.862
    fused = copy.deepcopy(loaded.model).fuse(verbose=False)  # by the package: batch norms become biases
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    count = sum(parameter.numel() for parameter in fused.parameters())
    assert count == graph.params - 16_560 == 25_845_550  # the page: 25.845 M, the rest cut off
    everything = (niwaki.Budget(keep=1.0),)
    method = YOLOv8CWD(share=0.5)
    job = Job(loaded.model, loaded.example, everything)
    plan = method.choose(graph, loaded.model, None, job)(graph, everything)
    assert (
        round(plan.promised["params"] / 1e6, 2) == 6.48
    )  # the page: 6.48; coupled layers left whole would be 10 to 13
    assert method.losses(graph)[0].taps == ("model.12", "model.15", "model.18", "model.21")
