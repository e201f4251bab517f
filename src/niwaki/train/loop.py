"""The training loop: epochs of steps, each of one or more batches, from a position that a checkpoint may give."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, NotFiniteError
from niwaki.pressure import Moment, Pressure
from niwaki.train.average import Average
from niwaki.train.checkpoints import Saved, prune, write_checkpoint
from niwaki.train.history import Log
from niwaki.train.mixing import mixed
from niwaki.train.processes import Processes
from niwaki.train.state import (
    optimizer_state,
    placed_like,
    put_optimizer_state,
    put_whole,
    random_state,
    seed_all,
    set_random_state,
    whole,
    whole_state,
)
from niwaki.train.untouched import translated
from niwaki.units import map_tensors

if TYPE_CHECKING:
    from niwaki.train.recovery import Recovery

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with batches done, batches in all, and a few words."""

CHECK_EVERY = 16  # batches between looks at the losses: each look waits for the device
CHECKPOINTS = "checkpoints"
APART = 1_000_003  # between the orders of two seeds: they never share the order of an epoch


class Trainable(Protocol):
    """What training asks of a task; `niwaki.tasks.Task` has it.

    A task may besides have `extra`, a module of its own (adapters of a distillation), or None: its parameters are
    trained with the model's, on the same device, all or nothing holds for them too, and checkpoints hold them. To mix
    pictures it must say `classes`, to be validated it must `evaluate`. Where its batches change as a training goes on,
    `late(epoch, epochs)` gives the task that makes those of an epoch (from 0).
    """

    @property
    def steps(self) -> int: ...

    def train_batches(self, seed: int) -> Iterator[Any]: ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...


@dataclass
class Position:
    """How far training has come."""

    epoch: int = 0
    batch: int = 0
    """Of this epoch, of this process."""
    step: int = 0
    """Of the optimiser."""
    bad: int = 0
    """Looks at the validation split in a row without a better value."""
    best: float | None = None
    looks: list[list[float]] = field(default_factory=list)
    """Value and step of every look at the validation split."""
    stopped: bool = False
    epochs: list[dict[str, float]] = field(default_factory=list)

    def best_steps(self, count: int, *, lower: bool) -> set[int]:
        """Steps of the best looks; of equal ones the earlier.

        Examples:
            >>> Position(looks=[[0.5, 10], [0.9, 20], [0.5, 30]]).best_steps(2, lower=False)
            {10, 20}
        """
        ranked = sorted(self.looks, key=lambda look: (look[0] if lower else -look[0], look[1]))
        return {int(step) for _, step in ranked[:count]}


@final
class Loop:
    """One training, from its start or from a checkpoint."""

    def __init__(
        self,
        how: "Recovery",
        task: Trainable,
        processes: Processes,
        *,
        called: nn.Module,
        bare: nn.Module,
        extra: nn.Module,
        progress: Progress | None,
        pressure: Pressure | None = None,
    ) -> None:
        self.how, self.task, self.processes, self.progress = how, task, processes, progress
        self.pressure = pressure
        self.memory: dict[str, Tensor] = {} if pressure is None else pressure.memory(bare)
        self.called, self.bare, self.extra = called, bare, extra
        self.device = processes.device
        self.named = {f"model.{name}": p for name, p in bare.named_parameters() if p.requires_grad}
        self.own = {f"extra.{name}": p for name, p in extra.named_parameters() if p.requires_grad}
        self.optimizer = how.new_optimizer(list(self.named.values()), list(self.own.values()))
        self.precision = how.speed.precision if how.speed.precision != "fp32" else processes.precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.average = Average(bare, how.ema) if how.ema else None
        self.at = Position()
        self.losses: list[Tensor] = []
        self.began: Tensor | None = None  # random state at the start of the epoch
        self.now: Tensor | None = None  # and where the checkpoint was written, until it is put back
        count = processes.count
        self.per_epoch = max(1, min(task.steps, (how.limit or task.steps) * count) // count)
        self.total = math.ceil(self.per_epoch / how.accumulate) * how.epochs
        self.folder = None if how.folder is None or how.checkpoints is None else Path(how.folder) / CHECKPOINTS
        self.log: Log | None = None

    def run(self) -> Position:
        """Train to the end, or until validation says so."""
        if how := self.how.speed.compile:
            self.called = torch.compile(self.called, backend=str(how))  # type: ignore[assignment]
        if self.at.step == 0 and self.at.epoch == 0:
            seed_all(self.how.seed + self.processes.number, self.device)
        main = self.processes.main and self.how.folder is not None
        self.log = Log(Path(self.how.folder) if main and self.how.folder else None, step=self.at.step)
        self.bare.train()
        try:
            while self.at.epoch < self.how.epochs and not self.at.stopped:
                self._epoch()
        finally:
            self.log.close()
        if self.average is not None and self.average.how.returned:
            put_whole(self.bare, {name: whole(tensor) for name, tensor in self.average.state.items()})
        return self.at

    def _epoch(self) -> None:
        """The rest of an epoch, from the position on."""
        at, count = self.at, self.processes.count
        started = time.perf_counter()
        if self.began is None:
            self.began = random_state(self.device)
        else:  # in the middle of an epoch: a task's own draws at its start are made again
            set_random_state(self.began, self.device)
        order = self.how.seed * APART + at.epoch
        late = getattr(self.task, "late", None)
        task = self.task if late is None else late(at.epoch, self.how.epochs)
        source, first = iter(task.train_batches(order)), self.processes.number
        if at.batch:  # what was seen goes by, and random numbers go on from where they were
            first += (at.batch - 1) * count + 1
            deque(islice(source, first), maxlen=0)
            first = count - 1
        if self.now is not None:
            set_random_state(self.now, self.device)
            self.now = None
        left = self.per_epoch - at.batch
        batches = islice(source, first, first + (left - 1) * count + 1, count)
        rate = self.how.rate(max(at.step - 1, 0), self.total)
        while group := list(islice(batches, self.how.accumulate)):
            rate = self._step(group, order)
            if self._due() and at.batch < self.per_epoch:
                self._save()
        if not self.losses:
            raise InputError("train a model", found="no training batches", do="give the task some training data")
        self._refuse_not_finite()
        mean = float(self.processes.mean(torch.stack(self.losses).mean()))
        steps = math.ceil(len(self.losses) / self.how.accumulate)
        seconds = time.perf_counter() - started
        entry = {"epoch": at.epoch + 1, "loss": mean, "lr": rate, "steps": steps, "seconds": seconds}
        due = self._due()
        at.epoch, at.batch, self.losses, self.began = at.epoch + 1, 0, [], None
        if (watch := self.how.validation) and (at.epoch % watch.every == 0 or at.epoch == self.how.epochs):
            value = entry["validation"] = self._validate()
            better = at.best is None or (value < at.best if watch.lower else value > at.best)
            at.bad = 0 if better else at.bad + 1
            if better:
                at.best = value
            at.looks.append([value, at.step])
            at.stopped = watch.patience is not None and at.bad >= watch.patience
        at.epochs.append(entry)
        if self.log is not None:
            self.log.write({"step": at.step, "epoch_loss": mean, **{k: v for k, v in entry.items() if k != "loss"}})
        log.info("epoch %d of %d: loss %.4f%s, %.1f s", at.epoch, self.how.epochs, mean,
                 f", validation {entry['validation']:.4g}" if "validation" in entry else "", seconds)  # fmt: skip
        if at.stopped and at.epoch < self.how.epochs:
            log.warning("stopped early after epoch %d of %d: validation %.4g, the best was %.4g; these are the last "
                        "weights, not the best ones", at.epoch, self.how.epochs, at.looks[-1][0], at.best)  # fmt: skip
        ended = at.stopped or at.epoch == self.how.epochs
        if keep := self.how.checkpoints:
            good = at.step in self._best()
            if due or good or ended or keep.every_steps is None:
                self._save()

    def _best(self) -> set[int]:
        """Steps of the checkpoints that stay for their validation."""
        keep, watch = self.how.checkpoints, self.how.validation
        return self.at.best_steps(keep.keep_best, lower=watch.lower) if keep and watch else set()

    def _step(self, group: list[Any], order: int) -> float:
        """One step of the optimiser over a few batches; its rate."""
        how, at = self.how, self.at
        rate = how.rate(at.step, self.total)
        for entry in self.optimizer.param_groups:
            entry["lr"] = rate
        with translated(self.device), self.processes.watched():
            for number, batch in enumerate(group):
                last = number + 1 == len(group)
                with self.processes.unsynced(self.called, last):
                    with self._autocast():
                        loss = self.task.loss(self.called, self._made_ready(batch, order))
                    self.scaler.scale(loss / len(group) if len(group) > 1 else loss).backward()
                self.losses.append(loss.detach())
                at.batch += 1
                if len(self.losses) % CHECK_EVERY == 0 or at.batch == self.per_epoch:
                    self._look(rate)
                if self.progress is not None:
                    done, of = at.epoch * self.per_epoch + at.batch, self.per_epoch * how.epochs
                    self.progress(done, of, f"epoch {at.epoch + 1} of {how.epochs}")
            self.processes.average_gradients(list(self.own.values()))
            if how.clip is not None or self.pressure is not None:
                self.scaler.unscale_(self.optimizer)
            if how.clip is not None:
                clip_(list(self.named.values()), list(self.own.values()), most=how.clip)
            if self.pressure is not None:
                self.pressure(self.bare, self.memory, Moment(at.epoch, how.epochs, at.step, self.total))
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        at.step += 1
        if self.average is not None:
            self.average.update(at.step)
        return rate

    def _made_ready(self, batch: Any, order: int) -> Any:
        """Mixed, and in the memory order asked for."""
        if self.how.mix is not None:
            classes = getattr(self.task, "classes", None)
            if classes is None:
                do = "leave mix out, or use a task of classification"
                raise InputError("mix pictures", found="a task that names no number of classes", do=do)
            number = self.at.batch * self.processes.count + self.processes.number
            generator = torch.Generator().manual_seed((order * APART + number) % 2**63)
            batch = mixed(batch, self.how.mix, classes, generator)
        if self.how.speed.channels_last:
            batch = map_tensors(batch, _channels_last)
        return batch

    def _autocast(self) -> Any:
        if self.precision == "fp32":
            return nullcontext()
        half = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, half)

    def _look(self, rate: float) -> None:
        """Wait for the device, refuse a loss that is not finite, and write a line."""
        self._refuse_not_finite()
        recent = self.losses[-(len(self.losses) % CHECK_EVERY or CHECK_EVERY) :]
        if self.log is not None:
            loss = float(torch.stack(recent).mean())
            self.log.write({"step": self.at.step + 1, "epoch": self.at.epoch + 1, "loss": loss, "lr": rate})

    def _refuse_not_finite(self) -> None:
        finite = torch.stack(self.losses).isfinite().tolist()
        if not all(finite):
            bad, lr = finite.index(False), self.how.lr
            raise NotFiniteError(
                "train a model",
                found=f"loss {self.losses[bad].item()} in epoch {self.at.epoch + 1}, step {bad + 1}",
                do=f"lower lr (now {lr}), clip gradients (clip=10), or look for NaN in data and weights; the model is "
                "as before",
            )

    def _validate(self) -> float:
        """The metric on the validation split, as the first process finds it."""
        evaluate = getattr(self.task, "evaluate", None)
        if evaluate is None or self.how.validation is None:
            raise InputError("validate", found="a task without `evaluate`", do="leave validation out, or add it")
        averaged = self.average is not None and self.average.how.returned
        with self.average.inside() if averaged and self.average else nullcontext(), self.processes.watched():
            measured = evaluate(self.bare, split="val", limit=self.how.validation.limit)
            return self.processes.agreed(float(measured.value))

    def _due(self) -> bool:
        every = self.how.checkpoints.every_steps if self.how.checkpoints else None
        return every is not None and self.at.step % every == 0

    def _save(self) -> None:
        """Write a checkpoint of this moment."""
        if self.folder is None or self.how.checkpoints is None:
            return
        if self.losses:
            self._refuse_not_finite()
        with self.processes.watched():
            tensors, described = optimizer_state(self.optimizer, {**self.named, **self.own})
            if self.average is not None:
                tensors |= {f"ema.{name}": whole(tensor) for name, tensor in self.average.state.items()}
            tensors |= {f"extra.{name}": tensor for name, tensor in whole_state(self.extra).items()}
            tensors |= {f"pressure.{name}": whole(tensor) for name, tensor in self.memory.items()}
            tensors["random"] = self.processes.all(random_state(self.device))
            if self.began is not None:
                tensors["random_at_start_of_epoch"] = self.processes.all(self.began)
            if self.losses:
                tensors["losses"] = self.processes.all(torch.stack(self.losses))
            model = whole_state(self.bare)
            if self.processes.main:
                state = {
                    "position": asdict(self.at),
                    "settings": self.how.to_json(),
                    "optimizer": described,
                    "scaler": self.scaler.state_dict(),
                    **self._bound(),
                }
                write_checkpoint(self.folder, self.at.step, {"model": model, "training": tensors}, state)
                prune(self.folder, last=self.how.checkpoints.keep_last, best=self._best())
            self.processes.wait()

    def _bound(self) -> dict[str, Any]:
        """What must be the same for a training to go on to the same end."""
        bound = {"processes": self.processes.count, "batches_an_epoch": self.per_epoch, "precision": self.precision}
        return bound if self.pressure is None else {**bound, "pressure": repr(self.pressure)}

    def go_on_from(self, saved: Saved) -> None:
        """Take up the position, the weights and everything else of a checkpoint.

        Raises:
            InputError: it is of another model, other settings, other data, or another number of processes.
        """
        state, tensors, me = saved.state, saved.training, self.processes.number
        then, now = {"decayed": "all", **_compared(state["settings"])}, _compared(self.how.to_json())
        then |= {name: state.get(name) for name in (*self._bound(), "pressure")}
        now |= {"pressure": None, **self._bound()}
        if odd := [name for name in now if now[name] != then.get(name)]:
            found = "; ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in odd)
            raise _unlike(saved, found, "give the settings, data and processes of before, or start in another folder")
        for name, part, values in (
            ("model", self.bare, saved.model),
            ("task's own part", self.extra, _below(tensors, "extra.")),
        ):
            shapes = {key: tuple(tensor.shape) for key, tensor in whole_shapes(part).items()}
            theirs = {key: tuple(tensor.shape) for key, tensor in values.items()}
            if shapes != theirs:
                odd = sorted(key for key in {*shapes, *theirs} if shapes.get(key) != theirs.get(key))
                raise _unlike(saved, f"another {name}: {', '.join(odd[:4])}", "give the model that was trained")
        put_whole(self.bare, saved.model)
        put_whole(self.extra, _below(tensors, "extra."))
        put_optimizer_state(self.optimizer, {**self.named, **self.own}, tensors, state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            for name, tensor in _below(tensors, "ema.").items():
                self.average.state[name] = placed_like(tensor, self.average.live[name])
        for name, tensor in _below(tensors, "pressure.").items():
            self.memory[name] = placed_like(tensor, self.memory[name])
        self.at = Position(**_position(state["position"]))
        self.losses = list(tensors["losses"][me].to(self.device)) if "losses" in tensors else []
        if "random_at_start_of_epoch" in tensors:
            self.began, self.now = tensors["random_at_start_of_epoch"][me], tensors["random"][me]
        else:
            set_random_state(tensors["random"][me], self.device)
        log.info("goes on from %s: epoch %d, batch %d", saved.path, self.at.epoch + 1, self.at.batch)


def clip_(*groups: list[nn.Parameter], most: float) -> None:
    """Scale gradients down to a norm of all together; groups may be in shards or not."""
    found = [[p.grad for p in group if p.grad is not None] for group in groups]
    if not any(found):  # nothing was trained in this step
        return
    norms = [whole(nn.utils.get_total_norm(gradients)) for gradients in found if gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, most, norm)


def whole_shapes(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a model's state under the first of their names; of shards, those that know the whole shape."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that decide on the result."""
    return {name: value for name, value in settings.items() if name not in ("folder", "checkpoints")}


def _position(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a position; older checkpoints name the best step alone."""
    fields = {name: value for name, value in saved.items() if name != "best_step"}
    if saved.get("best_step") is not None:
        fields["looks"] = [[saved["best"], saved["best_step"]]]
    return fields


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _unlike(saved: Saved, found: str, do: str) -> InputError:
    return InputError("go on from a checkpoint", found=found, where=str(saved.path), do=do)
