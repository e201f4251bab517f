"""Plans made by hand: which positions of which layer stay."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import niwaki
from niwaki.graph.plans import plan_of


def keeping(model: nn.Module, example: Any, kept: dict[str, list[int]], *, graph: Any = None) -> Any:
    """The plan that keeps these positions of axis 0 of these tensors ("layer" means "layer.weight")."""
    graph = graph or niwaki.trace(model, example)
    alive = np.ones(graph.units.count, bool)
    for layer, keep in kept.items():
        hit = False
        for group in graph.groups:
            for member in group.members:
                if member.axis == 0 and member.tensor in (layer, f"{layer}.weight"):
                    alive[group.ids[member.unit[~np.isin(member.index, keep)]]] = False
                    hit = True
        assert hit, f"no axis 0 of {layer}"
    return plan_of(graph, alive)


def fill(parameter: Tensor, values: Any) -> None:
    with torch.no_grad():
        parameter.copy_(torch.tensor(values, dtype=parameter.dtype))


def mlp() -> nn.Sequential:
    """2 -> 3 -> 2: hidden (x0 + 2 x1 + 1, 3 x0, -x1 + 2), then (h0 + 10 h1 + 100 h2 + 5, -h2)."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    fill(model[0].weight, [[1, 2], [3, 0], [0, -1]])
    fill(model[0].bias, [1, 0, 2])
    fill(model[2].weight, [[1, 10, 100], [0, 0, -1]])
    fill(model[2].bias, [5, 0])
    return model


class Hard(nn.Module):
    """Hard-codes a width in its forward: only the exported door opens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 8).relu())


class Heads(nn.Module):
    """Attention over `heads` x `size`, in one of two spellings."""

    def __init__(
        self, heads: int = 2, size: int = 4, width: int = 3, *, spelling: str = "fused", bias: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.spelling = heads, spelling
        self.q, self.k, self.v = (nn.Linear(width, heads * size, bias=bias) for _ in range(3))
        self.out = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.spelling == "fused":
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        elif self.spelling == "times":
            y = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v
        else:
            y = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))
