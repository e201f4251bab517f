"""Networks as darknet's cfg files describe them: a module a layer, wired by number."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from niwaki.models.darknet_cfg import Section
from niwaki.models.darknet_heads import YoloHead

SLOPE = 0.1  # of "leaky", darknet's constant
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "leaky": lambda: nn.LeakyReLU(SLOPE),
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "mish": nn.Mish,
    "swish": nn.SiLU,
    "logistic": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def activation(section: Section) -> nn.Module:
    """What a section says about its activation."""
    name = section.options.get("activation", "logistic" if section.kind == "convolutional" else "linear")
    if name not in ACTIVATIONS:
        raise section.refused(f"activation {name!r}", f"known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def even_stride(section: Section) -> int:
    """The stride of a window, the same along both axes.

    Raises:
        InputError: strides of its own for an axis, as in networks that read lines of text.
    """
    stride = section.number("stride", 1)
    for name in ("stride_x", "stride_y"):
        if section.number(name, stride) != stride:
            raise section.refused(f"{name}={section.options[name]}, stride={stride}", "build it in a factory of yours")
    return stride


class Convolution(nn.Module):
    """Convolution, batch norm where there is one, activation."""

    def __init__(self, section: Section, width: int) -> None:
        super().__init__()
        for name in ("binary", "xnor", "antialiasing", "share_index", "deform", "sway", "rotate", "stretch"):
            if section.number(name, 0):
                raise section.refused(f"{name}={section.options[name]}", "build it without, or in a factory of yours")
        filters, size, groups = section.number("filters", 1), section.number("size", 1), section.number("groups", 1)
        stride, dilation = even_stride(section), section.number("dilation", 1)
        if min(filters, size, groups, stride, dilation) < 1 or filters % groups or width % groups:
            found = f"filters={filters}, size={size}, stride={stride}, groups={groups} on {width} channels"
            raise section.refused(found, "use sizes from 1 on, and groups that divide both widths")
        padding = size // 2 * dilation if section.number("pad", 0) else section.number("padding", 0)
        normalised = bool(section.number("batch_normalize", 0))
        self.conv = nn.Conv2d(width, filters, size, stride, padding, dilation, groups, bias=not normalised)
        self.bn = nn.BatchNorm2d(filters, eps=1e-5) if normalised else None
        self.act = activation(section)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.act(x if self.bn is None else self.bn(x))


class MaxPool(nn.Module):
    """Maximum over windows; what darknet pads (window - 1 in all) has no value, and the odd one lies at the end."""

    def __init__(self, section: Section) -> None:
        super().__init__()
        if section.number("maxpool_depth", 0) or section.number("antialiasing", 0):
            raise section.refused("a pool over channels, or an antialiased one", "build it in a factory of yours")
        self.stride = even_stride(section)
        self.size = section.number("size", self.stride)
        self.padding = section.number("padding", self.size - 1)

    def forward(self, x: Tensor) -> Tensor:
        before = self.padding // 2
        if 2 * before == self.padding and before <= self.size // 2:
            return F.max_pool2d(x, self.size, self.stride, before)
        amounts: list[int] = []
        for width in (x.shape[3], x.shape[2]):
            windows = (width + self.padding - self.size) // self.stride + 1
            amounts += [before, max((windows - 1) * self.stride + self.size - before - width, 0)]
        return F.max_pool2d(F.pad(x, amounts, value=-math.inf) if any(amounts) else x, self.size, self.stride)


class Route(nn.Module):
    """Earlier outputs side by side; with groups, one part of each."""

    def __init__(self, groups: int, group: int) -> None:
        super().__init__()
        self.groups, self.group = groups, group

    def forward(self, *inputs: Tensor) -> Tensor:
        parts = [x.chunk(self.groups, 1)[self.group] for x in inputs] if self.groups > 1 else list(inputs)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


class Shortcut(nn.Module):
    """Outputs added up."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            x = x + other
        return self.act(x)


class Product(nn.Module):
    """Outputs multiplied: place by place, or a number a channel with all places of that channel."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.act(x * other)


class Upsample(nn.Module):
    """Every place repeated."""

    def __init__(self, stride: int, scale: float) -> None:
        super().__init__()
        self.factor, self.scale = float(stride), scale

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.factor, mode="nearest")
        return x if self.scale == 1.0 else x * self.scale


class Yolo(nn.Module):
    """A detection head's end: passes its input on, and keeps what `decode` needs."""

    def __init__(self, section: Section) -> None:
        super().__init__()
        self.head = YoloHead.of(section)

    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Wiring:
    """Which outputs a layer reads: numbers of layers, -1 for the picture."""

    reads: tuple[int, ...]


class Darknet(nn.Module):
    """The network of a cfg. Its forward gives the raw output of every [yolo] layer, `[batch, boxes * (5 + classes),
    rows, columns]`, or the last layer's where there is none; `decode` makes boxes of them."""

    def __init__(self, sections: tuple[Section, ...]) -> None:
        super().__init__()
        self.sections = sections
        net = sections[0]
        self.shape = (net.number("channels", 3), net.number("height", 416), net.number("width", 416))
        """Of the picture: channels, rows, columns."""
        if min(self.shape) < 1:
            raise net.refused(f"a picture of {self.shape}", "give width, height and channels from 1 on")
        self.layers = nn.ModuleList()
        wiring: list[Wiring] = []
        widths: list[int] = []
        for at, section in enumerate(sections[1:]):
            reads = _reads(section, at)
            given = [widths[i] if i >= 0 else self.shape[0] for i in reads]
            module, width = _layer(section, given)
            self.layers.append(module)
            wiring.append(Wiring(reads))
            widths.append(width)
        self.wiring = tuple(wiring)
        self.last_use = {i: at for at, wire in enumerate(wiring) for i in wire.reads}

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs, heads = {-1: x}, []
        for at, (layer, wire) in enumerate(zip(self.layers, self.wiring, strict=True)):
            outputs[at] = layer(*(outputs[i] for i in wire.reads))
            if isinstance(layer, Yolo):
                heads.append(outputs[at])
            for i in wire.reads:
                if self.last_use[i] == at:
                    outputs.pop(i, None)
        return tuple(heads) if heads else outputs[len(self.layers) - 1]


def _reads(section: Section, at: int) -> tuple[int, ...]:
    """Numbers of the layers that layer `at` reads."""
    if section.kind == "route":
        asked = section.numbers("layers")
    elif section.kind in ("shortcut", "sam", "scale_channels"):
        asked = section.numbers("from")
    else:
        return (at - 1,)
    found = tuple(i if i >= 0 else at + i for i in asked)
    if not found or any(not 0 <= i < at for i in found):
        name = "layers" if section.kind == "route" else "from"
        do = "name layers before this one: from 0 on, or back from here (-1 is the one before)"
        raise section.refused(f"{name}={section.options.get(name, '')} in layer {at}", do)
    return found if section.kind == "route" else (at - 1, *found)


def _layer(section: Section, widths: list[int]) -> tuple[nn.Module, int]:
    """The module of a section that reads outputs of these widths, and its own width."""
    kind, width = section.kind, widths[0]
    if kind == "convolutional":
        convolution = Convolution(section, width)
        return convolution, convolution.conv.out_channels
    if kind == "route":
        groups, group = section.number("groups", 1), section.number("group_id", 0)
        if groups < 1 or not 0 <= group < groups or any(w % groups for w in widths):
            do = "use groups that divide every width, and a group_id below them"
            raise section.refused(f"groups={groups}, group_id={group} on {widths} channels", do)
        return Route(groups, group), sum(w // groups for w in widths)
    if kind in ("shortcut", "sam", "scale_channels"):
        if section.options.get("weights_type", "none") != "none" or section.number("scale_wh", 0):
            raise section.refused("weights of its own, or scaling by place", "build it in a factory of yours")
        if len(set(widths)) > 1:
            raise section.refused(f"{widths} channels together", "join layers of one width")
        return (Shortcut if kind == "shortcut" else Product)(activation(section)), width
    if kind == "maxpool":
        return MaxPool(section), width
    if kind == "avgpool":
        return nn.AdaptiveAvgPool2d(1), width
    if kind == "upsample":
        if (stride := section.number("stride", 2)) < 1:
            raise section.refused(f"stride={stride}", "use a stride from 1 on")
        return Upsample(stride, section.real("scale", 1.0)), width
    if kind == "dropout":
        return nn.Dropout(section.real("probability", 0.5)), width
    if kind == "yolo":
        end = Yolo(section)
        if width != end.head.width:
            found = f"{width} channels for {len(end.head.mask)} boxes of 5 + {end.head.classes} numbers"
            raise section.refused(found, "set filters of the layer before to boxes * (5 + classes)")
        return end, width
    known = "convolutional, route, shortcut, maxpool, avgpool, upsample, dropout, sam, scale_channels, yolo"
    raise section.refused("a layer of unknown kind", f"known: {known}")


def heads_of(sections: tuple[Section, ...]) -> tuple[YoloHead, ...]:
    """Settings of the [yolo] layers, in the order of the network's outputs."""
    return tuple(YoloHead.of(section) for section in sections if section.kind == "yolo")


def decode(model: Darknet, heads: tuple[Tensor, ...]) -> Tensor:
    """Boxes of all heads: centre x, y, width, height as shares of the picture, then objectness and class shares.

    `[batch, boxes, 5 + classes]`; a class's probability is its share times the objectness.
    """
    _, rows, columns = model.shape
    found = []
    for head, x in zip(heads_of(model.sections), heads, strict=True):
        raw = head.read(x, (rows, columns))
        first, last = raw.corners.div(x.new_tensor((columns, rows) * 2)).split(2, -1)
        objectness, labels = head.shares(raw)
        boxes = torch.cat(((first + last) / 2, last - first, objectness.unsqueeze(-1), labels), -1)
        found.append(boxes.flatten(1, 3))  # [batch, boxes * h * w, 5 + classes]
    return torch.cat(found, 1)
