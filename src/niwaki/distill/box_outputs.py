"""What a detector's heads put out, taught: classes of every box, and where the boxes that learn a thing lie."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from niwaki.boxes import Boxes
from niwaki.distill.finite import Place, refuse_not_finite
from niwaki.distill.taps import tapped, unwrapped
from niwaki.distill.taught import Around, Taught
from niwaki.errors import InputError
from niwaki.graph.skeleton import copy_with, shared
from niwaki.units import device_of


@final
@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """What one head of a detector says of `n` boxes of each picture."""

    scores: Float[Tensor, "batch n k"]
    """Logits of a vector whose shares are compared: objectness and classes, or nothing and classes."""
    boxes: Float[Tensor, "batch n 4"]
    """Boxes in units of the head's grid."""


@runtime_checkable
class Heads(Protocol):
    """What a family of detectors must know of its heads; `niwaki.models.load(...).detector` of darknet and ultralytics
    has it.
    """

    def head_places(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of the modules whose outputs are read."""

    def head_outputs(self, features: Sequence[Tensor], size: tuple[int, int]) -> list[HeadOutputs]:
        """What was put out at these places, in their order, of pictures of `size` (rows, columns); a value a head."""

    def matched(
        self, features: Sequence[Tensor], targets: Sequence[Boxes], size: tuple[int, int]
    ) -> list[Bool[Tensor, "batch n"]]:
        """Which boxes of each head learn a thing."""


@final
@dataclass(frozen=True)
class BoxOutputs:
    """Distances of a student detector's outputs from its teacher's, by name.

        class    weight * T^2 / B * sum over boxes of KL(softmax(teacher / T) || softmax(student / T)), of every box
        box      weight * sum of squared differences of boxes, of those that learn a thing

    Source: Chu et al. 2022, arXiv:2306.01526, official code (its third strategy; an option of its training, weights
    for YOLOv4). Differs: heads without objectness have a logit of 0 in its place ("nothing"); where boxes are not
    assigned to anchors, those learn a thing whose cell's centre lies in it.

    Raises:
        InputError: a setting out of its range.

    Examples:
        >>> student = HeadOutputs(torch.zeros(1, 1, 2), torch.tensor([[[0.5, 0.5, 2.0, 2.0]]]))
        >>> teacher = HeadOutputs(torch.tensor([[[math.log(3.0), 0.0]]]), torch.tensor([[[0.5, 0.5, 2.0, 4.0]]]))
        >>> how = BoxOutputs(temperature=1.0, classes=1.0, boxes=1.0)
        >>> parts = how([student], [teacher], [torch.tensor([[True]])])
        >>> {name: round(value.item(), 4) for name, value in parts.items()}  # 3/4 ln 3/2 + 1/4 ln 1/2; (4 - 2)^2
        {'class': 0.1308, 'box': 4.0}
    """

    temperature: float = 3.0
    """T, above 0; logits are divided by it."""
    classes: float = 1e-3
    """Weight of the class term; 1e-3 for YOLOv4, 1e-2 for YOLOv3. 0 leaves it out."""
    boxes: float = 1e-3
    """Weight of the box term, alike."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise InputError(f"BoxOutputs(temperature={self.temperature!r})", do="give a temperature above 0")
        for name in ("classes", "boxes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"BoxOutputs({name}={getattr(self, name)!r})", do="give a weight of 0 or more")
        if not self.classes and not self.boxes:
            raise InputError("BoxOutputs without weights", do="give one above 0, or leave it out")

    def __call__(
        self,
        student: Sequence[HeadOutputs],
        teacher: Sequence[HeadOutputs],
        matched: Sequence[Bool[Tensor, "batch n"]],
    ) -> dict[str, Float[Tensor, ""]]:
        """`class` and `box` of a batch, weighted; those of weight 0 are not there."""
        found: dict[str, Tensor] = {}
        pairs = list(zip(student, teacher, strict=True))
        if self.classes:
            terms = [
                functional.kl_div(
                    functional.log_softmax(ours.scores.float() / self.temperature, dim=-1),
                    functional.log_softmax(theirs.scores.detach().float() / self.temperature, dim=-1),
                    reduction="sum",
                    log_target=True,
                )
                for ours, theirs in pairs
            ]
            batch = len(pairs[0][0].scores)
            found["class"] = self.classes * self.temperature**2 / batch * torch.stack(terms).sum()
        if self.boxes:
            apart = [(ours.boxes.float() - theirs.boxes.detach().float()).square().sum(-1) for ours, theirs in pairs]
            each = [(far * mine).sum() for far, mine in zip(apart, matched, strict=True)]
            found["box"] = self.boxes * torch.stack(each).sum()
        return found


@final
@dataclass(frozen=True, eq=False)
class OutputTaught(Around):
    """`task`, a detection, whose loss also pulls the heads' outputs towards the teacher's; all else is the task's.

    The teacher sees what the student sees, in evaluation mode and without gradients.

    Raises:
        InputError: a detector whose heads niwaki does not know, or whose modules were rewritten.
        NotFiniteError: in any batch, outputs that are NaN or infinite; says at which place, and whose.
    """

    task: Taught
    teacher: nn.Module
    how: BoxOutputs
    heads: Heads
    """Of the family: the detection's detector."""
    _frozen: nn.Module = field(init=False, repr=False)

    def __post_init__(self) -> None:
        teacher = unwrapped(self.teacher)
        self.heads.head_places(teacher)
        object.__setattr__(self, "_frozen", copy_with(teacher, shared).eval().requires_grad_(False))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The task's loss and the distances, summed."""
        return torch.stack([part.reshape(()) for part in self.parts(model, batch).values()]).sum()

    def parts(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The task's loss as "task", then "class outputs" and "box outputs", weighted."""
        places = self.heads.head_places(unwrapped(model))
        with tapped(model, places) as ours:
            own = self.task.loss(model, batch)
        if len(ours.calls) != 1:
            found = f"a loss that calls the model {len(ours.calls)} times"
            raise InputError("distil outputs", found=found, do="use a task whose loss calls the model once")
        args, kwargs = ours.calls[0]
        teacher, place = self._frozen, device_of(model)
        if device_of(teacher) != place:
            teacher.to(place)
        with torch.no_grad(), tapped(teacher, places) as theirs:
            teacher(*args, **kwargs)
        heard = ((ours, "student"), (theirs, "teacher"))
        mine, target = ([one.feature(path, whose) for path in places] for one, whose in heard)
        rows, columns = args[0].shape[-2:]
        told, wanted = (self.heads.head_outputs(features, (rows, columns)) for features in (mine, target))
        matched = self.heads.matched(mine, [boxes.to(place) for boxes in batch[1]], (rows, columns))
        distances = self.how(told, wanted, matched)
        total = torch.stack(list(distances.values())).sum()
        refuse_not_finite([Place("distil outputs", *one, total) for one in zip(places, mine, target, strict=True)])
        return {"task": own, **{f"{name} outputs": value for name, value in distances.items()}}
