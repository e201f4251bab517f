"""A small residual network for the bundled digits: three stages, six blocks with batch norm, projection shortcuts.

Use it from the command line with `python:examples/digits_resnet.py:digits_resnet` as the model.
"""

from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; the shortcut projects where the width or the picture changes."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """Pictures `[n, 1, h, w]` to ten class scores `[n, 10]`."""

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64), blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Sequential(nn.Conv2d(1, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.layer1 = self._stage(first, first, blocks, stride=1)
        self.layer2 = self._stage(first, second, blocks, stride=2)
        self.layer3 = self._stage(second, third, blocks, stride=2)
        self.head = nn.Linear(third, classes)

    @staticmethod
    def _stage(c_in: int, c_out: int, blocks: int, *, stride: int) -> nn.Sequential:
        return nn.Sequential(Block(c_in, c_out, stride), *(Block(c_out, c_out) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def digits_resnet() -> DigitsResNet:
    """0.18 million parameters."""
    return DigitsResNet()


if __name__ == "__main__":
    print("digits_resnet", sum(parameter.numel() for parameter in digits_resnet().parameters()))
