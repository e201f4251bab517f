"""Ways of writing a forward: inputs and outputs of several kinds, buffers, constants, in-place calls, branches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.attention import Outlook
from networks.registry import case, reals

IMAGES = reals(2, 3, 8, 8)


@case(IMAGES, free={"conv1.weight:0": 6}, fixed=("conv2.weight:0", "head.weight:0"))
class OutputFeatures(nn.Module):
    """Returns a dictionary: the logits and the features they were made from, which therefore must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = F.relu(self.conv2(F.relu(self.conv1(x))))
        return {"features": features, "logits": self.head(features.mean((2, 3)))}


@case(lambda: (reals(2, 3, 8, 8)(), reals(2, 4, seed=8)()), free={"conv.weight:0": 8, "hidden.weight:0": 6})
class Conditioned(nn.Module):
    """Two inputs: the second one makes scales and shifts for the first one's channels (FiLM)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.hidden = nn.Linear(4, 6)
        self.film = nn.Linear(6, 16)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(F.silu(self.hidden(condition)))[:, :, None, None].chunk(2, dim=1)
        return self.out(F.silu(self.conv(image) * (1 + scale) + shift))


@case(
    lambda: {"left": reals(2, 5)(), "right": reals(2, 7, seed=8)()},
    free={"left.weight:0": 6, "right.weight:0": 4, "pair:1": 6, "pair:2": 4, "pair:0": 5},
)
class KeywordBilinear(nn.Module):
    """Keyword arguments, and a bilinear form by einsum over three operands."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 6), nn.Linear(7, 4)
        self.pair = nn.Parameter(torch.randn(5, 6, 4))
        self.out = nn.Linear(5, 2)

    def forward(self, *, left: Tensor, right: Tensor) -> Tensor:
        pair = torch.einsum("bi,oij,bj->bo", torch.tanh(self.left(left)), self.pair, torch.tanh(self.right(right)))
        return self.out(torch.tanh(pair))


@torch.library.custom_op("niwaki_zoo::wobble", mutates_args=())
def wobble(x: Tensor) -> Tensor:
    """An operation that no rule knows: neighbouring channels influence each other."""
    return x + torch.roll(x, 1, 1).sin()


@wobble.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@case(IMAGES, "unknown", "inference", free={"conv1.weight:0": 6}, fixed=("conv2.weight:0", "fc.weight:1"))
class CustomOperation(nn.Module):
    """Calls an operation of the user's own; what it touches must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = wobble(self.conv2(F.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


@case(
    reals(2, 4, 4, 3),
    "attention",
    "grid",
    "integers",
    "unknown",
    "inference",
    free={"embed.weight:0": 8},
    fixed=("v.weight:0", "attn.weight:0", "proj.weight:1"),
)
class UnknownAfterCrossing(Outlook):
    """Two grids that became one axis meet an unknown call: neither of them may lose rows or columns."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = wobble(self.mixed(self.embed(x)))
        return self.proj(y.unflatten(1, (-1, 4)).mean((2, 3)))


@case(lambda: [reals(2, 3, 8, 8)(), reals(2, 3, 4, 4)()], free={"conv.weight:0": 6, "low.weight:0": 6})
class Pyramid(nn.Module):
    """A list of images of two sizes; lateral connections added after resizing (FPN)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.low = nn.Conv2d(3, 6, 1)
        self.heads = nn.ModuleDict({"box": nn.Conv2d(6, 4, 1), "score": nn.Conv2d(6, 1, 1)})

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        large, small = images
        low = self.low(small)
        high = self.conv(large) + F.interpolate(low, scale_factor=2.0, mode="nearest")
        return [head(F.relu(level)) for level in (high, low) for head in self.heads.values()]


@case(IMAGES, free={"conv.weight:0": 6, "centre:0": 6, "spread:1": 6})
class Buffers(nn.Module):
    """Mean and spread of the input, and of the features, as buffers; one of them not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("centre", torch.linspace(-1, 1, 6))
        self.register_buffer("spread", torch.linspace(0.5, 2, 6).reshape(1, 6, 1, 1))
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv((x - self.mean) / self.std)
        x = (x - self.centre.view(1, -1, 1, 1)) * self.spread
        return self.fc(x.sigmoid().sum((2, 3)))


@case(IMAGES, free={"conv.weight:0": 6, "mix.weight:0": 5})
class Constants(nn.Module):
    """Zeros, ones, ranges and random-free masks made in the forward: a position channel joined, a border blanked."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 6, 3, padding=1)
        self.mix = nn.Conv2d(6 + 1, 5, 1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        rows = torch.arange(h, device=x.device, dtype=x.dtype).view(1, 1, h, 1).expand(b, 1, h, w) / h
        columns = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).expand(b, 1, h, w)
        x = F.relu(self.conv(torch.cat([x, rows, columns], dim=1)))
        inside = torch.zeros(h, w, device=x.device, dtype=x.dtype)
        inside[1:-1, 1:-1] = 1.0
        x = torch.cat((x * inside, x.new_ones(b, 1, h, w)), dim=1)
        x = torch.where(torch.ones_like(x) > 0, x, torch.zeros_like(x))
        return self.fc(F.relu(self.mix(x)).mean((2, 3)))


@case(IMAGES, free={"conv1.weight:0": 6, "conv2.weight:0": 6})
class InPlace(nn.Module):
    """In-place activations and sums, `+=`, a buffer filled slice by slice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.act = nn.ReLU6(inplace=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv1(x))
        y = self.conv2(x)
        y += x
        y.clamp_(-3, 3).mul_(0.5)
        canvas = torch.zeros(y.shape, dtype=y.dtype, device=y.device)
        canvas[:, :, 2:, :] = y[:, :, :-2, :]
        canvas[:, :, :2] += 0.25
        return self.fc(F.hardtanh_(canvas).mean((2, 3)))


@case(IMAGES, "inference", free={"conv1.weight:0": 6, "conv2.weight:0": 6})
class OutArguments(nn.Module):
    """Inference code that writes into preallocated tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 4, 1)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        torch.sigmoid(x, out=x)
        total = torch.empty_like(x)
        torch.add(self.conv2(x), x, alpha=0.5, out=total)
        joined = x.new_empty(x.shape[0], 2 * x.shape[1], *x.shape[2:])
        torch.cat([total, x], dim=1, out=joined)
        return self.conv3(joined)


@case(IMAGES, "data_dependent", free={"conv.weight:0": 6})
class Branch(nn.Module):
    """Looks at a value to decide what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max().item() > 100:
            x = x / 100
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


@case(IMAGES, free={"stem.weight:0": 8, "paths.0.weight:0": 8, "mix.weight:0": 4})
class Mixture(nn.Module):
    """Paths weighted by softmax of a parameter (architecture search), stacked; fixed permutation of channels; roll."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.paths = nn.ModuleList(nn.Conv2d(8, 8, size, padding=size // 2) for size in (1, 3))
        self.alpha = nn.Parameter(torch.zeros(2))
        self.register_buffer("order", torch.tensor([3, 1, 7, 0, 5, 2, 6, 4]))
        self.mix = nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.stack([path(x) for path in self.paths], dim=0)
        x = (x * self.alpha.softmax(0).view(-1, 1, 1, 1, 1)).sum(0)
        x = torch.roll(F.relu(x), (1, 1), dims=(2, 3))[:, self.order]
        return self.fc(F.relu(self.mix(x.flip(1))).mean((2, 3)))


@case(reals(2, 6), "rigid", fixed=("fc.weight:0", "fc.weight:1"))
class OnlyOneLayer(nn.Module):
    """One linear layer from input to output: nothing here can go."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@case(reals(2, 6), free={"hidden.weight:0": 8, "second.weight:0": 7})
class Perceptron(nn.Module):
    """A multi-layer perceptron with batch norm on features, written with functional calls and `@`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 8)
        self.bn = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 7)
        self.w = nn.Parameter(torch.randn(7, 3))
        self.b = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.glu(torch.cat([self.bn(self.hidden(x))] * 2, 1)))
        return torch.addmm(self.b, torch.celu(x), self.w)


@case(IMAGES, "data_dependent", free={"conv.weight:0": 8, "box.0.weight:0": 6})
class Picks(nn.Module):
    """Places that are bright in the input are read out, as many as the data say, and laid end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.box = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4 * 2))

    def forward(self, x: Tensor) -> Tensor:
        places = F.relu(self.conv(x)).permute(0, 2, 3, 1).reshape(-1, self.conv.out_channels)
        best = torch.nonzero(x.mean(1).reshape(-1) > 0.5).squeeze(1)
        return self.box(places[best]).reshape(-1, 4)


@case(IMAGES, free={"conv.weight:0": 4})
class EverySecond(nn.Module):
    """Every second channel is doubled in place: two neighbours go together, and every second is picked again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, ::2].mul_(2)
        return self.out(y)


@case(IMAGES, free={"conv.weight:0": 4})
class Interleaved(nn.Module):
    """Channels are written into every second place of a tensor made in forward, ones into the others; tensors of one
    number are made there, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.zeros(x.shape[0], 8, *x.shape[2:], dtype=x.dtype, device=x.device)
        mixed[:, ::2] = self.gate(x)
        mixed[:, 1::2] = 1.0
        return self.out(self.conv(x) * mixed).clamp(torch.tensor(float("-inf")), torch.tensor(3.5)) * torch.tensor(0.5)


@case(reals(2, 5), "grid", "inexact", free={"first.weight:0": 12, "scaled:0": 0})
class GroupNormByHand(nn.Module):
    """The number of norm groups stands in forward alone, and no shape tells that there are fewer now."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 4)
        self.scaled = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(F.group_norm(F.gelu(self.first(x)), 3, self.scaled)))


@case(reals(2, 5), free={"first.weight:0": 12, "last.weight:1": 12})
class PiecesBySize(nn.Module):
    """Every piece of four channels in its own way: what is cut unevenly falls into other pieces, or fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.first(x))
        return self.last(torch.cat([piece * (place + 1) for place, piece in enumerate(y.split(4, -1))], -1))
