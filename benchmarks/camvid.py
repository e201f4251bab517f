"""CamVid as three tasks on one network: classes, boundaries, distances to the next boundary."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import ROOT
from torch import Tensor, nn
from torch.nn import functional

import niwaki
from niwaki.tasks import Boundary, Depth, Segmentation

DATA = ROOT.parent / "shared" / "data"
CLASSES, VOID = 11, 255
FAR = 32.0
"""Pixels at which distances to a boundary end."""


class Decoding(nn.Module):
    """From features of three sizes to one map of the picture's size."""

    def __init__(self, widths: tuple[int, ...], out: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            convolved(deep + shallow, shallow) for deep, shallow in zip(widths[::-1], widths[-2::-1], strict=False)
        )
        self.last = nn.Conv2d(widths[0], out, 1)

    def forward(self, features: list[Tensor], size: torch.Size) -> Tensor:
        x = features[-1]
        for step, side in zip(self.steps, features[-2::-1], strict=True):
            x = step(torch.cat([functional.interpolate(x, side.shape[2:]), side], 1))
        return self.last(functional.interpolate(x, size))


class Street(nn.Module):
    """A shared encoder with shortcuts, and a decoder for each task."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.stem = convolved(3, width, stride=2)
        stages, last = [], width
        for number, wide in enumerate(widths):
            stages.append(nn.Sequential(Residual(last, wide, stride=1 if number == 0 else 2), Residual(wide, wide)))
            last = wide
        self.stages = nn.ModuleList(stages)
        self.decoders = nn.ModuleDict(
            {name: Decoding(widths, out) for name, out in (("segmentation", CLASSES), ("boundary", 1), ("distance", 1))}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size, x, features = x.shape[2:], self.stem(x - 0.5), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        found = {name: decoder(features, size) for name, decoder in self.decoders.items()}
        return {**found, "distance": functional.softplus(found["distance"])}


class Residual(nn.Module):
    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.one = convolved(into, out, stride=stride)
        self.two = nn.Sequential(nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        same = into == out and stride == 1
        self.side = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(into, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.two(self.one(x)) + self.side(x))


def convolved(into: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


def camvid(height: int, seed: int = 0) -> niwaki.data.samples.SampleSplits:
    """CamVid at 4:3, this high: pictures, classes (255 is none), boundaries between them, and distances to these.

    A tenth of the training pictures is split off by `seed` for validation; the test pictures are the publisher's.
    """
    file = ROOT / "runs" / f"camvid-{height}.npz"
    if not file.exists():
        arrays = prepared(DATA / "camvid", height)
        file.parent.mkdir(exist_ok=True)
        aside = file.with_suffix(".part.npz")
        np.savez(aside, **arrays)
        aside.replace(file)
    with np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    count = int(arrays.pop("train"))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = count // 10
    parts = (order[held:].sort().values, order[:held].sort().values, torch.arange(count, len(arrays["x"])))
    splits = [niwaki.data.Samples(arrays, index) for index in parts]
    return niwaki.data.SampleSplits(*splits, record={"source": "camvid", "height": height, "seed": seed})


def prepared(folder: Path, height: int) -> dict[str, np.ndarray]:
    """All pictures, those of the training split first, and how many these are."""
    from PIL import Image
    from scipy.ndimage import distance_transform_edt

    size = (height * 4 // 3, height)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("x", "segmentation", "boundary", "distance")}
    for split in ("train", "test"):
        for path in sorted((folder / split).glob("*.webp")):
            with Image.open(path) as picture:
                found["x"].append(np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)))
            with Image.open(folder / f"{split}annot" / f"{path.stem}.png") as mask:
                classes = np.asarray(mask.resize(size, Image.Resampling.NEAREST))
            edge = np.zeros(classes.shape, bool)
            edge[:, :-1] |= classes[:, :-1] != classes[:, 1:]
            edge[:-1] |= classes[:-1] != classes[1:]
            far = distance_transform_edt(~edge) if edge.any() else np.full(classes.shape, FAR)
            found["segmentation"].append(np.where(classes >= CLASSES, VOID, classes).astype(np.uint8))
            found["boundary"].append(edge.astype(np.uint8))
            found["distance"].append(np.minimum(far, FAR).astype(np.float32))
        if split == "train":
            count = len(found["x"])
    arrays = {name: np.stack(listed) for name, listed in found.items()}
    return {**arrays, "x": arrays["x"].transpose(0, 3, 1, 2), "train": np.array(count)}


def heads() -> tuple[Any, ...]:
    return Segmentation(CLASSES), Boundary(positive=3.0), Depth(name="distance", weight=0.2)
