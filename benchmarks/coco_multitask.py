"""COCO256 as two tasks on one network: boxes, by the trained YOLO-Fastest 1.1-XL, and classes of pixels, by a decoder
on its features."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectors import DATA, NETWORKS, said, splits_of
from rows import ROOT
from torch import Tensor, nn
from torch.nn import functional

import niwaki
from niwaki.models.darknet_net import Yolo
from niwaki.tasks import Custom, Detection, Joined, Multitask, Segmentation
from niwaki.train import Checkpoints, Recovery

MASKS = DATA / "coco256" / "semantic" / "masks"
TAPS = (57, 128, 119)
"""Layers of the cfg that the decoder reads, at an eighth, a 16th and a 32nd of the frame: the last of the backbone's of
that size, and the two that the detector's own heads read."""
WIDTH = 48
QUARTER = 4
"""Pixels of the frame, on a side, for one of a mask."""
THINGS, STUFF = (1, 2, 10, 16, 26, 34, 44, 52, 62, 72, 78, 84), 92
"""The first of COCO's numbers of each of its twelve kinds of things (person, vehicle, ..., indoor), and of stuff."""
LEAST, VOID = 8, 255
"""Training pictures that a class has to be on; the others, and pictures without a mask, are void."""


class Decoder(nn.Module):
    """From features of three sizes to classes of pixels, at a quarter of the frame."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.sides = nn.ModuleList(convolved(width, WIDTH, 1) for width in widths)
        self.mix = convolved(len(widths) * WIDTH, WIDTH, 3)
        self.last = nn.Conv2d(WIDTH, classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        height, width = features[0].shape[2:]
        sides = [side(x) for side, x in zip(self.sides, features, strict=True)]
        x = self.mix(torch.cat([functional.interpolate(x, (height, width)) for x in sides], 1))
        return functional.interpolate(self.last(x), (2 * height, 2 * width), mode="bilinear")


def convolved(into: int, out: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, size, padding=size // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


class Both(nn.Module):
    """A network of darknet, and a decoder on its features."""

    def __init__(self, network: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.network, self.decoder = network, decoder

    def forward(self, x: Tensor) -> dict[str, Any]:
        heads, features = taken(self.network, x)
        return {"detection": heads, "segmentation": self.decoder(features)}


def taken(network: Any, x: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """What its [yolo] layers put out, and the tapped features."""
    outputs, heads = {-1: x}, []
    for at, (layer, wire) in enumerate(zip(network.layers, network.wiring, strict=True)):
        outputs[at] = layer(*(outputs[i] for i in wire.reads))
        if isinstance(layer, Yolo):
            heads.append(outputs[at])
    return tuple(heads), [outputs[at] for at in TAPS]


def coco(options: argparse.Namespace) -> tuple[Any, Joined]:
    """The trained detector, and the two tasks on the same pictures, unchanged: every run of the network is for both."""
    splits = splits_of("coco", 0)
    source = NETWORKS["yolo-fastest-xl"].format(data=DATA)
    weights = Path(source.removeprefix("darknet:")).with_suffix(".weights")
    loaded = niwaki.models.load(source, checkpoint=str(weights))
    boxes = Detection(splits, loaded.detector, size=options.size, fit="squash", batch=options.batch, augment=None)
    raw = {name: read(boxes, getattr(splits, name)) for name in ("train", "val", "test")}
    number = numbered(raw["train"]["segmentation"])
    samples = {}
    for name, arrays in raw.items():
        arrays["segmentation"] = number[arrays["segmentation"]]
        samples[name] = niwaki.data.Samples(arrays, torch.arange(len(arrays["x"])))
    classes = int(number[number != VOID].max()) + 1
    masks = Multitask(niwaki.data.SampleSplits(**samples), (Segmentation(classes),), batch=options.batch)
    return loaded, Joined({"detection": boxes, "segmentation": masks}, weights={"segmentation": options.masks})


def numbered(masks: np.ndarray) -> np.ndarray:
    """For each of COCO's numbers the class it is learned as, by training masks: things by kind, stuff as it is."""
    kind = np.arange(VOID + 1)
    kind[:STUFF] = np.searchsorted(THINGS, kind[:STUFF], side="right")  # 0 stays: nothing known
    on = np.zeros(VOID + 1, int)
    for mask in masks:
        on[np.unique(kind[mask])] += 1
    classes = [label for label in np.flatnonzero(on >= LEAST) if label not in (0, VOID)]
    found = np.full(VOID + 1, VOID, np.uint8)
    found[classes] = np.arange(len(classes))
    return found[kind]


def read(boxes: Detection, pictures: Any) -> dict[str, np.ndarray]:
    """Pictures in the frame of the detection, and their masks at a quarter of it."""
    from PIL import Image

    frame, found = boxes.frame, []
    masks = np.full((len(pictures), frame.height // QUARTER, frame.width // QUARTER), VOID, np.uint8)
    for number in range(len(pictures)):
        found.append(frame.framed(pictures, number)[0].numpy())
        path = pictures[number].path
        file = MASKS / path.parent.name / f"{path.stem}.png"
        if file.is_file():
            with Image.open(file) as mask:
                masks[number] = np.asarray(mask.resize(masks.shape[:0:-1], Image.Resampling.NEAREST))
    return {"x": np.stack(found), "segmentation": masks}


def trained(loaded: Any, task: Joined, options: argparse.Namespace, seed: int) -> nn.Module:
    """The detector as it is, and a decoder trained on its features: its weights and statistics stay."""
    network, masks = loaded.model.eval(), task.tasks["segmentation"]
    assert isinstance(masks, Multitask)
    head, batches = masks.heads[0], []
    with torch.no_grad():
        for x, targets in masks.splits.train.batches(options.batch):
            for flipped in (False, True):
                x, target = (x.flip(-1), targets[head.name].flip(-1)) if flipped else (x, targets[head.name])
                batches.append((taken(network, x)[1], target))
    torch.manual_seed(seed)
    decoder = Decoder([feature.shape[1] for feature in batches[0][0]], masks.heads[0].classes)
    on_features = Custom(
        loss=lambda net, batch: head.loss(net(batch[0]), batch[1]), metric=lambda net, given: 0.0,
        splits={"train": batches, "test": batches[:1]},
    )  # fmt: skip
    folder = ROOT / "runs" / f"pagcp-coco-{options.size}-{options.epochs}-{seed}"
    how = Recovery(
        epochs=options.epochs, lr=options.dense_lr, seed=seed, limit=options.steps or None, folder=str(folder),
        checkpoints=Checkpoints(),
    )  # fmt: skip
    how(decoder.train(), on_features, resume=True, progress=said(folder.name))
    return Both(network, decoder).eval()


def compared(task: Joined, figures: dict[str, float]) -> Joined:
    """The task with the uncut network's figures as its reference."""
    return replace(
        task, reference={"detection": figures["detection_AP50"], "segmentation": figures["segmentation_miou"]}
    )
