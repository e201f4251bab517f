"""Networks of convolutions: the couplings of image classifiers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.registry import case, reals

IMAGES = reals(2, 3, 8, 8)


def conv_bn(c_in: int, c_out: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


@case(
    IMAGES,
    free={"conv1.weight:0": 8, "bn1.running_mean:0": 8, "conv2.weight:0": 12, "fc.weight:1": 12},
    fixed=("conv1.weight:1", "fc.weight:0", "fc.bias:0"),
)
class Chain(nn.Module):
    """Convolution, batch norm, activation, twice, then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.hardswish(self.bn2(self.conv2(x))), 2)
        return self.fc(self.dropout(x.mean((2, 3))))


@case(
    IMAGES,
    free={"stem.0.weight:0": 8, "conv1.weight:0": 6, "conv2.weight:0": 8, "down.0.weight:0": 10, "fc.weight:1": 10},
)
class ResidualAdd(nn.Module):
    """An identity shortcut and a projected one, with batch norms (ResNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 10, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(10)
        self.down = nn.Sequential(nn.Conv2d(8, 10, 1, stride=2, bias=False), nn.BatchNorm2d(10))
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(y)))
        x = F.relu(self.bn3(self.conv3(x)) + self.down(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@case(IMAGES, free={"stem.weight:0": 6, "layers.0.1.weight:0": 4, "layers.2.1.weight:0": 4, "transition.weight:0": 8})
class DenseConcat(nn.Module):
    """Every layer reads the concatenation of all before it (DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(6 + 4 * i), nn.Conv2d(6 + 4 * i, 4, 3, padding=1, bias=False))
            for i in range(3)
        )
        self.norm = nn.BatchNorm2d(18)
        self.transition = nn.Conv2d(18, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(F.relu(layer(torch.cat(features, 1))))
        x = self.transition(F.avg_pool2d(F.relu(self.norm(torch.cat(features, 1))), 2))
        return self.head(x.mean(dim=[-2, -1]))


@case(IMAGES, free={"left.weight:0": 5, "right.weight:0": 7})
class CatFlatten(nn.Module):
    """Two branches joined, then flattened over space before the linear layer: each channel owns 16 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.right = nn.Conv2d(3, 7, 1, stride=2)
        self.bn = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12 * 4 * 4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], dim=1)
        x = F.elu(self.bn(x))
        return self.fc(x.view(x.size(0), -1))


@case(IMAGES, free={"expand.0.weight:0": 12, "depthwise.0.weight:0": 12, "project.0.weight:0": 6, "head.weight:1": 6})
class Depthwise(nn.Module):
    """An inverted residual block (MobileNetV2): expand, depthwise, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.expand = conv_bn(6, 12, 1)
        self.depthwise = conv_bn(12, 12, 3, groups=12)
        self.project = nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(x).mean((2, 3))


@case(IMAGES, free={"widen.weight:0": 0})
class DepthMultiplier(nn.Module):
    """A depthwise convolution that makes three outputs of every input channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.widen = nn.Conv2d(4, 12, 3, padding=1, groups=4)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.widen(F.relu(self.conv(x)))).amax((2, 3)))


@case(IMAGES, "grid", free={"reduce.0.weight:0": 0, "grouped.0.weight:0": 0, "restore.0.weight:0": 10})
class GroupedConvolution(nn.Module):
    """A ResNeXt block: 1x1, grouped 3x3 with four groups, 1x1, and the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 10)
        self.reduce = conv_bn(10, 16, 1)
        self.grouped = conv_bn(16, 24, 3, groups=4)
        self.restore = nn.Sequential(nn.Conv2d(24, 10, 1, bias=False), nn.BatchNorm2d(10))
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.restore(self.grouped(self.reduce(x))))
        return self.fc(x.flatten(2).mean(-1))


@case(IMAGES, "grid", free={"stem.0.weight:0": 0})
class ChannelShuffle(nn.Module):
    """ShuffleNet: grouped 1x1, shuffle between groups, depthwise, grouped 1x1; and the split unit of version 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.first = nn.Conv2d(12, 12, 1, groups=3)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.second = nn.Conv2d(12, 12, 1, groups=3)
        self.branch = nn.Sequential(conv_bn(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6))
        self.fc = nn.Linear(12, 4)

    def shuffle(self, x: Tensor, groups: int) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, -1, h, w)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.second(self.depthwise(self.shuffle(F.relu(self.first(x)), 3))))
        left, right = x.chunk(2, dim=1)
        x = self.shuffle(torch.cat((left, self.branch(right)), dim=1), 2)
        return self.fc(x.mean((2, 3)))


@case(IMAGES, free={"up.weight:1": 6, "down2.weight:0": 8}, fixed=("out.weight:1",))
class TransposedConvolution(nn.Module):
    """A convolutional autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.bn = nn.BatchNorm2d(6)
        self.out = nn.ConvTranspose2d(6, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.down2(F.leaky_relu(self.down1(x), 0.1)), 0.1)
        return torch.tanh(self.out(F.relu(self.bn(self.up(x)))))


@case(reals(2, 6, 5, 5), "grid", free={"squeeze.weight:0": 0, "up.weight:1": 0})
class GroupedTransposed(nn.Module):
    """A transposed convolution in two groups, and a depthwise transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(6, 8, 1)
        self.up = nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.smooth = nn.ConvTranspose2d(12, 12, 3, padding=1, groups=12)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.smooth(F.gelu(self.up(F.gelu(self.squeeze(x)))))))


@case(IMAGES, free={"conv.weight:0": 8, "squeeze.weight:0": 4, "excite.weight:0": 8, "fc.weight:1": 8})
class SqueezeExcite(nn.Module):
    """Channels gated by a small network over their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        x = x * torch.sigmoid(self.excite(F.silu(self.squeeze(self.pool(x)))))
        return self.fc(torch.flatten(self.pool(x), 1))


@case(IMAGES, free={"conv1.weight:0": 8, "conv2.weight:0": 0})
class PixelShuffle(nn.Module):
    """Super-resolution: four channels become the pixels of one, twice (the second time they are the output)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 24, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.conv3 = nn.Conv2d(6, 3 * 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.prelu(self.conv1(x), x.new_full((1,), 0.2))
        x = torch.relu(self.shuffle(self.conv2(x)))
        return self.shuffle(self.conv3(x))


@case(reals(2, 3, 8, 8), free={"focus.weight:0": 5, "conv.weight:0": 12})
class SpaceToDepth(nn.Module):
    """Strided slices joined along channels, and pixel unshuffle later."""

    def __init__(self) -> None:
        super().__init__()
        self.focus = nn.Conv2d(12, 5, 3, padding=1)
        self.conv = nn.Conv2d(20, 12, 1)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        x = F.pixel_unshuffle(F.silu(self.focus(x)), 2)
        return self.fc(F.silu(self.conv(x)).mean((-1, -2)))


@case(IMAGES, "integers", "inexact", free={"conv2.weight:0": 0})
class GroupNormed(nn.Module):
    """Group norm over four groups of channels, and over one (as some write layer norm for images)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.gn1 = nn.GroupNorm(4, 8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.gn2 = nn.GroupNorm(1, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.gn1(self.conv1(x)))
        return self.fc(F.relu(self.gn2(self.conv2(x))).mean((2, 3)))


@case(IMAGES, free={"conv1.weight:0": 8, "conv2.weight:0": 6})
class InstanceNormed(nn.Module):
    """Instance norm, with and without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.in1 = nn.InstanceNorm2d(8, affine=True)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.in2 = nn.InstanceNorm2d(6)
        self.out = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.in2(self.conv2(F.relu(self.in1(self.conv1(x)))))))


@case(IMAGES, free={"conv1.weight:0": 8, "bn.running_var:0": 8, "free.running_mean:0": 5})
class BareBatchNorm(nn.Module):
    """Batch norms without parameters and without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8, affine=False)
        self.conv2 = nn.Conv2d(8, 6, 3)
        self.batch = nn.BatchNorm2d(6, track_running_stats=False)
        self.conv3 = nn.Conv2d(6, 5, 1)
        self.free = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.batch(self.conv2(torch.relu(self.bn(self.conv1(x))))))
        return self.fc(torch.selu(self.free(self.conv3(x))).mean((2, 3)))


@case(reals(2, 3, 6, 6), "grid", free={"squeeze.weight:0": 0, "up.weight:0": 0})
class StridedGroups(nn.Module):
    """Groups, kernel and stride are all two; what is strided is averaged, so that its size does not show outside."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(3, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.dilated = nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.dilated(F.relu(self.up(self.squeeze(x))))).mean((2, 3)))


@case(reals(2, 5, 6), free={"embed.weight:0": 8, "mix.weight:0": 4, "cell.weight:0": 3, "head.weight:1": 0})
class KernelOfOne(nn.Module):
    """Convolutions over tokens with a kernel of one, while the channels lie where space would be."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.mix, self.join = nn.Conv1d(5, 4, 1), nn.Conv1d(4, 1, 1, bias=False)
        self.cell = nn.Conv2d(1, 3, (3, 1), padding=(1, 0), bias=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)  # [batch, tokens, channels]
        z = self.cell(x[:, None]).sum((1, 2))
        return self.head(self.join(F.relu(self.mix(x))).squeeze(1) + z)
