"""How detectors of darknet are trained and read: the loss of YOLOv4, and what their raw numbers find."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from niwaki.boxes import Boxes, Found
from niwaki.distill import HeadOutputs
from niwaki.errors import InputError
from niwaki.models.darknet_heads import Raw, YoloHead
from niwaki.models.darknet_net import Yolo
from niwaki.models.suppression import box_operations, suppressed
from niwaki.models.targets import refuse_targets
from niwaki.tasks.framing import Fit
from niwaki.units import tensors_in


@final
@dataclass(frozen=True)
class Things:
    """Things of a batch in one row."""

    corners: Tensor
    """`[things, 4]`, left, top, right, bottom in pixels."""
    labels: Tensor
    """`[things]`."""
    picture: Tensor
    """`[things]`, which one each is on."""


@final
@dataclass(frozen=True)
class Positives:
    """The boxes of one head that are told to be a thing; an entry a box and thing."""

    truth: Tensor
    """`[entries]`, which thing of the batch."""
    slot: Tensor
    """`[entries]`, which box of the head, counted through `[batch, boxes, rows, columns]`."""


@final
@dataclass(frozen=True)
class DarknetDetector:
    """Detectors that end in [yolo] layers.

    A thing is learned by the box with the best-shaped anchor in the cell of its centre, and by those whose anchors
    overlap its shape by more than iou_thresh. Losses are sums over boxes, divided by the pictures:

        box         iou_normalizer (1 - CIoU)       of boxes that learn a thing
        objectness  obj_normalizer BCE towards 1    of these, towards 0 of those that overlap nothing by ignore_thresh
        class       cls_normalizer BCE              of boxes that learn a thing, a sigmoid a class

    Source: Bochkovskiy et al. 2020, arXiv:2004.10934, sec. 3.4, with the cfg's settings as darknet reads them.
    Differs: gradients are those of the losses (darknet leaves out the slope of the centre's sigmoid); several things in
    one box give it the mean of their box losses and all their classes; a box overlaps a thing whatever its class;
    heads with squared errors (YOLOv3) learn their boxes by CIoU; max_delta, truth_thresh, objectness_smooth, focal
    losses and counters of classes are not used (a warning names those that a cfg sets).
    """

    heads: tuple[YoloHead, ...]
    """In the order of the network's outputs."""
    fit: Fit = "squash"
    """How pictures fill the frame: as darknet does unless its cfg says letter_box=1."""

    @property
    def classes(self) -> int:
        return self.heads[0].classes

    def losses(self, model: nn.Module, pictures: Tensor, targets: Sequence[Boxes]) -> dict[str, Tensor]:
        """`box`, `objectness` and `class` of `[batch, 3, rows, columns]` pictures from 0 to 1, weighted.

        Raises:
            InputError: outputs of another network, labels out of range, as many targets as pictures are not there, or
                heads that have no loss here (new_coords, another iou_loss).
            MissingExtraError: torchvision is not installed.
        """
        overlap = [self._overlap_loss(head) for head in self.heads]
        things = _joined(targets, len(pictures), self.classes, pictures.device)
        box, objectness, label = (pictures.new_zeros((), dtype=torch.float32) for _ in range(3))
        size = (pictures.shape[2], pictures.shape[3])
        for head, loss, x in zip(self.heads, overlap, self._maps(model, pictures), strict=True):
            raw = head.read(x.float(), size)
            own = assigned(head, raw, things, size)
            box = box + head.iou_normalizer * _box_loss(loss, raw, own, things)
            objectness = objectness + head.obj_normalizer * _objectness_loss(head, raw, own, things)
            label = label + head.cls_normalizer * _class_loss(head, raw, own, things)
        return {"box": box / len(pictures), "objectness": objectness / len(pictures), "class": label / len(pictures)}

    @torch.no_grad()
    def found(self, model: nn.Module, pictures: Tensor, *, confidence: float, overlap: float, most: int) -> list[Found]:
        """Boxes of which a class's share times the objectness is at least `confidence`, each class a box of its own."""
        size = (pictures.shape[2], pictures.shape[3])
        corners, scores = [], []
        for head, x in zip(self.heads, self._maps(model, pictures), strict=True):
            raw = head.read(x.float(), size)
            objectness, labels = head.shares(raw)
            corners.append(raw.corners.flatten(1, 3))
            scores.append((objectness.unsqueeze(-1) * labels).flatten(1, 3))
        return [
            suppressed(*pair, size, confidence=confidence, overlap=overlap, most=most)
            for pair in zip(torch.cat(corners, 1), torch.cat(scores, 1), strict=True)
        ]

    def head_places(self, model: nn.Module) -> tuple[str, ...]:
        """The [yolo] layers, whose outputs are the raw numbers.

        Raises:
            InputError: a network without them, as one that was cut by `torch.export`.
        """
        found = tuple(path for path, module in model.named_modules() if isinstance(module, Yolo))
        if len(found) != len(self.heads):
            said, do = f"a {type(model).__name__} with {len(found)} [yolo] layers", "give a network of darknet:FILE.cfg"
            raise InputError(f"the {len(self.heads)} heads of a darknet detector", found=said, do=do)
        return found

    def head_outputs(self, features: Sequence[Tensor], size: tuple[int, int]) -> list[HeadOutputs]:
        """Objectness and classes; centres as shares of their cell, widths and heights in cells."""
        return [HeadOutputs(*head.in_cells(x, size)) for head, x in zip(self.heads, features, strict=True)]

    def matched(self, features: Sequence[Tensor], targets: Sequence[Boxes], size: tuple[int, int]) -> list[Tensor]:
        """The boxes that the loss tells to be a thing."""
        things = _joined(targets, len(targets), self.classes, features[0].device)
        found = []
        for head, x in zip(self.heads, features, strict=True):
            raw = head.read(x.detach().float(), size)
            mine = torch.zeros(raw.objectness.numel(), dtype=torch.bool, device=x.device)
            mine[assigned(head, raw, things, size).slot] = True
            found.append(mine.view(len(x), -1))
        return found

    def _maps(self, model: nn.Module, pictures: Tensor) -> list[Tensor]:
        maps = tensors_in(model(pictures))
        widths, own = [x.shape[1] if x.dim() == 4 else x.shape for x in maps], [head.width for head in self.heads]
        if widths != own:
            found, do = f"outputs with {widths} channels, where the cfg says {own}", "give the detector of this network"
            raise InputError("read a darknet detector", found=found, do=do)
        return maps

    def _overlap_loss(self, head: YoloHead) -> Callable[[Tensor, Tensor], Tensor]:
        ops = box_operations()
        known = {
            "ciou": ops.complete_box_iou_loss,
            "diou": ops.distance_box_iou_loss,
            "giou": ops.generalized_box_iou_loss,
        }
        if head.new_coords:
            do = "train it with darknet; here it is only read"
            raise InputError("train a [yolo] layer", found="new_coords=1", where=head.where, do=do)
        if head.iou_loss not in known:
            do = f"use one of {', '.join(known)}"
            raise InputError("train a [yolo] layer", found=f"iou_loss={head.iou_loss}", where=head.where, do=do)
        return known[head.iou_loss]


def assigned(head: YoloHead, raw: Raw, things: Things, size: tuple[int, int]) -> Positives:
    """Which boxes of a head learn which things."""
    _, boxes, h, w = raw.objectness.shape
    first, last = things.corners.split(2, -1)
    shape = (last - first).unsqueeze(1)  # [things, 1, 2]
    anchors = things.corners.new_tensor(head.anchors)  # [anchors, 2]
    inside = torch.minimum(shape, anchors).prod(-1)
    overlap = inside / (shape.prod(-1) + anchors.prod(-1) - inside)  # [things, anchors], as if all centres were one
    mask = torch.tensor(head.mask, device=overlap.device)
    taken = overlap.argmax(1, keepdim=True) == mask
    if head.iou_thresh < 1:
        taken = taken | (overlap[:, mask] > head.iou_thresh)
    truth, box = taken.nonzero(as_tuple=True)
    cells = ((first + last) / 2 * things.corners.new_tensor((w / size[1], h / size[0]))).long()
    column, row = cells[:, 0].clamp(0, w - 1)[truth], cells[:, 1].clamp(0, h - 1)[truth]
    return Positives(truth, ((things.picture[truth] * boxes + box) * h + row) * w + column)


def _box_loss(loss: Callable[[Tensor, Tensor], Tensor], raw: Raw, own: Positives, things: Things) -> Tensor:
    """Sum over boxes; several things in one box count as their mean."""
    each = loss(raw.corners.reshape(-1, 4)[own.slot], things.corners[own.truth])
    crowd = torch.bincount(own.slot, minlength=raw.objectness.numel())
    return (each / crowd[own.slot]).sum()


def _objectness_loss(head: YoloHead, raw: Raw, own: Positives, things: Things) -> Tensor:
    told = torch.stack(
        [
            _largest_overlap(corners, things.corners[things.picture == i]) <= head.ignore_thresh
            for i, corners in enumerate(raw.corners.detach())
        ]
    ).flatten()
    target = torch.zeros_like(told, dtype=raw.objectness.dtype)
    told[own.slot], target[own.slot] = True, 1.0
    each = F.binary_cross_entropy_with_logits(raw.objectness.flatten(), target, reduction="none")
    return (each * told).sum()


def _class_loss(head: YoloHead, raw: Raw, own: Positives, things: Things) -> Tensor:
    slots, place = own.slot.unique(return_inverse=True)
    logits = raw.labels.reshape(-1, head.classes)[slots]
    target = torch.zeros_like(logits)
    target[place, things.labels[own.truth]] = 1.0
    target = target * (1 - head.label_smooth_eps) + head.label_smooth_eps / 2
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum")


def _largest_overlap(corners: Tensor, things: Tensor) -> Tensor:
    """Of each box `[..., 4]` with any of `[things, 4]`."""
    if not len(things):
        return corners.new_zeros(corners.shape[:-1])
    shares: Tensor = box_operations().box_iou(corners.reshape(-1, 4), things)
    return shares.amax(1).view(corners.shape[:-1])


def _joined(targets: Sequence[Boxes], pictures: int, classes: int, device: torch.device) -> Things:
    """Things of all pictures; those without width or height, which no box can overlap, are left out."""
    refuse_targets(targets, pictures=pictures, classes=classes)
    corners = torch.cat([t.corners.to(device).float() for t in targets])
    labels = torch.cat([t.labels.to(device).long() for t in targets])
    picture = torch.cat([torch.full((len(t),), i, device=device) for i, t in enumerate(targets)])
    real = (corners[:, 2:] > corners[:, :2]).all(1)
    return Things(corners[real], labels[real], picture[real])
