"""What is left of a detector's boxes on one picture."""

from typing import Any

from torch import Tensor

from niwaki.boxes import Found
from niwaki.errors import MissingExtraError

CANDIDATES = 30_000  # of one picture, the surest, before suppression: its time grows with their square


def box_operations() -> Any:
    """`torchvision.ops`.

    Raises:
        MissingExtraError: torchvision is not installed.
    """
    try:
        from torchvision import ops
    except ImportError as cause:
        raise MissingExtraError("detectors need torchvision", do='pip install "niwaki[vision]"') from cause
    return ops


def suppressed(
    corners: Tensor, scores: Tensor, size: tuple[int, int], *, confidence: float, overlap: float, most: int
) -> Found:
    """What is left of `[boxes, 4]` with scores `[boxes, classes]` on a picture of `size` (rows, columns) pixels.

    A box counts once for every class that is at least `confidence`; of two boxes of one class whose intersection over
    union is above `overlap` the less sure one goes; `most` stay, and what lies outside of the picture is clipped then.
    """
    ops = box_operations()
    box, label = (scores >= confidence).nonzero(as_tuple=True)
    surest = scores[box, label]
    if len(surest) > CANDIDATES:
        surest, best = surest.topk(CANDIDATES)
        box, label = box[best], label[best]
    corners = corners[box]
    kept = ops.batched_nms(corners, surest, label, overlap)[:most]
    return Found(ops.clip_boxes_to_image(corners[kept], size), label[kept], surest[kept])
