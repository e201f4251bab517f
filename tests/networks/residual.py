"""Networks of residual blocks: which of them may be left out whole, and which look as if they might."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.registry import case, reals

IMAGES = reals(2, 3, 8, 8)
TOKENS = reals(2, 5, 8)


class PostRelu(nn.Module):
    """Adds and then bends, as ResNet does: passes only what bending has left as it is."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


@case(IMAGES, free={"blocks.1.conv1.weight:0": 4, "stem.weight:0": 6})
class ResidualStage(nn.Module):
    """The first block's input may be negative, so its bend is not idle; from the second on it is, past a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(PostRelu(6, 4) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.stem(x))
        x = self.blocks[2](self.blocks[1](F.max_pool2d(x, 2)))
        return self.head(x.mean((2, 3)))


class PreNorm(nn.Module):
    """Attention and feed-forward, each behind a norm, each added; hands on a tuple of one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 6), nn.Linear(6, width, bias=False)
        self.heads = heads
        self.kind = "full"

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor]:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2))
        return (x + self.down(F.gelu(self.up(self.norm2(x)))),)


@case(TOKENS, "attention", "grid", "inexact", "integers", free={"blocks.0.up.weight:0": 6})
class PreNormTower(nn.Module):
    """Blocks that take more than their input, whose settings the network reads, and that wrap what they put out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(PreNorm(8, 2) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            assert block.kind == "full"
            x = block(x, scale=0.5)[0]
        return self.head(x)


class Scaled(nn.Module):
    """Depthwise, pointwise, a learned scale; added over views of other shapes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)
        self.gamma = nn.Parameter(torch.ones(width))
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = (self.gamma * self.down(F.silu(self.up(y)) * self.temperature)).permute(0, 3, 1, 2)
        x = x.reshape(batch, channels, height * width) + y.flatten(2)
        return x.reshape(batch, channels, height, width)


class Gated(nn.Module):
    """Squeeze and excite halves its input when its parameters are zero: it can't be left out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]


@case(IMAGES, free={"scaled.0.up.weight:0": 10})
class LayerScaled(nn.Module):
    """Sequences of blocks are no blocks of their own; a gate is none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.scaled = nn.Sequential(Scaled(6), Scaled(6))
        self.gate = Gated(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(self.scaled(self.stem(x))).mean((2, 3)))
