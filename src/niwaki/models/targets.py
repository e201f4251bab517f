"""Boxes that a detector is to learn, checked against it."""

from collections.abc import Sequence

from niwaki.boxes import Boxes
from niwaki.errors import InputError


def refuse_targets(targets: Sequence[Boxes], *, pictures: int, classes: int) -> None:
    """Refuse targets that do not fit.

    Raises:
        InputError: more or fewer than pictures, or labels out of range.
    """
    if len(targets) != pictures:
        found = f"{len(targets)} targets for {pictures} pictures"
        raise InputError("the loss of a detector", found=found, do="give boxes, or none of them, for each picture")
    if wrong := sorted({int(n) for t in targets for n in t.labels.tolist() if not 0 <= n < classes}):
        found = f"labels {wrong[:6]}, where the network tells {classes} classes apart"
        raise InputError("the loss of a detector", found=found, do="number classes from 0, or build it for more")
