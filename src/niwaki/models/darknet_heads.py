"""The ends of darknet's detectors: what their [yolo] sections say, and the boxes that their raw numbers mean."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from niwaki.models.darknet_cfg import Section

LARGEST = 10.0  # e^10 anchors are more than any picture; beyond it boxes would become infinite


@final
@dataclass(frozen=True)
class Raw:
    """Raw numbers of one head, sorted: boxes in pixels, the rest as logits (with new_coords: as probabilities)."""

    corners: Tensor
    """`[batch, boxes, rows, columns, 4]`: left, top, right, bottom."""
    objectness: Tensor
    """`[batch, boxes, rows, columns]`."""
    labels: Tensor
    """`[batch, boxes, rows, columns, classes]`."""


@final
@dataclass(frozen=True)
class YoloHead:
    """Settings of one [yolo] layer. What a section does not say has darknet's default, but for the box loss: there
    CIoU with a weight of 0.07, as in YOLOv4.
    """

    anchors: tuple[tuple[float, float], ...]
    """Width and height in pixels, of the boxes of all heads."""
    mask: tuple[int, ...]
    """Which of the anchors are this head's."""
    classes: int
    where: str = ""
    """File and line, for messages."""
    scale_x_y: float = 1.0
    """Centres reach this far over their cell."""
    new_coords: bool = False
    """Boxes of Scaled-YOLOv4: everything has been through a sigmoid, and sizes are (2 t)^2 anchors."""
    iou_loss: str = "ciou"
    """One of ciou, diou, giou."""
    iou_normalizer: float = 0.07
    """Weight of the box loss."""
    obj_normalizer: float = 1.0
    """Weight of the objectness loss."""
    cls_normalizer: float = 1.0
    """Weight of the class loss."""
    ignore_thresh: float = 0.5
    """Boxes that overlap a thing by more than this are not told to be background."""
    iou_thresh: float = 1.0
    """Anchors whose shape overlaps a thing's by more than this learn it too, besides the best one; 1 for none."""
    label_smooth_eps: float = 0.0
    """Classes are trained towards eps / 2 and 1 - eps / 2 in place of 0 and 1."""

    @classmethod
    def of(cls, section: Section) -> "YoloHead":
        """What a section says.

        Raises:
            InputError: no anchors, a mask of others, or settings that are no numbers.
        """
        try:
            flat = [float(item) for item in section.options.get("anchors", "").split(",") if item.strip()]
        except ValueError as cause:
            raise section.refused(f"anchors={section.options['anchors']}", "write numbers") from cause
        pairs = tuple(zip(flat[::2], flat[1::2], strict=False))
        mask = section.numbers("mask") or tuple(range(len(pairs)))
        if not pairs or any(not 0 <= i < len(pairs) for i in mask):
            raise section.refused(f"{len(pairs)} anchors, mask {mask}", "give anchors, and a mask of their numbers")
        overlap = section.options.get("iou_loss", "mse")
        overlap = "ciou" if overlap == "mse" else overlap  # squared errors of YOLOv3: its boxes learn by CIoU here
        return cls(
            anchors=pairs,
            mask=mask,
            classes=section.number("classes", 20),
            where=f"{section.where}:{section.line}",
            scale_x_y=section.real("scale_x_y", 1.0),
            new_coords=bool(section.number("new_coords", 0)),
            iou_loss=overlap,
            iou_normalizer=section.real("iou_normalizer", 0.07),
            obj_normalizer=section.real("obj_normalizer", 1.0),
            cls_normalizer=section.real("cls_normalizer", 1.0),
            ignore_thresh=section.real("ignore_thresh", 0.5),
            iou_thresh=section.real("iou_thresh", 1.0),
            label_smooth_eps=section.real("label_smooth_eps", 0.0),
        )

    @property
    def width(self) -> int:
        """Channels of the raw numbers."""
        return len(self.mask) * (5 + self.classes)

    def read(self, x: Tensor, size: tuple[int, int]) -> Raw:
        """Raw numbers `[batch, boxes * (5 + classes), h, w]`, of pictures of `size` (rows, columns) pixels."""
        batch, _, h, w = x.shape
        x = x.view(batch, len(self.mask), 5 + self.classes, h, w).permute(0, 1, 3, 4, 2)
        place, shape = x[..., :2], x[..., 2:4]  # [batch, boxes, h, w, 2]
        if not self.new_coords:
            place = place.sigmoid()
        sy, sx = torch.meshgrid(torch.arange(h).to(x), torch.arange(w).to(x), indexing="ij")
        place = place * self.scale_x_y - (self.scale_x_y - 1) / 2 + torch.stack((sx, sy), -1)
        centre = place * x.new_tensor((size[1] / w, size[0] / h))
        times = (2 * shape) ** 2 if self.new_coords else shape.clamp(max=LARGEST).exp()
        half = times * x.new_tensor([self.anchors[i] for i in self.mask]).view(1, -1, 1, 1, 2) / 2
        return Raw(torch.cat((centre - half, centre + half), -1), x[..., 4], x[..., 5:])

    def in_cells(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """`[batch, n, 1 + classes]` logits of objectness and classes; `[batch, n, 4]` boxes in cells of the grid, the
        centre from the corner of its own cell."""
        batch, _, h, w = x.shape
        x = x.view(batch, len(self.mask), 5 + self.classes, h, w).permute(0, 1, 3, 4, 2)
        place, shape = x[..., :2], x[..., 2:4]  # [batch, boxes, h, w, 2]
        times = (2 * shape) ** 2 if self.new_coords else shape.clamp(max=LARGEST).exp()
        anchors = x.new_tensor([self.anchors[i] for i in self.mask]).view(1, -1, 1, 1, 2)
        sides = times * anchors * x.new_tensor((w / size[1], h / size[0]))
        boxes = torch.cat((place if self.new_coords else place.sigmoid(), sides), -1)
        return x[..., 4:].flatten(1, 3), boxes.flatten(1, 3)

    def shares(self, raw: Raw) -> tuple[Tensor, Tensor]:
        """Objectness and classes as shares from 0 to 1."""
        return (raw.objectness, raw.labels) if self.new_coords else (raw.objectness.sigmoid(), raw.labels.sigmoid())
