"""A short training after the cut, where the model is, or as `accelerate launch` says: a CPU, one GPU, several."""

import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from niwaki.errors import (
    InputError,
    MissingExtraError,
    NotFiniteError,
    OutOfMemoryError,
    RunExistsError,
    UnknownNameError,
)
from niwaki.units import device_of

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and a few words."""

HISTORY = "history.json"
SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("sgd", "adamw")
LAUNCHED = ("ACCELERATE_USE_CPU", "LOCAL_RANK", "WORLD_SIZE")
"""What `accelerate launch` and torchrun set: where one of these is there, accelerate decides on the device."""
CHECK_EVERY = 16  # steps between looks at the losses: each look waits for the device


class Trainable(Protocol):
    """What training asks of a task; `niwaki.tasks.Task` has it.

    A task may besides have `extra`, a module of its own (adapters of a distillation), or None: its parameters are
    trained with the model's, on the same device, and all or nothing holds for them too.
    """

    @property
    def steps(self) -> int: ...

    def train_batches(self, seed: int) -> Iterator[Any]: ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...


@final
@dataclass(frozen=True)
class History:
    """What happened: one entry per epoch, with the settings and the device.

    Examples:
        >>> History(epochs=({"epoch": 1, "loss": 0.5, "lr": 0.0, "steps": 10, "seconds": 2.0},)).losses
        [0.5]
    """

    epochs: tuple[dict[str, float], ...]
    """Per epoch: `epoch`, mean training `loss`, last learning rate `lr`, `steps`, `seconds`."""
    settings: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    processes: int = 1

    @property
    def losses(self) -> list[float]:
        return [epoch["loss"] for epoch in self.epochs]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "epochs": list(self.epochs)}


@final
@dataclass(frozen=True)
class Recovery:
    """Plain training for a few epochs, so that a cut network finds its accuracy again.

    Runs where the model is: to train on a GPU, move it there first. Under `accelerate launch`, or where its environment
    says so (ACCELERATE_USE_CPU), accelerate decides on the device and the number of processes; each takes every n-th
    batch. Only parameters that want gradients are trained. Afterwards the model is on its device and
    in its mode of before; if anything goes wrong, its weights are those of before as well.

    Source: Nesterov momentum and weight decay as in Zagoruyko and Komodakis 2016, arXiv:1605.07146, sec. 3; cosine as
    in Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts. Differs: a tenth of their learning rate,
    since the weights are trained already, and a short warm-up.

    Raises:
        InputError: settings out of range, nothing to train.
        NotFiniteError: the loss is NaN or infinite; names the step.
        OutOfMemoryError: the device is too small for a batch.
        RunExistsError: `folder` already holds a history.
        MissingExtraError: accelerate is not installed.
    """

    epochs: int = 3
    """Passes over the training split."""
    lr: float = 0.01
    """Highest learning rate; 0.01 suits sgd, adamw wants about a tenth."""
    momentum: float = 0.9
    """Of sgd; the first beta of adamw."""
    weight_decay: float = 5e-4
    """On all trained parameters."""
    schedule: str = "cosine"
    """"cosine" or "linear" down to zero, or "constant"; each step its own rate."""
    warmup: float = 0.05
    """Share of all steps, in [0, 1), in which the rate rises from near zero."""
    optimizer: str = "sgd"
    """"sgd" (with Nesterov's momentum) or "adamw"."""
    seed: int = 0
    """Of order, augmentation and dropout."""
    limit: int | None = None
    """Most steps per epoch, to try things out; None for the whole split."""
    folder: str | None = None
    """Where history.json and TensorBoard files go; None writes nothing."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UnknownNameError.of("schedule", self.schedule, SCHEDULES)
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError.of("optimizer", self.optimizer, OPTIMIZERS)
        limits = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "limit": (self.limit is None or self.limit >= 1, "None or at least 1"),
        }
        for name, (right, wanted) in limits.items():
            if not right:
                raise InputError(f"Recovery({name}={getattr(self, name)!r})", do=f"give a value {wanted}")

    def __call__(self, model: nn.Module, task: Trainable, *, progress: Progress | None = None) -> History:
        """Trains `model` in place on the task's training split."""
        try:
            from accelerate import Accelerator
        except ImportError as cause:
            raise MissingExtraError("training needs accelerate", do='pip install "niwaki[train]"') from cause
        extra = getattr(task, "extra", None) or nn.Module()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        own = [parameter for parameter in extra.parameters() if parameter.requires_grad]
        if not trained or any(parameter.is_meta for parameter in trained):
            found = "a model on the meta device" if trained else "no parameter that wants a gradient"
            raise InputError("train a model", found=found, do="give it weights that want gradients")
        launched = any(name in os.environ for name in LAUNCHED)
        accelerator = Accelerator(device_placement=launched)
        device = accelerator.device if launched else device_of(model)
        main = accelerator.is_main_process
        with all_or_nothing(model, device), all_or_nothing(extra, device), self._board(main) as record:
            extra.to(device)
            with prepared(accelerator, model, self._optimizer(trained + own)) as (wrapped, optimizer):
                epochs = self._epochs(wrapped, task, accelerator, device, optimizer, progress, record)
            history = History(epochs, asdict(self), str(device), accelerator.num_processes)
            if self.folder is not None and accelerator.is_main_process:
                _write_json(Path(self.folder) / HISTORY, history.to_json())
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
        falling = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        return self.lr * falling[self.schedule]

    def _optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            betas = (self.momentum, 0.999)
            return torch.optim.AdamW(trained, lr=self.lr, betas=betas, weight_decay=self.weight_decay)
        nesterov = self.momentum > 0
        return torch.optim.SGD(
            trained, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=nesterov
        )

    def _epochs(
        self,
        model: nn.Module,
        task: Trainable,
        accelerator: Any,
        device: torch.device,
        optimizer: Any,
        progress: Progress | None,
        record: Callable[[dict[str, float]], None],
    ) -> tuple[dict[str, float], ...]:
        """The training loop: one history entry per epoch."""
        workers, own = accelerator.num_processes, accelerator.process_index
        per_epoch = max(1, min(task.steps, (self.limit or task.steps) * workers) // workers)
        total = per_epoch * self.epochs
        history: list[dict[str, float]] = []
        model.train()
        torch.random.default_generator.manual_seed(self.seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(self.seed)
        for epoch in range(self.epochs):
            started = time.perf_counter()
            losses: list[Tensor] = []
            rate = 0.0
            order = self.seed * 1_000_003 + epoch  # far apart: two seeds never share the order of an epoch
            batches = islice(task.train_batches(order), own, per_epoch * workers, workers)
            for number, batch in enumerate(batches):
                step = epoch * per_epoch + number
                rate = self.rate(step, total)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with translated(device), accelerator.autocast():
                    loss = task.loss(model, batch)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
                if len(losses) % CHECK_EVERY == 0 or number + 1 == per_epoch:
                    _refuse_not_finite(losses, epoch, self.lr)
                if progress is not None:
                    progress(step + 1, total, f"epoch {epoch + 1} of {self.epochs}")
            if not losses:
                raise InputError("train a model", found="no training batches", do="give the task some training data")
            _refuse_not_finite(losses, epoch, self.lr)
            mean = float(accelerator.reduce(torch.stack(losses).mean(), reduction="mean"))
            seconds = time.perf_counter() - started
            entry = {"epoch": epoch + 1, "loss": mean, "lr": rate, "steps": len(losses), "seconds": seconds}
            history.append(entry)
            log.info("epoch %d of %d: loss %.4f, %.1f s", epoch + 1, self.epochs, mean, seconds)
            record(entry)
        return tuple(history)

    @contextmanager
    def _board(self, main: bool) -> Iterator[Callable[[dict[str, float]], None]]:
        """Inside, a function that adds an epoch to TensorBoard files, where a folder is given and it is installed."""
        folder = Path(self.folder) if self.folder is not None else None
        if folder is None or not main:
            yield lambda entry: None
            return
        if (folder / HISTORY).exists():
            found, do = "it holds a history already", "give another folder, or remove that file"
            asked = f"write a training history to {folder}"
            raise RunExistsError(asked, found=found, where=str(folder / HISTORY), do=do)
        folder.mkdir(parents=True, exist_ok=True)
        if not importlib.util.find_spec("tensorboard"):
            log.warning("no TensorBoard files: tensorboard is not installed")
            yield lambda entry: None
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder)) as board:

            def write(entry: dict[str, float]) -> None:
                board.add_scalar("train/loss", entry["loss"], int(entry["epoch"]))
                board.add_scalar("train/lr", entry["lr"], int(entry["epoch"]))

            yield write


@contextmanager
def all_or_nothing(model: nn.Module, there: torch.device) -> Iterator[None]:
    """Afterwards modes, device, gradients and random state (of the CPU, and of the device that computes) are those of
    before, and after an error the numbers too.
    """
    device = device_of(model)
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    gpus = [torch.cuda.current_device() if there.index is None else there.index] if there.type == "cuda" else []
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with torch.random.fork_rng(devices=gpus):
            yield
    except BaseException:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(before[name])
        raise
    finally:
        for parameter, _ in gradients:
            parameter.grad = None
        if device_of(model) != device:
            model.to(device)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


@contextmanager
def prepared(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Module, Any]]:
    """Inside, model and optimiser as accelerate wants them; afterwards nothing of accelerate is left on the model."""
    names = ("_is_accelerate_prepared", "_original_forward", "forward")
    own = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield accelerator.prepare(model, optimizer)
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        accelerator.free_memory()
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(own)


@contextmanager
def translated(device: torch.device) -> Iterator[None]:
    """Errors of torch that are the machine's limits, as ours."""
    try:
        yield
    except torch.OutOfMemoryError as cause:
        do = "use smaller batches; the model is as before"
        raise OutOfMemoryError(f"train on {device}", found="no memory left", do=do) from cause


def _refuse_not_finite(losses: list[Tensor], epoch: int, lr: float) -> None:
    finite = torch.stack(losses).isfinite().tolist()
    if not all(finite):
        raise NotFiniteError(
            "train a model",
            found=f"loss {losses[finite.index(False)].item()} in epoch {epoch + 1}, step {finite.index(False) + 1}",
            do=f"lower lr (now {lr}), or look for NaN in data and weights; the model is as before",
        )


def _write_json(file: Path, value: Any) -> None:
    """The whole file or none: written beside its place, then renamed."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)
