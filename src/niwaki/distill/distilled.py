"""A task whose loss also pulls the student towards its teacher, the uncut network."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from niwaki.distill.alignment import Kept, kept_at
from niwaki.distill.finite import Place, refuse_not_finite
from niwaki.distill.loss import Located, Loss, cells_of, channel_axis
from niwaki.distill.taps import OUTPUT, Heard, module_at, tapped, unwrapped
from niwaki.distill.taught import Around, Taught, covering
from niwaki.errors import InputError, NotFiniteError
from niwaki.graph.skeleton import copy_with, shared
from niwaki.plan import Plan
from niwaki.units import device_of, map_tensors, run

Tap = str | tuple[str, str]


@final
@dataclass(frozen=True)
class Weighted:
    """A distillation loss, what it counts, and where it listens.

    Raises:
        InputError: a weight that is not above 0, or taps that are no tuple of paths.

    Examples:
        >>> from niwaki.distill import ChannelWise
        >>> Weighted(ChannelWise(), 3.0, taps=("layer2", ("layer3", "stage3"))).pairs
        (('layer2', 'layer2'), ('layer3', 'stage3'))
    """

    loss: Loss
    weight: float = 1.0
    """What the loss is multiplied by, above 0; it is summed over the taps."""
    taps: tuple[Tap, ...] = (OUTPUT,)
    """Module paths, or pairs (student's path, teacher's path); "" is the network's own output: a tensor, its `logits`,
    or the first of a tuple."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise InputError(
                f"Weighted({type(self.loss).__name__}, weight={self.weight!r})", do="give a weight above 0"
            )
        if not self.taps or isinstance(self.taps, str):
            raise InputError(f"Weighted(taps={self.taps!r})", do='give a tuple of module paths, such as ("layer3",)')

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(student's path, teacher's path) of every tap."""
        return tuple((tap, tap) if isinstance(tap, str) else tap for tap in self.taps)


@final
@dataclass(frozen=True, eq=False)
class Distilled(Around):
    """`task` with distillation: its loss plus weighted distances from the teacher's outputs and features.

    The teacher sees exactly what the student is called on (augmented, on its device), once a batch, in evaluation mode
    and without gradients; it is the given network's own memory under modules of its own, so that the given one stays
    as it is. All else is the task's: batches, metric, evaluation. A loss that needs equal widths compares with those
    of the teacher's channels that the plan kept. A student that was cut through the exported door has no modules of its
    teacher's names: its output is all there is to tap.

    Raises:
        InputError: nothing to distil, a tap that is never reached, features whose shapes do not fit, an adapter without
            a student, a student that shares weights with the teacher.
        NotFiniteError: the teacher puts out NaN or infinity; or, in any batch, a distance is not finite: the error says
            at which place, and of which of the two features.
        UnknownNameError: a path that does not exist.
        PlanMismatchError: the plan is not one of the teacher.

    Examples:
        >>> import niwaki
        >>> task = niwaki.tasks.Classification(niwaki.data.open("digits"), batch=8)
        >>> teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> taught = Distilled(task, teacher, (Weighted(niwaki.distill.Logits(4.0)),))
        >>> parts = taught.parts(teacher, task.calibration(1, 0)[0])
        >>> list(parts), parts["logits"].item()
        (['task', 'logits'], 0.0)
    """

    task: Taught
    teacher: nn.Module
    losses: tuple[Weighted, ...]
    plan: Plan | None = None
    """What the student was cut from the teacher by; needed where a loss wants equal widths and they were cut."""
    student: nn.Module | None = None
    """What will be trained: needed for adapters, whose widths it tells; where given, every tap is tried at once."""
    task_weight: float = 1.0
    """Of the task's own loss, 0 or more."""
    seed: int = 0
    """Of the first numbers of adapters."""
    extra: nn.Module | None = field(init=False, default=None)
    """Adapters, which are trained beside the student and are no part of it; None where no loss has any."""
    _frozen: nn.Module = field(init=False, repr=False)
    _kept: dict[str, Kept] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.losses:
            raise InputError("distil", found="no losses", do="give some, such as (Weighted(Logits()),)")
        if not 0 <= self.task_weight < math.inf:
            raise InputError(f"Distilled(task_weight={self.task_weight!r})", do="give a weight of 0 or more")
        teacher = unwrapped(self.teacher)
        if getattr(self.task, "detector", None) is not None and OUTPUT in {
            path for pair in self._pairs for path in pair
        }:
            raise InputError(
                "distil the output of a detector",
                found="maps of several numbers a box, no scores of one thing",
                do="tap modules inside, or let its heads teach: OutputTaught(task, teacher, BoxOutputs(), detector)",
            )
        for _, path in self._pairs:
            module_at(teacher, path)
        if (masked := next((one for one in self.losses if _on_things(one.loss)), None)) and covering(self.task) is None:
            raise InputError(
                f"distil by {_name(masked.loss)} where things lie",
                found=f"a {type(self.task).__name__}, whose batches do not say where",
                do="use it in a detection, or leave things=True out",
            )
        frozen = copy_with(teacher, shared).eval().requires_grad_(False)
        object.__setattr__(self, "_frozen", frozen)
        equal = {
            theirs for one in self.losses if one.loss.widths == "equal" for _, theirs in one.pairs if theirs != OUTPUT
        }
        object.__setattr__(self, "_kept", kept_at(teacher, self.plan, equal) if self.plan and equal else {})
        if self.student is not None:
            object.__setattr__(self, "extra", self._tried(self.student))
        elif adapted := [one for one in self.losses if one.loss.widths == "adapted"]:
            raise InputError(
                f"distil by {_name(adapted[0].loss)} with an adapter",
                found="no student to tell its width",
                do="Distilled(..., student=model)",
            )

    @property
    def classes(self) -> int | None:
        """Those of the task, where its pictures can be mixed: the teacher sees them mixed, too."""
        found: int | None = getattr(self.task, "classes", None)
        return found

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The task's loss and the distances, weighted and summed."""
        parts = self.parts(model, batch)
        return torch.stack([self.task_weight * parts["task"], *(parts[name] for name in parts if name != "task")]).sum()

    def parts(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The task's loss as "task" (not yet weighted), then each distance by its name, weighted."""
        with tapped(model, {ours for ours, _ in self._pairs}) as student:
            own = self.task.loss(model, batch)
        if len(student.calls) != 1:
            raise InputError(
                "distil",
                found=f"a loss that calls the model {len(student.calls)} times",
                where=type(self.task).__name__,
                do="use a task whose loss calls the model it is given once",
            )
        return {"task": own, **self._distances(student, self._taught(model, *student.calls[0]), batch)}

    @property
    def _pairs(self) -> list[tuple[str, str]]:
        return [pair for one in self.losses for pair in one.pairs]

    def _taught(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Heard:
        """What the teacher makes of what the student was called on."""
        place = device_of(model)
        if device_of(self._frozen) != place:
            self._frozen.to(place)  # its tensors are then its own, the given teacher's stay where they are
        with torch.no_grad(), tapped(self._frozen, {theirs for _, theirs in self._pairs}) as heard:
            self._frozen(*args, **kwargs)
        return heard

    def _distances(self, student: Heard, teacher: Heard, batch: Any = None) -> dict[str, Tensor]:
        """By name; without a batch, of which nothing is known where, everywhere."""
        found: dict[str, Tensor] = {}
        looked: list[Place] = []
        for number, one in enumerate(self.losses):
            name = _name(one.loss)
            distances = []
            for ours, theirs in one.pairs:
                mine, target = student.feature(ours, "student"), teacher.feature(theirs, "teacher")
                if one.loss.widths == "equal" and theirs in self._kept:
                    target = self._kept[theirs].of(target)
                if one.loss.widths == "adapted":
                    assert self.extra is not None
                    mine = _mapped(mine, self.extra.get_submodule(_key(number, ours)), one.loss.channels)
                where = f"student's {ours or 'output'}, teacher's {theirs or 'output'}"
                distances.append(_told(self._over(one.loss, batch), mine, target, where))
                looked.append(Place(f"distil by {name}", where, mine, target, distances[-1]))
            label = name if name not in found else f"{name} {number + 1}"
            found[label] = one.weight * torch.stack(distances).sum()
        refuse_not_finite(looked)
        return found

    def _over(self, loss: Loss, batch: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """The distance, at the cells where things of the batch lie if that is asked."""
        if not _on_things(loss):
            return loss
        assert isinstance(loss, Located)
        known = covering(self.task)

        def among(mine: Tensor, target: Tensor) -> Tensor:
            cells = cells_of(mine, loss.channels)
            if batch is None or known is None:
                return loss(mine, target)
            return loss.among(mine, target, known.covered(batch, cells).to(mine.device))

        return among

    def _tried(self, student: nn.Module) -> nn.Module | None:
        """The adapters; every tap of student and teacher is reached once and every loss computed, on an example."""
        held = {tensor.data_ptr() for tensor in self.teacher.parameters() if tensor.numel()}
        if any(tensor.data_ptr() in held for tensor in student.parameters() if tensor.numel()):
            found, do = "student and teacher share weights", "give a copy (copy.deepcopy) as teacher"
            raise InputError("distil", found=found, do=do)
        place = device_of(student)
        example = map_tensors(self.task.example(), lambda tensor: tensor.to(place))
        modes = [(module, module.training) for module in student.modules()]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                student.eval()
                with tapped(student, {ours for ours, _ in self._pairs}) as heard:
                    run(student, example)
            finally:
                for module, training in modes:
                    module.training = training
            torch.random.default_generator.manual_seed(self.seed)  # torch.manual_seed would seed GPUs, too
            taught = self._taught(student, *heard.calls[0])
            adapters = nn.ModuleDict()
            for number, one in enumerate(self.losses):
                for ours, theirs in one.pairs if one.loss.widths == "adapted" else ():
                    mine, target = heard.feature(ours, "student"), taught.feature(theirs, "teacher")
                    before, after = (f.shape[channel_axis(tuple(f.shape), one.loss.channels)] for f in (mine, target))
                    adapters[_key(number, ours)] = nn.Linear(before, after).to(place, mine.dtype)
            extra = adapters if len(adapters) else None
            object.__setattr__(self, "extra", extra)
            for path in {theirs for _, theirs in self._pairs}:
                if not taught.feature(path, "teacher").isfinite().all():
                    where = path or "the output"
                    raise NotFiniteError("distil", found="NaN or infinity in the teacher", where=where, do="repair it")
            self._distances(heard, taught)
        return extra


def _key(number: int, path: str) -> str:
    """The name of an adapter: a module's name has no dots."""
    return f"{number}:{path.replace('.', '/')}"


def _on_things(loss: Loss) -> bool:
    return isinstance(loss, Located) and loss.on_things


def _name(loss: Loss) -> str:
    return type(loss).__module__.rpartition(".")[2]


def _mapped(feature: Tensor, adapter: nn.Module, axis: int | None) -> Tensor:
    """`feature` with its channels mapped at every position."""
    at = channel_axis(tuple(feature.shape), axis)
    return adapter(feature.movedim(at, -1)).movedim(-1, at)


def _told(loss: Callable[[Tensor, Tensor], Tensor], mine: Tensor, target: Tensor, where: str) -> Tensor:
    """The distance; an error names the place."""
    try:
        return loss(mine, target)
    except InputError as error:
        raise type(error)(error.asked, found=error.found, where=where, do=error.do) from None
