"""Places that are data: sampled, gathered, routed; and widths that several numbers of one module share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.registry import case, reals

TOKENS = reals(2, 6, 6)


@case(TOKENS, "attention", "grid", "integers", free={"query.weight:0": 0, "value.weight:0": 0, "near.weight:1": 0})
class RelativePositions(nn.Module):
    """Content to position: a window of a table of positions, where it begins a number of the module's, then gathered.

    The table is as long as the heads are wide together, so that the number that says where the window begins looks like
    a width that changed. The index is one for all heads, spread over them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size, self.reach = 2, 4, 8
        self.near = nn.Embedding(16, 8)
        self.query, self.key, self.value = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.place = nn.Linear(8, 8, bias=False)
        self.out = nn.Linear(8, 6)

    def spread(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(-3, -2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        q, k, v = self.spread(self.query(x)), self.spread(self.key(x)), self.spread(self.value(x))
        table = self.near.weight[self.reach - tokens : self.reach + tokens, :]
        places = q @ self.spread(self.place(table)).transpose(-1, -2)
        steps = torch.arange(tokens, device=x.device)
        index = (steps[:, None] - steps[None, :] + tokens).clamp(0, 2 * tokens - 1)
        places = torch.gather(places, -1, index.expand(x.shape[0], q.shape[1], tokens, tokens))
        weights = ((q @ k.transpose(-1, -2) + places) / math.sqrt(8)).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        return x + self.out(y)


@case(
    reals(2, 5, 6),
    "attention",
    "grid",
    "integers",
    free={"value.weight:0": 0, "out.weight:1": 0, "offsets.weight:0": 0},
)
class DeformableHeads(nn.Module):
    """Every head samples its own channels at places that the query says."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.points = 4, 3
        self.value, self.out = nn.Linear(6, 8), nn.Linear(8, 6)
        self.offsets, self.weights = nn.Linear(6, 4 * 3 * 2), nn.Linear(6, 4 * 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        value = self.value(x).view(b, n, self.heads, -1).permute(0, 2, 3, 1).reshape(b * self.heads, -1, 1, n)
        places = self.offsets(x).view(b, n, self.heads, self.points, 2).transpose(1, 2).flatten(0, 1).tanh()
        weights = self.weights(x).view(b, n, self.heads, self.points).softmax(-1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(value, places, align_corners=False)
        y = (sampled * weights.unsqueeze(1)).sum(-1).view(b, -1, n).transpose(1, 2)
        return x + self.out(y)


@case(reals(2, 3, 6, 6), "inexact", free={"first:0": 6, "second:0": 4})
class StandardisedKernels(nn.Module):
    """Each kernel loses its mean and is divided by its spread, as a batch norm over the kernels computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.second = nn.Parameter(torch.randn(4, 6, 3, 3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for kernel in (self.first, self.second):
            flat = F.batch_norm(kernel.reshape(1, kernel.shape[0], -1), None, None, training=True, momentum=0.0)
            x = F.conv2d(x, flat.reshape_as(kernel), padding=1).relu()
        return self.head(x.mean((2, 3)))


@case(
    reals(1, 3, 6, 6),
    "grid",
    free={"weigh.weight:1": 8},
    fixed=("weigh.weight:0",),
)
class ConvexUpsampling(nn.Module):
    """Every point of a finer picture is a weighted sum of the nine around it: weights by neighbour, row and column.

    What the sum leaves of the grid, rows and columns, is laid out in space as the output: nothing of it can go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flow, self.stem = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.weigh = nn.Conv2d(8, 9 * 2 * 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        flow = self.flow(x)
        weights = self.weigh(F.relu(self.stem(x))).view(batch, 1, 9, 2, 2, height, width).softmax(2)
        around = F.unfold(flow, 3, padding=1).view(batch, 2, 9, 1, 1, height, width)
        fine = (weights * around).sum(2).permute(0, 1, 4, 2, 5, 3)
        return fine.reshape(batch, 2, 2 * height, 2 * width)


@case(TOKENS, free={"up.weight:0": 8, "down.weight:1": 8})
class OverlappingChunks(nn.Module):
    """Windows of a sequence that share half of their tokens, laid over its memory as `as_strided` does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu()
        b, n, width = y.shape
        chunks = y.as_strided((b, n // 2 - 1, 4, width), (y.stride(0), 2 * y.stride(1), y.stride(1), y.stride(2)))
        return self.down(chunks.softmax(2).sum(1))


@case(TOKENS, "data_dependent", free={"up.weight:0": 8, "patch:0": 8, "down.weight:1": 8})
class WrittenThroughMask(nn.Module):
    """What a learned vector is written into where the data say, and what is read where they say."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.patch = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y[x[..., 0] > 0] = self.patch
        loud = y[x[..., 1] > 0]
        return self.down(y) + self.down(loud).sum(0)


@case(
    reals(2, 6),
    "ordered",
    free={"mix:0": 8, "mix:1": 8, "first.weight:0": 8, "narrow.weight:0": 5},
    fixed=("uneven:0", "uneven:1"),
)
class MaskedLinear(nn.Module):
    """Weights below the diagonal alone, as autoregressive layers have them: a channel sees those before it. The square
    one loses rows and columns alike, the other one nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)
        self.mix = nn.Parameter(torch.empty(8, 8))
        self.narrow, self.wide = nn.Linear(8, 5), nn.Linear(5, 6)
        self.before, self.after = nn.Linear(8, 7), nn.Linear(4, 6)
        self.uneven = nn.Parameter(torch.empty(4, 7))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.linear(F.relu(self.first(x)), self.mix.tril()))
        return (
            self.last(y) + self.wide(F.relu(self.narrow(y))) + self.after(F.linear(self.before(y), self.uneven.tril()))
        )
