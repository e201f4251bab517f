"""Darknet cfgs of published detectors, written from their descriptions: layer by layer, numbers of layers absolute.

Pictures are 320 pixels wide unless asked otherwise (published: 608 and 416); the weights do not depend on it.
"""

from collections.abc import Callable

BOXES_V3 = "10,13, 16,30, 33,23, 30,61, 62,45, 59,119, 116,90, 156,198, 373,326"
BOXES_V4 = "12,16, 19,36, 40,28, 36,75, 76,55, 72,146, 142,110, 192,243, 459,401"
BOXES_TINY = "10,14, 23,27, 37,58, 81,82, 135,169, 344,319"
V4 = {"iou_loss": "ciou", "iou_normalizer": 0.07, "cls_normalizer": 1.0, "ignore_thresh": 0.7}
"""How YOLOv4 trains; its larger version also teaches the anchors that fit nearly as well as the best."""


class Cfg:
    """A cfg as it grows; every layer gives its number."""

    def __init__(self, size: int, *, classes: int = 80) -> None:
        self.lines = [f"[net]\nwidth={size}\nheight={size}\nchannels=3\n"]
        self.classes, self.last = classes, -1

    def add(self, kind: str, **settings: object) -> int:
        self.lines.append("\n".join([f"[{kind}]", *(f"{name}={value}" for name, value in settings.items()), ""]))
        self.last += 1
        return self.last

    def conv(self, filters: int, size: int, stride: int = 1, act: str = "leaky") -> int:
        return self.add(
            "convolutional", batch_normalize=1, filters=filters, size=size, stride=stride, pad=1, activation=act
        )

    def route(self, *layers: int) -> int:
        return self.add("route", layers=",".join(map(str, layers)))

    def residual(self, inner: int, outer: int, act: str) -> int:
        start = self.last
        self.conv(inner, 1, act=act)
        self.conv(outer, 3, act=act)
        return self.add("shortcut", **{"from": start, "activation": "linear"})

    def pairs(self, width: int, times: int) -> int:
        """1x1 and 3x3 convolutions in turn, ending with a 1x1."""
        for _ in range(times):
            self.conv(width, 1)
            self.conv(2 * width, 3)
        return self.conv(width, 1)

    def head(self, width: int, mask: str, anchors: str, scale: float = 1.0, **more: object) -> None:
        self.conv(width, 3)
        boxes = len(mask.split(","))
        self.add("convolutional", size=1, stride=1, pad=1, filters=boxes * (5 + self.classes), activation="linear")
        said = {"mask": mask, "anchors": anchors, "classes": self.classes, "num": anchors.count(",") // 2 + 1}
        self.add("yolo", **said, scale_x_y=scale, **more)

    def text(self) -> str:
        return "\n".join(self.lines)


def yolov4(size: int = 320, *, classes: int = 80) -> str:
    """CSPDarknet53 with mish, pyramid pooling, a path aggregation network, three heads (arXiv:2004.10934)."""
    net = Cfg(size, classes=classes)
    net.conv(32, 3, act="mish")
    outs = []
    for width, blocks in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        half = 64 if width == 64 else width // 2
        down = net.conv(width, 3, 2, "mish")
        aside = net.conv(half, 1, act="mish")
        net.route(down)
        net.conv(half, 1, act="mish")
        for _ in range(blocks):
            net.residual(32 if width == 64 else half, half, "mish")
        deep = net.conv(half, 1, act="mish")
        net.route(deep, aside)
        outs.append(net.conv(width, 1, act="mish"))
    net.pairs(512, 1)
    before = net.last
    pools = []
    for window in (5, 9, 13):
        if pools:
            net.route(before)
        pools.append(net.add("maxpool", stride=1, size=window))
    net.route(*reversed(pools), before)
    top = net.pairs(512, 1)
    lateral = []
    for width, skip in ((256, outs[3]), (128, outs[2])):
        net.conv(width, 1)
        up = net.add("upsample", stride=2)
        net.route(skip)
        side = net.conv(width, 1)
        net.route(side, up)
        lateral.append(net.pairs(width, 2))
    net.head(256, "0,1,2", BOXES_V4, 1.2, **V4, iou_thresh=0.213)
    last = lateral[1]
    for width, join, mask, scale in ((256, lateral[0], "3,4,5", 1.1), (512, top, "6,7,8", 1.05)):
        net.route(last)
        down = net.conv(width, 3, 2)
        net.route(down, join)
        last = net.pairs(width, 2)
        net.head(2 * width, mask, BOXES_V4, scale, **V4, iou_thresh=0.213)
    return net.text()


def yolov4_tiny(size: int = 320, *, classes: int = 80) -> str:
    """Three blocks that work on half of their channels, two heads (arXiv:2011.08036, sec. 4)."""
    net = Cfg(size, classes=classes)
    net.conv(32, 3, 2)
    net.conv(64, 3, 2)
    deep = -1
    for width in (64, 128, 256):
        whole = net.conv(width, 3)
        net.add("route", layers=whole, groups=2, group_id=1)
        one = net.conv(width // 2, 3)
        other = net.conv(width // 2, 3)
        net.route(other, one)
        deep = net.conv(width, 1)
        net.route(whole, deep)
        net.add("maxpool", size=2, stride=2)
    net.conv(512, 3)
    top = net.conv(256, 1)
    net.head(512, "3,4,5", BOXES_TINY, 1.05, **V4)
    net.route(top)
    net.conv(128, 1)
    up = net.add("upsample", stride=2)
    net.route(up, deep)
    net.head(256, "0,1,2", BOXES_TINY, 1.05, **V4)
    return net.text()


def yolov3(size: int = 320, *, classes: int = 80) -> str:
    """Darknet-53 and three heads (arXiv:1804.02767)."""
    net = Cfg(size, classes=classes)
    net.conv(32, 3)
    outs = []
    for width, blocks in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        net.conv(width, 3, 2)
        for _ in range(blocks):
            net.residual(width // 2, width, "leaky")
        outs.append(net.last)
    for width, mask, skip in ((512, "6,7,8", None), (256, "3,4,5", outs[3]), (128, "0,1,2", outs[2])):
        if skip is not None:
            net.conv(width, 1)
            up = net.add("upsample", stride=2)
            net.route(up, skip)
        last = net.pairs(width, 2)
        net.head(2 * width, mask, BOXES_V3)
        if width > 128:
            net.route(last)
    return net.text()


def yolov3_tiny(size: int = 320, *, classes: int = 80) -> str:
    """Convolutions and pools, the last of which keeps its size; two heads."""
    net = Cfg(size, classes=classes)
    skip = -1
    for width in (16, 32, 64, 128, 256, 512):
        last = net.conv(width, 3)
        skip = last if width == 256 else skip
        net.add("maxpool", size=2, stride=1 if width == 512 else 2)
    net.conv(1024, 3)
    top = net.conv(256, 1)
    net.head(512, "3,4,5", BOXES_TINY)
    net.route(top)
    net.conv(128, 1)
    up = net.add("upsample", stride=2)
    net.route(up, skip)
    net.head(256, "0,1,2", BOXES_TINY)
    return net.text()


CFGS: dict[str, Callable[..., str]] = {
    "yolov4": yolov4,
    "yolov4-tiny": yolov4_tiny,
    "yolov3": yolov3,
    "yolov3-tiny": yolov3_tiny,
}
