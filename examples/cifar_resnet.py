"""The CIFAR-10 family of residual networks with parameter-free shortcuts, as anyone would write it.

He et al. 2016, "Deep residual learning for image recognition" (arXiv:1512.03385), section 4.2, shortcut option A: where
a stage halves the picture, the shortcut takes every second pixel and fills the new channels with zeros.

Use it from the command line with `python:examples/cifar_resnet.py:resnet56` as the model.
"""

from torch import Tensor, nn
from torch.nn import functional


class Shortcut(nn.Module):
    """Every second pixel, zeros in the new channels: half of them in front, half behind."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.pad = new_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class Block(nn.Module):
    """Two 3 x 3 convolutions and what goes around them."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = Shortcut(c_out - c_in) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels, each with `blocks` blocks: 6 * blocks + 2 layers."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, stride=1)
        self.layer2 = self._stage(blocks, 16, 32, stride=2)
        self.layer3 = self._stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(blocks: int, c_in: int, c_out: int, *, stride: int) -> nn.Sequential:
        first = Block(c_in, c_out, stride)
        return nn.Sequential(first, *(Block(c_out, c_out, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(x)


def resnet20(classes: int = 10) -> CifarResNet:
    """0.27 million parameters."""
    return CifarResNet(3, classes)


def resnet32(classes: int = 10) -> CifarResNet:
    """0.46 million parameters."""
    return CifarResNet(5, classes)


def resnet44(classes: int = 10) -> CifarResNet:
    """0.66 million parameters."""
    return CifarResNet(7, classes)


def resnet56(classes: int = 10) -> CifarResNet:
    """0.85 million parameters."""
    return CifarResNet(9, classes)


if __name__ == "__main__":
    for make in (resnet20, resnet32, resnet44, resnet56):
        print(make.__name__, sum(parameter.numel() for parameter in make().parameters()))
