"""Pieces of object detectors: boxes read from bins, cached grids, heads of their own for training, sampling at learned
places."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.registry import case, reals

IMAGES = reals(2, 3, 8, 8)


class Bins(nn.Module):
    """The mean of a distribution over bins, for each of the four sides of a box."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.c1, self.conv = bins, nn.Conv2d(bins, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.c1, a).transpose(2, 1).softmax(1)).view(b, 4, a)


@case(
    IMAGES,
    "integers",
    "inexact",
    "grid",
    free={"stem.weight:0": 6, "down.weight:0": 10, "boxes.0.weight:0": 8, "boxes.1.weight:1": 10},
    fixed=("classes.0.weight:0",),
)
class BinnedBoxes(nn.Module):
    """Two scales joined by a view whose channels are four times an integer; strides and the grid are plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.boxes = nn.ModuleList(nn.Conv2d(c, 4 * 8, 1) for c in (6, 10))
        self.classes = nn.ModuleList(nn.Conv2d(c, 2, 1) for c in (6, 10))
        self.reg_max, self.nc, self.bins = 8, 2, Bins(8)
        self.stride = torch.tensor([1.0, 2.0])
        self.shape, self.places, self.strides = None, torch.empty(0), torch.empty(0)

    def grid(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        places, strides = [], []
        for x, stride in zip(features, self.stride, strict=True):
            h, w = x.shape[2:]
            sy, sx = torch.arange(h).to(x) + 0.5, torch.arange(w).to(x) + 0.5
            sy, sx = torch.meshgrid(sy, sx, indexing="ij")
            places.append(torch.stack((sx, sy), -1).view(-1, 2))
            strides.append(torch.full((h * w, 1), float(stride), dtype=x.dtype, device=x.device))
        return torch.cat(places).t(), torch.cat(strides).t()

    def forward(self, x: Tensor) -> Tensor:
        features = [F.silu(self.stem(x))]
        features.append(F.silu(self.down(features[0])))
        b = x.shape[0]
        boxes = torch.cat([m(f).view(b, self.reg_max * 4, -1) for m, f in zip(self.boxes, features, strict=True)], -1)
        classes = torch.cat([m(f).view(b, self.nc, -1) for m, f in zip(self.classes, features, strict=True)], -1)
        if self.shape != features[0].shape:
            self.places, self.strides = self.grid(features)
            self.shape = features[0].shape
        one, other = self.bins(boxes).chunk(2, 1)
        corners = torch.cat((self.places - one, self.places + other), 1) * self.strides
        return torch.cat((corners, classes.sigmoid()), 1)


@case(
    IMAGES,
    free={"stem.weight:0": 6, "many.0.weight:0": 5, "one.0.weight:0": 5},
    fixed=("one.1.weight:0", "many.1.weight:0"),
)
class HeadForTraining(nn.Module):
    """Two heads run, one of which is only returned while training: its width is no less an output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.one, self.many = (nn.Sequential(nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.silu(self.stem(x))
        one, many = (torch.cat([head(x).flatten(2), head(x).flatten(2)], 2) for head in (self.one, self.many))
        return (one, many) if self.training else one.sigmoid()


@case(
    reals(1, 9, 16),
    "integers",
    "grid",
    "inexact",
    free={"value.weight:0": 16, "places.weight:0": 0, "weights.weight:0": 0, "out.weight:1": 16},
    fixed=("out.weight:0", "value.weight:1"),
)
class DeformableAttention(nn.Module):
    """Heads read a small picture at places that each query names, and weigh what they read: heads go whole."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.points, self.width = 4, 3, 16
        self.value, self.out = nn.Linear(16, 16), nn.Linear(16, 5)
        self.places, self.weights = nn.Linear(16, 4 * 3 * 2), nn.Linear(16, 4 * 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        side = int(n**0.5)
        value = self.value(x).view(b, n, self.heads, self.width // self.heads).permute(0, 2, 3, 1).flatten(0, 1)
        places = self.places(x).view(b, n, self.heads, self.points, 2).permute(0, 2, 1, 3, 4).flatten(0, 1)
        weights = self.weights(x).view(b, n, self.heads, self.points).softmax(-1).permute(0, 2, 1, 3)
        read = F.grid_sample(value.unflatten(-1, (side, side)), places.sigmoid() * 2 - 1, align_corners=False)
        read = (read * weights.reshape(b * self.heads, 1, n, self.points)).sum(-1)
        return self.out(read.view(b, self.width, n).transpose(1, 2))
