"""The pieces that random networks are made of: a kind of call, its result's shape, how to draw its settings.

A shape is a tuple without the batch: (channels, height, width), (tokens, features) or (features,). A piece reads one
value (`add`, `mul` and `cat` two) and makes one value (`halves` two).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
Settings = dict[str, Any]
Draw = Callable[[list[Any]], Any]  # picks one of the values given

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
}


class Call(nn.Module):
    """A function without parameters as a module; its settings are attributes, as users keep them."""

    def __init__(self, function: Callable[..., Any], **settings: Any) -> None:
        super().__init__()
        self.function = function
        self.names = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, *values: Tensor) -> Any:
        return self.function(*values, **{name: getattr(self, name) for name in self.names})


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(channels, inner), nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class Attention(nn.Module):
    """Self-attention in four spellings, with as many or fewer key/value heads."""

    def __init__(self, width: int, heads: int, kv_heads: int, size: int, spelling: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.spelling = heads, kv_heads, size, spelling
        if spelling == "fused":
            self.qkv = nn.Linear(width, 3 * heads * size)
        else:
            self.q = nn.Linear(width, heads * size)
            self.k, self.v = nn.Linear(width, kv_heads * size), nn.Linear(width, kv_heads * size, bias=False)
        self.out = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.spelling == "fused":
            q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q(x).view(b, t, self.heads, self.size).transpose(1, 2)
            k = self.k(x).view(b, t, self.kv_heads, self.size).transpose(1, 2)
            v = self.v(x).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        if self.kv_heads != self.heads and self.spelling == "softmax":
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        if self.spelling == "softmax":
            y = (q @ k.mT * 0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv_heads != self.heads)
        return self.out(y.transpose(1, 2).reshape(b, t, self.heads * self.size))


class TokenMix(nn.Module):
    """A linear layer over tokens."""

    def __init__(self, tokens: int, inner: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(tokens, inner), nn.Linear(inner, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.relu(self.one(x.transpose(1, 2)))).transpose(1, 2)


class Recurrent(nn.Module):
    """The outputs of a GRU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


def shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def option_a(x: Tensor, before: int, after: int) -> Tensor:
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, after))


def window(x: Tensor, start: int, stop: int) -> Tensor:
    return x[:, start:stop]


def cat(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b], dim=-1 if a.dim() == 3 else 1)


def halves(x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(2, dim=-1 if x.dim() == 3 else 1)


def glu(x: Tensor) -> Tensor:
    return F.glu(x, dim=-1 if x.dim() == 3 else 1)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def divisors(*numbers: int) -> list[int]:
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]


@dataclass(frozen=True)
class Piece:
    """One kind of call."""

    ranks: tuple[int, ...]
    """How many axes (without the batch) the value it reads may have."""
    draw: Callable[[Shape, Draw], Settings]
    """Settings that fit the shape, from a function that picks one of several values."""
    shape: Callable[..., list[Shape]]
    """Shapes of the results, from the settings and the shapes read."""
    build: Callable[[Settings, Shape], nn.Module]
    fits: Callable[[Shape], bool] = lambda shape: True
    inputs: int = 1


def same(settings: Settings, shape: Shape, *_: Shape) -> list[Shape]:
    return [shape]


def nothing(shape: Shape, draw: Draw) -> Settings:
    return {}


def widths(limit: int = 10) -> list[int]:
    return list(range(2, limit + 1))


def conv_settings(shape: Shape, draw: Draw) -> Settings:
    groups = draw([g for g in divisors(shape[0]) if g <= 12])
    return {
        "out": groups * draw([n for n in range(1, 11) if groups * n <= 12]),
        "groups": groups,
        "size": draw([1, 3]),
        "stride": draw([1, 2] if shape[1] >= 4 else [1]),
        "bias": draw([True, False]),
    }


def conv_shape(s: Settings, shape: Shape) -> list[Shape]:
    return [(s["out"], *(-(-n // s["stride"]) for n in shape[1:]))]


def conv_build(s: Settings, shape: Shape) -> nn.Module:
    return nn.Conv2d(
        shape[0], s["out"], s["size"], s["stride"], padding=s["size"] // 2, groups=s["groups"], bias=s["bias"]
    )


def transposed_settings(shape: Shape, draw: Draw) -> Settings:
    groups = draw([g for g in divisors(shape[0]) if g <= 4])
    return {"out": groups * draw([1, 2, 3]), "groups": groups}


def attention_settings(shape: Shape, draw: Draw) -> Settings:
    spelling = draw(["own", "fused", "softmax"])
    heads = draw([1, 2, 4])
    kv_heads = heads if spelling == "fused" else draw(divisors(heads))
    return {"heads": heads, "kv_heads": kv_heads, "size": draw([1, 2, 3]), "spelling": spelling}


def norm_build(kind: str) -> Callable[[Settings, Shape], nn.Module]:
    def build(s: Settings, shape: Shape) -> nn.Module:
        if kind == "batch":
            return (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0])
        if kind == "group":
            return nn.GroupNorm(s["groups"], shape[0])
        if kind == "instance":
            return nn.InstanceNorm2d(shape[0], affine=s["affine"])
        return (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(shape[-1])

    return build


def linear_shape(s: Settings, shape: Shape) -> list[Shape]:
    return [(*shape[:-1], s["out"])]


def joined_shape(s: Settings, a: Shape, b: Shape) -> list[Shape]:
    return [(*a[:-1], a[-1] + b[-1]) if len(a) == 2 else (a[0] + b[0], *a[1:])]


def halved(s: Settings, shape: Shape) -> list[Shape]:
    return [(*shape[:-1], shape[-1] // 2) if len(shape) == 2 else (shape[0] // 2, *shape[1:])]


def is_even(shape: Shape) -> bool:
    return (shape[-1] if len(shape) == 2 else shape[0]) % 2 == 0


def call(function: Callable[..., Any], *names: str) -> Callable[[Settings, Shape], nn.Module]:
    return lambda s, shape: Call(function, **{name: s[name] for name in names})


PIECES: dict[str, Piece] = {
    "conv": Piece((3,), conv_settings, conv_shape, conv_build),
    "depthwise": Piece(
        (3,),
        lambda shape, draw: {"times": draw([1, 2] if shape[0] <= 6 else [1])},
        lambda s, shape: [(shape[0] * s["times"], *shape[1:])],
        lambda s, shape: nn.Conv2d(shape[0], shape[0] * s["times"], 3, padding=1, groups=shape[0]),
    ),
    "transposed": Piece(
        (3,),
        transposed_settings,
        lambda s, shape: [(s["out"], 2 * shape[1], 2 * shape[2])],
        lambda s, shape: nn.ConvTranspose2d(shape[0], s["out"], 2, stride=2, groups=s["groups"]),
        fits=lambda shape: shape[1] <= 4,
    ),
    "batch_norm": Piece((1, 3), nothing, same, norm_build("batch")),
    "group_norm": Piece((3,), lambda shape, draw: {"groups": draw(divisors(shape[0]))}, same, norm_build("group")),
    "instance_norm": Piece(
        (3,),
        lambda shape, draw: {"affine": draw([True, False])},
        same,
        norm_build("instance"),
        fits=lambda shape: shape[1] * shape[2] > 1,
    ),
    "layer_norm": Piece((1, 2), nothing, same, norm_build("layer")),
    "rms_norm": Piece((1, 2), nothing, same, norm_build("rms")),
    "activation": Piece(
        (1, 2, 3),
        lambda shape, draw: {"kind": draw(list(ACTIVATIONS))},
        same,
        lambda s, shape: Call(ACTIVATIONS[s["kind"]]),
    ),
    "prelu": Piece((3,), nothing, same, lambda s, shape: nn.PReLU(shape[0])),
    "pool": Piece(
        (3,),
        lambda shape, draw: {"kind": draw(["max", "average"])},
        lambda s, shape: [(shape[0], shape[1] // 2, shape[2] // 2)],
        lambda s, shape: nn.MaxPool2d(2) if s["kind"] == "max" else nn.AvgPool2d(2),
        fits=lambda shape: min(shape[1:]) >= 2,
    ),
    "upsample": Piece(
        (3,),
        nothing,
        lambda s, shape: [(shape[0], 2 * shape[1], 2 * shape[2])],
        lambda s, shape: nn.Upsample(scale_factor=2.0, mode="nearest"),
        fits=lambda shape: shape[1] <= 4,
    ),
    "pixel_shuffle": Piece(
        (3,),
        nothing,
        lambda s, shape: [(shape[0] // 4, 2 * shape[1], 2 * shape[2])],
        lambda s, shape: nn.PixelShuffle(2),
        fits=lambda shape: shape[0] % 4 == 0 and shape[1] <= 4,
    ),
    "gate": Piece(
        (3,), lambda shape, draw: {"inner": draw(widths(5))}, same, lambda s, shape: Gate(shape[0], s["inner"])
    ),
    "shuffle": Piece(
        (3,),
        lambda shape, draw: {"groups": draw(divisors(shape[0])[1:])},
        same,
        call(shuffle, "groups"),
        fits=lambda shape: shape[0] > 1,
    ),
    "option_a": Piece(
        (3,),
        lambda shape, draw: {"before": draw([0, 1, 2]), "after": draw([1, 2])},
        lambda s, shape: [(shape[0] + s["before"] + s["after"], -(-shape[1] // 2), -(-shape[2] // 2))],
        call(option_a, "before", "after"),
        fits=lambda shape: shape[1] > 1 and shape[0] <= 8,
    ),
    "window": Piece(
        (1, 3),
        lambda shape, draw: {"start": draw(list(range(shape[0] - 1))), "stop": shape[0]},
        lambda s, shape: [(s["stop"] - s["start"], *shape[1:])],
        call(window, "start", "stop"),
        fits=lambda shape: shape[0] > 1,
    ),
    "halves": Piece(
        (1, 2, 3), nothing, lambda s, shape: halved(s, shape) * 2, lambda s, shape: Call(halves), fits=is_even
    ),
    "glu": Piece((1, 2, 3), nothing, halved, lambda s, shape: Call(glu), fits=is_even),
    "add": Piece((1, 2, 3), nothing, same, lambda s, shape: Call(torch.add), inputs=2),
    "mul": Piece((1, 2, 3), nothing, same, lambda s, shape: Call(torch.mul), inputs=2),
    "cat": Piece((1, 2, 3), nothing, joined_shape, lambda s, shape: Call(cat), inputs=2),
    "linear": Piece(
        (1, 2),
        lambda shape, draw: {"out": draw(widths()), "bias": draw([True, False])},
        linear_shape,
        lambda s, shape: nn.Linear(shape[-1], s["out"], bias=s["bias"]),
    ),
    "attention": Piece(
        (2,),
        attention_settings,
        same,
        lambda s, shape: Attention(shape[-1], s["heads"], s["kv_heads"], s["size"], s["spelling"]),
    ),
    "token_mix": Piece(
        (2,), lambda shape, draw: {"inner": draw(widths(5))}, same, lambda s, shape: TokenMix(shape[0], s["inner"])
    ),
    "recurrent": Piece(
        (2,), lambda shape, draw: {"out": draw(widths(5))}, linear_shape, lambda s, shape: Recurrent(shape[1], s["out"])
    ),
    "flatten": Piece(
        (2, 3),
        nothing,
        lambda s, shape: [(int(torch.Size(shape).numel()),)],
        lambda s, shape: nn.Flatten(),
        fits=lambda shape: torch.Size(shape).numel() <= 128,
    ),
    "mean": Piece(
        (2, 3),
        nothing,
        lambda s, shape: [(shape[0] if len(shape) == 3 else shape[1],)],
        lambda s, shape: Call(torch.mean, dim=(2, 3) if len(shape) == 3 else (1,)),
    ),
    "tokens": Piece(
        (3,),
        nothing,
        lambda s, shape: [(shape[1] * shape[2], shape[0])],
        lambda s, shape: Call(tokens),
        fits=lambda shape: shape[1] * shape[2] <= 16,
    ),
}
