"""Detectors of torchvision behind the protocol: their own losses, their own boxes, nothing changed besides."""

import pytest
import torch
from torch import nn

from niwaki import models
from niwaki.boxes import Boxes
from niwaki.errors import InputError
from niwaki.tasks import Detector

SMALL = "num_classes=3&min_size=64&max_size=64"
SOURCES = {
    "torchvision:ssdlite320_mobilenet_v3_large?num_classes=3": {"bbox_regression", "classification"},
    f"torchvision:fasterrcnn_mobilenet_v3_large_320_fpn?{SMALL}": {
        "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg",
    },
}  # fmt: skip
TARGETS = [Boxes(torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([1])), Boxes.none()]


@pytest.mark.parametrize("source", SOURCES, ids=["one stage", "two stages"])
def test_losses_and_boxes_are_torchvisions_own(source):
    loaded = models.load(source, shape=(3, 64, 64))
    model, detector = loaded.model, loaded.detector
    assert isinstance(detector, Detector) and detector.classes == 2 and detector.fit == "letterbox"
    pictures = torch.rand(2, 3, 64, 64)
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    parts = detector.losses(model, pictures, TARGETS)
    assert set(parts) == SOURCES[source] and [module.training for module in model.modules()] == modes
    loss = torch.stack(list(parts.values())).sum()
    loss.backward()
    assert loss.isfinite() and any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    before = model(list(pictures))
    found = detector.found(model, pictures, confidence=0.0, overlap=0.5, most=7)
    assert [len(one) for one in found] == [7, 7] and all((one.scores.diff() <= 0).all() for one in found)
    assert all(one.labels.min() >= 0 and one.labels.max() <= 1 for one in found)
    again = model(list(pictures))
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(before, again, strict=True))  # its limits are back
    surest = before[0]
    if len(surest["scores"]):  # by its own limits it finds the surest one, too
        torch.testing.assert_close(found[0].corners[0], surest["boxes"][0])
        assert found[0].labels[0] == surest["labels"][0] - 1
    assert all(len(one) == 0 for one in detector.found(model, pictures, confidence=1.0, overlap=0.5, most=7))


def test_labels_begin_behind_the_background():
    model = models.load("torchvision:ssdlite320_mobilenet_v3_large?num_classes=3", shape=(3, 64, 64))
    seen = []
    handle = model.model.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    assert model.detector is not None
    model.detector.losses(model.model, torch.rand(2, 3, 64, 64), TARGETS)
    handle.remove()
    assert [one["labels"].tolist() for one in seen[0]] == [[2], []]
    with pytest.raises(InputError, match="number classes from 0"):
        model.detector.losses(
            model.model, torch.rand(2, 3, 64, 64), [TARGETS[0], Boxes(torch.ones(1, 4), torch.tensor([2]))]
        )


def test_networks_that_are_no_such_detectors():
    assert models.load("torchvision:resnet18").detector is None
    detector = models.load("torchvision:ssdlite320_mobilenet_v3_large?num_classes=3", shape=(3, 64, 64)).detector
    assert detector is not None
    for call in (
        lambda: detector.losses(nn.Identity(), torch.rand(2, 3, 8, 8), TARGETS),
        lambda: detector.found(nn.Identity(), torch.rand(2, 3, 8, 8), confidence=0.1, overlap=0.5, most=7),
    ):
        with pytest.raises(InputError, match="a Identity"):
            call()
