"""Networks of convolutions whose channels are sliced, padded, split, shared or resampled on the way."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.registry import case, reals

IMAGES = reals(2, 3, 8, 8)


class OptionABlock(nn.Module):
    """Two convolutions; the shortcut skips every other pixel and pads the missing channels with zeros."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.pad = (c_out - c_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad), "constant", 0)
        return F.relu(y + x)


@case(
    IMAGES,
    "integers",
    free={"conv1.weight:0": 0, "blocks.0.conv1.weight:0": 4, "blocks.1.conv2.weight:0": 0, "linear.weight:1": 0},
)
class OptionA(nn.Module):
    """The CIFAR residual network with parameter-free shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(OptionABlock(4, 4, 1), OptionABlock(4, 8, 2), OptionABlock(8, 12, 2))
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.avg_pool2d(x, x.size()[3]).view(x.size(0), -1))


@case(reals(2, 4, 16), free={"conv1.weight:0": 6, "conv2.weight:0": 8})
class Conv1d(nn.Module):
    """One-dimensional convolutions with dilation, over a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm1d(6)
        self.conv2 = nn.Conv1d(6, 8, 3, padding=2, dilation=2)
        self.prelu = nn.PReLU(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.conv2(F.max_pool1d(self.bn1(self.conv1(x)).relu(), 2)))
        return self.head(x.transpose(1, 2)).log_softmax(dim=-1)


@case(reals(2, 2, 4, 6, 6), free={"conv1.weight:0": 6, "depthwise.weight:0": 6, "fc.weight:1": 8})
class Conv3d(nn.Module):
    """Volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(2, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm3d(6)
        self.depthwise = nn.Conv3d(6, 6, (1, 3, 3), padding=(0, 1, 1), groups=6)
        self.conv2 = nn.Conv3d(6, 8, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(x))), (1, 2, 2))
        x = F.adaptive_avg_pool3d(F.softplus(self.conv2(self.depthwise(x))), 1)
        return self.fc(x.view(x.shape[0], -1))


@case(IMAGES, free={"down1.weight:0": 6, "down2.weight:0": 10, "middle.weight:0": 8, "merge.weight:0": 6})
class UNet(nn.Module):
    """Down, up by interpolation, joined with the skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 6, 3, padding=1)
        self.down2 = nn.Conv2d(6, 10, 3, padding=1)
        self.middle = nn.Conv2d(10, 8, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.merge = nn.Conv2d(6 + 8, 6, 3, padding=1, padding_mode="reflect")
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.down1(x))
        x = F.relu(self.middle(F.max_pool2d(F.relu(self.down2(first)), 2)))
        x = F.relu(self.merge(torch.cat((first, self.up(x)), 1)))
        return F.interpolate(self.out(x), size=(16, 16), mode="nearest")


@case(IMAGES, free={"one.weight:0": 4, "five1.weight:0": 3, "five2.weight:0": 5, "pool.weight:0": 4})
class Inception(nn.Module):
    """Four branches of different depth, joined; one of them starts with a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 1)
        self.five1, self.five2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 5, padding=2)
        self.pool = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4 + 5 + 4 + 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        branches = [self.one(x), self.five2(F.relu(self.five1(x))), self.pool(pooled), x]
        return self.fc(F.relu(torch.cat(branches, 1)).mean((2, 3)))


@case(
    IMAGES,
    "inexact",
    free={"stem.weight:0": 0, "gamma:0": 0, "widen.weight:0": 16, "narrow.weight:1": 16, "norm.weight:0": 0},
)
class LayerScale(nn.Module):
    """A ConvNeXt block: depthwise 7x7, channels last, layer norm, two linear layers, a scale per channel, shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.widen, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.ones(8) * 1e-6)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.narrow(F.gelu(self.widen(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(x.mean([-2, -1]))


@case(IMAGES, "shared", free={"conv.weight:0": 0, "stem.weight:0": 0, "head.weight:0": 6})
class SharedWeight(nn.Module):
    """One convolution used twice in a row, and one head used at two scales (RetinaNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 6, 1)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = F.relu(self.conv(F.relu(self.conv(F.relu(self.stem(x))))))
        coarse = F.max_pool2d(fine, 2)
        return self.out(F.relu(self.head(fine))), self.out(F.relu(self.head(coarse)))


@case(IMAGES, "integers", free={"stem.weight:0": 0, "inner.weight:0": 4, "merge.weight:0": 6})
class CrossStage(nn.Module):
    """Half of the channels pass through a block, the other half beside it, by slices (CSP)."""

    def __init__(self) -> None:
        super().__init__()
        self.half = 5
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.inner = nn.Conv2d(5, 4, 3, padding=1)
        self.merge = nn.Conv2d(9, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.mish(self.stem(x))
        x = torch.cat((self.inner(x[:, : self.half]), x[:, self.half :]), dim=1)
        return self.fc(F.mish(self.merge(x)).mean((2, 3)))


@case(IMAGES, "integers", free={"primary.weight:0": 0, "reduce.weight:0": 4})
class Ghost(nn.Module):
    """Half of the features computed, the other half derived by a depthwise convolution, cut to the asked width."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = 9
        self.primary = nn.Conv2d(3, 5, 1)
        self.cheap = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.reduce = nn.Conv2d(9, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.primary(x))
        x = torch.cat([first, F.relu(self.cheap(first))], dim=1)[:, : self.out_channels, :, :]
        return self.fc(F.relu(self.reduce(x)).mean((2, 3)))


@case(IMAGES, free={"before.weight:0": 6, "after.weight:0": 5})
class ChannelConvolution(nn.Module):
    """Efficient channel attention: a convolution slides along the channels, so they must all stay in order."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 6, 3, padding=1)
        self.stem = nn.Conv2d(6, 8, 3, padding=1)
        self.slide = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.after = nn.Conv2d(8, 5, 1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(F.relu(self.before(x))))
        gate = x.mean((2, 3), keepdim=True).squeeze(-1).transpose(-1, -2)
        gate = self.slide(gate).transpose(-1, -2).unsqueeze(-1).sigmoid()
        return self.fc(F.relu(self.after(x * gate)).mean((2, 3)))


@case(IMAGES, "inexact", free={"inner.weight:0": 4, "mix.weight:1": 0})
class SpatialAttention(nn.Module):
    """A gate per pixel from the mean and the maximum over channels (CBAM): both change when a channel goes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 4, 1)
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.gate = nn.Conv2d(2, 1, 3, padding=1)
        self.mix = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(F.relu(self.inner(x)))
        statistics = torch.cat([x.mean(1, keepdim=True), x.max(dim=1, keepdim=True)[0]], dim=1)
        return self.mix(x * torch.sigmoid(self.gate(statistics)))


@case(reals(2, 4, 4, 3), "inexact", free={"widen.weight:0": 12, "grn_gamma:3": 12})
class GlobalResponse(nn.Module):
    """ConvNeXt V2's response norm: each channel divided by the mean norm of all."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(3, 12), nn.Linear(12, 5)
        self.grn_gamma = nn.Parameter(torch.zeros(1, 1, 1, 12))
        self.grn_beta = nn.Parameter(torch.zeros(1, 1, 1, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.widen(x))
        size = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        share = size / (size.mean(dim=-1, keepdim=True) + 1e-6)
        return self.narrow(self.grn_gamma * (x * share) + self.grn_beta + x)


@case(IMAGES, free={"conv.weight:0": 0, "fc.weight:1": 0})
class Maxout(nn.Module):
    """The larger of two channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, c, h, w = x.shape
        return self.fc(x.view(b, c // 2, 2, h, w).amax(2).mean((2, 3)))


@case(IMAGES, free={"scaled:0": 8, "fc.weight:1": 8}, fixed=("scaled:2", "scaled:3"))
class ComputedWeight(nn.Module):
    """A convolution whose weight is a product of parameters, and a constant mask over its taps."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.gain = nn.Parameter(torch.ones(8, 1, 1, 1))
        self.register_buffer("taps", torch.ones(1, 1, 3, 3).tril())
        self.bias = nn.Parameter(torch.zeros(8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.scaled * self.gain * self.taps, self.bias, padding=1)
        return self.fc(x.relu().mean((2, 3)))


@case(
    IMAGES,
    free={"conv1.parametrizations.weight.original0:0": 6, "conv3.weight:0": 5},
    fixed=("conv1.parametrizations.weight.original1:2", "conv1.parametrizations.weight.original1:1"),
)
class WeightNorm(nn.Module):
    """A parametrised weight: its norm runs over the input channels; one that is gone adds as much as a zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3, padding=1))
        self.conv2 = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1))
        self.conv3 = nn.Conv2d(6, 5, 1)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))).mean((2, 3)))


@case(IMAGES, free={"conv.weight:0": 6, "mix.weight:0": 5})
class Unfolded(nn.Module):
    """A convolution written by hand: im2col, then a linear layer over channels x taps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.mix = nn.Linear(6 * 9, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(F.relu(self.conv(x)), kernel_size=3, padding=1)  # [batch, channels * taps, pixels]
        return self.out(F.relu(self.mix(columns.transpose(1, 2))))


@case(IMAGES, free={"body.weight:0": 8, "left.weight:0": 4})
class Unused(nn.Module):
    """Parameters that the forward never reads, and a result that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 4, 1)
        self.auxiliary = nn.Conv2d(8, 7, 1)
        self.dead = nn.Linear(8, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(x))
        self.auxiliary(x)
        return self.fc(F.relu(self.left(x)).mean((2, 3)))
