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
