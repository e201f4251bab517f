"""Mean average precision of detectors, counted by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from niwaki.boxes import Found
from niwaki.errors import InputError, MissingExtraError
from niwaki.tasks.framing import Entry

PLACES = {"AP": 0, "AP_small": 3, "AP_medium": 4, "AP_large": 5, "AP50": 1}
"""Where COCO's summary has a figure; in the order of reports."""
MEANS = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP_small": "mean over IoU 0.50 to 0.95, objects below 32 x 32 pixels of the original picture",
    "AP_medium": "mean over IoU 0.50 to 0.95, objects from 32 x 32 to 96 x 96 pixels of the original picture",
    "AP_large": "mean over IoU 0.50 to 0.95, objects above 96 x 96 pixels of the original picture",
    "AP50": "at IoU 0.50",
}
MOST = 100
"""Boxes of a picture that COCO counts, the surest ones."""
DRAWS = 100
"""Resamplings of the pictures that the spread is taken over."""
FEW = 1000
"""Pictures up to which resampling costs seconds; beyond there is no spread."""


@final
@dataclass(frozen=True)
class Precision:
    """One figure: a share of 1, and how far it spreads."""

    value: float
    definition: str
    spread: float | None = None


def average_precision(truth: Sequence[Entry], found: Sequence[Found], classes: Sequence[str]) -> dict[str, Precision]:
    """Average precision by COCO's rules, "AP50" last; sizes of which there is no object are left out.

    The mean over classes that have objects, of the precision at 101 recalls. Crowds and difficult objects are not
    asked for. The spread, of AP50 alone, is the standard deviation over resamplings of the pictures (bootstrap), by a
    fixed seed; none above 1000 pictures.

    Source: COCO's detection evaluation (pycocotools); VOC's own AP50 takes the area under the curve instead of 101
    recalls.

    Raises:
        InputError: no object to be found.
        MissingExtraError: pycocotools is not installed.
    """
    if not any(bool((~one.ignored).any()) for one in truth):
        raise InputError("average precision", found="no object on the pictures", do="give pictures with boxes")
    sides = _sides(truth, found, classes)
    with contextlib.redirect_stdout(io.StringIO()):
        judge = _judge(*sides)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    counted = {name: float(judge.stats[place]) for name, place in PLACES.items()}
    spread = _spread(*sides) if len(truth) <= FEW else None
    return {
        name: Precision(value, MEANS[name], spread if name == "AP50" else None)
        for name, value in counted.items()
        if value >= 0  # -1: nothing of this size
    }


def _judge(*sides: Any) -> Any:
    from pycocotools.cocoeval import COCOeval

    return COCOeval(*sides, iouType="bbox")


def _sides(truth: Sequence[Entry], found: Sequence[Found], classes: Sequence[str]) -> list[Any]:
    """What there is and what was found, as pycocotools has them."""
    try:
        from pycocotools.coco import COCO
    except ImportError as cause:
        do = 'pip install "niwaki[detection]"'
        raise MissingExtraError("average precision needs pycocotools", do=do) from cause
    images = [{"id": number, "width": one.width, "height": one.height} for number, one in enumerate(truth)]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes)]
    real = [
        _record(number, corners, label, area=area, iscrowd=int(ignored))
        for number, one in enumerate(truth)
        for corners, label, area, ignored in zip(
            one.boxes.corners.tolist(),
            one.boxes.labels.tolist(),
            one.areas.tolist(),
            one.ignored.tolist(),
            strict=True,
        )
    ]
    told = [
        _record(number, corners, label, score=score, iscrowd=0)
        for number, one in enumerate(found)
        for corners, label, score in zip(one.corners.tolist(), one.labels.tolist(), one.scores.tolist(), strict=True)
    ]
    sides = []
    with contextlib.redirect_stdout(io.StringIO()):
        for records in (real, told):
            side = COCO()
            listed = [{**record, "id": number} for number, record in enumerate(records, start=1)]  # 0 would be no match
            side.dataset = {"info": {}, "images": images, "categories": categories, "annotations": listed}
            side.createIndex()
            sides.append(side)
    return sides


def _record(picture: int, corners: list[float], label: int, area: float | None = None, **more: Any) -> dict[str, Any]:
    left, top, right, bottom = corners
    box = [left, top, right - left, bottom - top]
    return {"image_id": picture, "category_id": label, "bbox": box, "area": area or box[2] * box[3], **more}


def _spread(*sides: Any) -> float:
    """Standard deviation of AP50 over resamplings of the pictures."""
    judge, values = _judge(*sides), []
    p = judge.params
    p.iouThrs, p.areaRng, p.areaRngLbl, p.maxDets = p.iouThrs[:1], p.areaRng[:1], p.areaRngLbl[:1], [MOST]
    with contextlib.redirect_stdout(io.StringIO()):
        judge.evaluate()
        pictures = len(p.imgIds)
        each = np.array(judge.evalImgs, dtype=object).reshape(-1, pictures)  # [classes, pictures]
        generator = np.random.default_rng(0)
        for _ in range(DRAWS):
            judge.evalImgs = list(each[:, generator.integers(pictures, size=pictures)].ravel())
            judge.accumulate()
            precision = judge.eval["precision"]
            if (precision >= 0).any():  # not where no picture with an object was drawn
                values.append(float(precision[precision >= 0].mean()))
    return float(np.std(values)) if values else 0.0
