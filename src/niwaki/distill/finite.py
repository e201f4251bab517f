"""Distances that are not finite, told by the place that they come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from niwaki.errors import NotFiniteError


@final
@dataclass(frozen=True, eq=False)
class Place:
    """What was compared at one place."""

    asked: str
    where: str
    student: Tensor
    teacher: Tensor
    distance: Tensor
    """What came of it, or of this place and others together; a scalar."""

    @property
    def bad(self) -> list[str]:
        """Whose feature is not finite."""
        sides = {"the student's feature": self.student, "the teacher's feature": self.teacher}
        return [name for name, feature in sides.items() if not feature.isfinite().all()]


def refuse_not_finite(places: Sequence[Place]) -> None:
    """Refuse distances that are not finite. Features are looked at only then: otherwise one answer of the device is
    waited for.

    Raises:
        NotFiniteError: one is not; names the place and whose feature it is, or that the distance itself overflows.
    """
    if bool(torch.stack([place.distance.detach() for place in places]).isfinite().all()):
        return
    wrong = [place for place in places if not place.distance.isfinite()]
    place = next((place for place in wrong if place.bad), wrong[0])
    bad = " and ".join(place.bad)
    raise NotFiniteError(
        place.asked,
        found=f"NaN or infinity in {bad}" if bad else "features so large that their distance is not finite",
        where=place.where,
        do="look for NaN in data and weights; where it is the student's alone, lower lr or clip gradients (clip=10)",
    )
