"""Training after the cut, or from scratch: where the model is, or as `accelerate launch` says."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from niwaki.errors import InputError, RunExistsError, UnknownNameError
from niwaki.files import write_json
from niwaki.pressure import Pressure
from niwaki.train.checkpoints import listed, newest
from niwaki.train.history import HISTORY, History
from niwaki.train.loop import CHECKPOINTS, Loop, Progress, Trainable
from niwaki.train.processes import Processes
from niwaki.train.settings import Checkpoints, Drops, Ema, Mix, Speed, Validation, from_plain, in_range
from niwaki.train.untouched import all_or_nothing, channels_last

SCHEDULES = ("cosine", "linear", "step", "constant")
OPTIMIZERS = ("sgd", "adamw")
DECAYED = ("all", "weights")


@final
@dataclass(frozen=True)
class Recovery:
    """Training for some epochs, so that a cut network finds its accuracy again, or an untrained one its first.

    Runs where the model is: to train on a GPU, move it there first. Under `accelerate launch`, or where its environment
    says so (ACCELERATE_USE_CPU), accelerate decides on the device and the number of processes; each takes every n-th
    batch, with DDP or, where the launcher says FSDP in version 2, with parameters in shards. Only parameters that want
    gradients are trained. Afterwards the model is on its device and in its mode of before; if anything goes wrong, its
    weights are those of before as well.

    Source: Nesterov momentum and weight decay as in Zagoruyko and Komodakis 2016, arXiv:1605.07146, sec. 3; cosine as
    in Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts. Differs: a tenth of their learning rate,
    since the weights are trained already, and a short warm-up.

    Raises:
        InputError: settings out of range, nothing to train, a checkpoint of another training.
        NotFiniteError: the loss is NaN or infinite; names the step.
        OutOfMemoryError: the device is too small for a batch.
        ProcessLostError: one of several processes ended.
        RunExistsError: `folder` already holds a training.
        FileDamagedError: no checkpoint to go on from is whole.
        MissingExtraError: accelerate is not installed.
    """

    epochs: int = 3
    """Passes over the training split."""
    lr: float = 0.01
    """Highest learning rate; 0.01 suits sgd, adamw wants about a tenth."""
    momentum: float = 0.9
    """Of sgd; the first beta of adamw."""
    weight_decay: float = 5e-4
    """On all trained parameters, or those that `decayed` says."""
    schedule: str = "cosine"
    """"cosine" or "linear" down to zero, "step" down by `drops`, or "constant"; each step its own rate."""
    warmup: float = 0.05
    """Share of all steps, in [0, 1), in which the rate rises from near zero."""
    optimizer: str = "sgd"
    """"sgd" (with Nesterov's momentum) or "adamw"."""
    seed: int = 0
    """Of order, augmentation, mixing and dropout."""
    limit: int | None = None
    """Most batches per epoch, to try things out; None for the whole split."""
    folder: str | None = None
    """Where history.json, history.jsonl, TensorBoard files and checkpoints go; None writes nothing."""
    drops: Drops = field(default_factory=Drops)
    """Of the schedule "step"."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step."""
    clip: float | None = None
    """Largest norm of all gradients together; longer ones are scaled down to it. None leaves them."""
    ema: Ema | None = None
    """A moving average of the weights, or None."""
    mix: Mix | None = None
    """Mixup and cutmix, or None."""
    speed: Speed = field(default_factory=Speed)
    """Precision, memory order, torch.compile."""
    validation: Validation | None = None
    """Looks at the validation split, and early stopping; None looks at nothing."""
    checkpoints: Checkpoints | None = None
    """What a killed training goes on from (`resume=True`), in `folder`; None writes none."""
    decayed: str = "all"
    """Which parameters the weight decay is on: "all", or "weights", those of two axes and more: no biases, no scales
    and shifts of norms."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UnknownNameError.of("schedule", self.schedule, SCHEDULES)
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError.of("optimizer", self.optimizer, OPTIMIZERS)
        if self.decayed not in DECAYED:
            raise UnknownNameError.of("parameters that decay", self.decayed, DECAYED)
        limits = {
            "epochs": (self.epochs >= 1, "of at least 1"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "of 0 or more"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "limit": (self.limit is None or self.limit >= 1, "of None or at least 1"),
            "accumulate": (self.accumulate >= 1, "of at least 1"),
            "clip": (self.clip is None or 0 < self.clip < math.inf, "of None or above 0"),
        }
        in_range(self, limits)

    def __call__(
        self,
        model: nn.Module,
        task: Trainable,
        *,
        progress: Progress | None = None,
        resume: bool = False,
        pressure: Pressure | None = None,
    ) -> History:
        """Trains `model` in place on the task's training split; a `pressure` adds to the gradients before each step.

        With `resume` it goes on from the newest whole checkpoint in `folder`, if there is one, to the very weights
        that the training would have given without the break (on the CPU, with as many threads).
        """
        extra = getattr(task, "extra", None) or nn.Module()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained or any(parameter.is_meta for parameter in trained):
            found = "a model on the meta device" if trained else "no parameter that wants a gradient"
            raise InputError("train a model", found=found, do="give it weights that want gradients")
        if self.checkpoints is not None and self.folder is None:
            raise InputError("train with checkpoints", found="no folder to write them to", do="give folder=")
        if resume and self.checkpoints is None:
            raise InputError("resume a training", found="checkpoints=None", do="give checkpoints=Checkpoints()")
        processes = Processes(model)
        device = processes.device
        folder = None if self.folder is None else Path(self.folder)

        def ready() -> str:
            """The first process may come late: it measures alone."""
            if folder is not None and not resume:
                _refuse_used(folder)
            return "ready"

        processes.told(ready)
        with all_or_nothing(model, device), all_or_nothing(extra, device), processes.watched():
            extra.to(device)
            processes.same(extra)
            last = self.speed.channels_last and not processes.sharded
            with processes.joined(model) as (called, bare), channels_last(bare, last):
                loop = Loop(self, task, processes, called=called, bare=bare, extra=extra, progress=progress,
                            pressure=pressure)  # fmt: skip
                saved = newest(folder / CHECKPOINTS) if resume and folder is not None else None
                if saved is not None:
                    loop.go_on_from(saved)
                end = loop.run()
            history = History(tuple(end.epochs), self.to_json(), str(device), processes.count, end.stopped)
            if folder is not None and processes.main:
                write_json(folder / HISTORY, history.to_json())
            return history

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0, of `steps` in all.

        Examples:
            >>> [round(Recovery(lr=1.0, warmup=0.2).rate(step, 10), 3) for step in (0, 1, 2, 6, 9)]
            [0.5, 1.0, 1.0, 0.5, 0.038]
        """
        rising = round(self.warmup * steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        done = (step - rising) / max(1, steps - rising)  # from 0 to just below 1
        fallen = sum(step >= at * steps - 1e-6 for at in self.drops.at)  # 0.7 * 10 is a little more than 7
        falling = {
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "linear": 1 - done,
            "step": self.drops.factor**fallen,
            "constant": 1.0,
        }
        return self.lr * falling[self.schedule]

    def new_optimizer(self, *groups: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of these settings, over groups of parameters."""
        trained = [part for group in groups for part in self._parts(group)]
        if self.optimizer == "adamw":
            betas = (self.momentum, 0.999)
            return torch.optim.AdamW(trained, lr=self.lr, betas=betas, weight_decay=self.weight_decay)
        nesterov = self.momentum > 0
        return torch.optim.SGD(
            trained, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=nesterov
        )

    def _parts(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        """Parameters that decay, and those that do not."""
        bare = [parameter for parameter in parameters if self.decayed == "weights" and parameter.dim() < 2]
        without = {id(parameter) for parameter in bare}
        heavy: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in without]}]
        return [part for part in (*heavy, {"params": bare, "weight_decay": 0.0}) if part["params"]]

    def to_json(self) -> dict[str, Any]:
        """The settings as plain data; groups are objects of their own."""
        plain = asdict(self)
        return {**plain, "drops": {**plain["drops"], "at": list(self.drops.at)}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Recovery":
        """The settings that `to_json` gave, or some of them; the others have their defaults.

        Raises:
            UnknownNameError: a setting that does not exist.
            InputError: a value of another type, or out of its range.

        Examples:
            >>> Recovery.from_json({"epochs": 2, "ema": {"decay": 0.9}, "mix": True}).mix
            Mix(mixup=0.2, cutmix=0.0, probability=1.0)
        """
        kept = data.get("checkpoints")
        if isinstance(kept, dict) and type(kept.get("keep_best")) is bool:  # older settings said whether, not how many
            data = {**data, "checkpoints": {**kept, "keep_best": int(kept["keep_best"])}}
        return from_plain(cls, data, "training")


def _refuse_used(folder: Path) -> None:
    """Refuse a folder that holds a training, done or not."""
    done = (folder / HISTORY).exists()
    if not done and not listed(folder / CHECKPOINTS):
        return
    found = "it holds a history already" if done else "it holds checkpoints of a training that did not end"
    do = "give another folder, or remove that file" if done else "go on with it (resume=True), or give another folder"
    where = str(folder / (HISTORY if done else CHECKPOINTS))
    raise RunExistsError(f"write a training history to {folder}", found=found, where=where, do=do)
